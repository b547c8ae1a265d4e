"""What can be known without torch and transformers is told without them: here they cannot be imported."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.helpers.light_runs import light_environment, run_light

from fusion_hf import cli
from fusion_hf.conversion.inputs import DECODER_TYPES
from fusion_hf.data import record_parsing
from fusion_hf.hub.folders import nano_path
from fusion_hf.model.modeling_fusion_decoder import DECODER_LAYERS
from fusion_hf.model.processing_fusion import IMAGE_TOKEN
from fusion_hf.training import recipe_keys
from fusion_hf.training.arguments import FusionTrainingArguments

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "docs" / "assets" / "red_circle.png"
CODE = ROOT / "tests" / "fixtures" / "authors_stand_in"
CONFIG = ROOT / "configs" / "models" / "fusion-3b.json"
HELP_SECONDS, ERROR_SECONDS = 0.3, 0.5  # of a processor
REPEATS = 3
COMMANDS = (
    *("ask", "chat", "maps", "demo", "train", "plan", "merge", "push", "export", "data", "evaluate", "synthesize"),
    *("init-recipe", "serve", "convert", "build", "verify", "compare", "cache"),
)
# the command line, and what its error says; `run.yaml` and `mix.yaml` name files that are missing
ERRORS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("train gone.yaml", ("gone.yaml", "No such file")),
    ("train run.yaml lerning_rate=1", ("'lerning_rate'", "'learning_rate'")),
    ("train run.yaml seed=many", ("`seed`", "got 'many'", "a whole number")),
    ("train run.yaml seed=[", ("seed must be a YAML value", "got '['")),
    ("train run.yaml on_broken=x", ("`on_broken` must be", "error, skip", "got 'x'")),
    ("train run.yaml query_lens=[5]", ("`query_lens` must contain perfect squares", "got 5")),
    ("train run.yaml", ("data: gone.json does not exist",)),
    ("train run.yaml data=mix.yaml", ("mix.yaml, entry 1: ", "gone.json does not exist")),
    ("train run.yaml data=mix.yaml data_root=nowhere", ("data_root", "nowhere", "not a folder")),
    ("train run.yaml data=records.json eval_data=gone.json", ("eval_data: gone.json does not exist",)),
    ("train run.yaml data=records.json output_dir=records.json", ("output_dir: records.json", "Not a directory")),
    ("train run.yaml data=records.json resume_from_checkpoint=gone", ("`resume_from_checkpoint`", "got 'gone'")),
    ("train run.yaml data=records.json", ("./model is neither a folder",)),
    ("train run.yaml data=records.json model=records.json", ("got the file records.json",)),
    ("train run.yaml data=records.json model=adapter", ("LoRA adapter", "fusion-hf merge")),
    ("train run.yaml report_to=wandbb", ("`report_to` must be", "none, all, tensorboard, wandb", "got 'wandbb'")),
    ("train run.yaml load_in_8bit=true", ("`lora_rank` must be 1 or more", "`load_in_8bit`")),
    ("init-recipe gone.json", ("data: gone.json does not exist",)),
    ("init-recipe records.json --eval-data gone.json", ("gone.json does not exist",)),
    ("init-recipe records.json --output run.yaml", ("`--output` must be a new file, got run.yaml",)),
    ("init-recipe records.json --output new.json", ("`--output` must end in .yaml", "got new.json")),
    ("init-recipe records.json --model ./gone", ("./gone is neither a folder",)),
    ("init-recipe records.json --model adapter", ("LoRA adapter", "fusion-hf merge")),
    ("init-recipe records.json --method dora", ("'dora'", "qlora")),
    ("plan gone.yaml", ("gone.yaml", "No such file")),
    ("plan --gpus 2 run.yaml --json seed=x", ("`seed` must be", "got 'x'")),
    ("plan run.yaml", ("model './model' is not on disk", "--config")),
    ("plan run.yaml --config gone.json", ("`--config`", "got 'gone.json'")),
    ("plan run.yaml --config records.json", ("records.json must contain a JSON object, got a list",)),
    ("plan run.yaml --config CONFIG optim=x", ("`optim` must be", "adamw_torch_fused", "got 'x'")),
    ("plan run.yaml --config CONFIG --gpus 3 global_batch_size=8", ("`global_batch_size`", "3 processes", "got 8")),
    ("plan run.yaml --config CONFIG data=gone.yaml", ("data: gone.yaml cannot be read",)),
    ("merge --model gone --output new", ("`--model`", "got gone, which is no folder")),
    ("merge --model empty --output new", ("adapter_config.json cannot be read",)),
    ("merge --model adapter --output new", ("adapter_model.safetensors is missing",)),
    ("merge --model whole_adapter --output new", ("does not name its base", "--base")),
    ("merge --model whole_adapter --output new --base ./gone", ("./gone is neither a folder",)),
    (
        "merge --model whole_adapter --output full --base ./gone",
        ("--output must be a new or an empty folder, got full",),
    ),
    ("merge --model adapter --output new --dtype int8", ("'int8'", "float32")),
    ("push --model gone --repo-id me/it --dry-run", ("--model must be a model folder, got gone",)),
    ("push --model empty --repo-id me/it --dry-run", ("empty has no config.json",)),
    ("push --model empty --repo-id a/b/c --dry-run", ("--repo-id: ", "a/b/c")),
    ("export --output new --model ./gone", ("./gone is neither a folder",)),
    ("export --output full", ("--output must be a new or an empty folder, got full",)),
    ("export --output records.json/new", ("records.json/new cannot be written", "Not a directory")),
    ("export --output new --image-token-grid x", ("'x'", "whole number from 1")),
    ("maps IMAGE what? --output full", ("--output must be a new or an empty folder, got full",)),
    ("maps IMAGE what? --output records.json/new", ("records.json/new cannot be written",)),
    ("maps IMAGE what? --model ./gone", ("./gone is neither a folder",)),
    ("maps gone.png what?", ("'gone.png' is no file",)),
    (
        "ask IMAGE what? --model empty",
        (
            "empty must be a folder",
            "it has no config.json",
        ),
    ),
    ("ask IMAGE what? --model llama", ("must be 'fusion', got 'llama'",)),
    ("ask IMAGE what? --dtype int8", ("--dtype", "'int8'", "auto", "float16")),
    ("ask IMAGE what? --device abacus", ("must be auto, cpu, cuda, cuda:1 or mps, got 'abacus'",)),
    ("ask IMAGE what? --temperature 3", ("--temperature", "a number from 0 to 2, got '3'")),
    ("ask IMAGE what? --temperature 1 --top-p 0", ("--top-p", "above 0 and at most 1, got '0'")),
    ("ask IMAGE what? --temperature 1 --seed -1", ("--seed",)),
    ("ask IMAGE what? --top-p 0.5", ("`--top-p` requires `--temperature` above 0, got 0.5",)),
    ("chat IMAGE --seed 0", ("`--seed` requires `--temperature` above 0, got 0",)),
    ("ask IMAGE what? --temperature 1 --num-beams 2", ("`--num-beams` must be 1", "`--temperature`", "got 2")),
    ("chat IMAGE --fast --num-beams 2", ("`--num-beams` must be 1 with `--fast`, got 2",)),
    ("ask IMAGE what? --load-in-8bit --load-in-4bit", ("--load-in-4bit", "--load-in-8bit")),
    ("serve --engine vllm --load-in-8bit", ("--load-in-8bit", "--engine vllm", "got 8")),
    ("ask --input gone.jsonl --output new.jsonl", ("gone.jsonl cannot be read",)),
    (
        "ask --input questions.jsonl --output gone/new.jsonl",
        ("output must be in an existing folder", "gone/new.jsonl"),
    ),
    ("ask --input questions.jsonl --output questions.jsonl", ("`output` must be a new file", "got questions.jsonl")),
    ("ask --input questions.jsonl --output new.jsonl --model ./gone", ("./gone is neither a folder",)),
    ("chat gone.png", ("'gone.png' is no file",)),
    ("chat IMAGE --model ./gone", ("./gone is neither a folder",)),
    ("chat IMAGE --max-new-tokens 0", ("'0'", "whole number from 1")),
    ("demo --model ./gone", ("./gone is neither a folder",)),
    ("demo --port 70000", ("'70000'", "65535")),
    ("serve --model ./gone", ("./gone is neither a folder",)),
    ("serve --api-key-env NO_SUCH_KEY", ("NO_SUCH_KEY", "--api-key-env")),
    ("serve --allow-image-host a/b", ("'a/b'",)),
    ("serve --concurrency 0", ("'0'", "whole number from 1")),
    ("cache --remove gone", ("`--remove` must be", "got 'gone'")),
    ("evaluate", ("`--tasks` is required", "pope")),
    ("evaluate --tasks x", ("`--tasks` must be all", "pope", "got 'x'")),
    ("evaluate --tasks pope --model ./gone", ("./gone is neither a folder",)),
    ("evaluate --tasks pope --data-root gone", ("`--data-root` must be a folder, got gone",)),
    ("evaluate --tasks pope --output records.json", ("--output: records.json", "Not a directory")),
    ("evaluate --tasks pope --url http://x --api-key-env NO_SUCH_KEY", ("NO_SUCH_KEY", "--api-key-env")),
    ("evaluate --published x", ("--published must be", "FUSION 3B", "got 'x'")),
    ("evaluate --table gone.json", ("gone.json is not a record",)),
    ("compare gone.json records.json", ("gone.json is not a record",)),
    (
        "compare records.json records.json --page gone/page.html",
        ("--page must be in an existing folder", "gone/page.html"),
    ),
    ("compare records.json records.json --model-a new", ("`--model-a`", "`--stages`", "got new")),
    ("compare empty empty", ("empty holds neither record-*.json",)),
    ("data check gone.json", ("gone.json does not exist",)),
    ("data check gone.yaml", ("gone.yaml cannot be read",)),
    ("data check mix.yaml", ("mix.yaml, entry 1: ", "gone.json does not exist")),
    ("data check records.json --data-root gone", ("data_root", "gone", "not a folder")),
    ("data check records.json --data-cache questions.jsonl", ("--data-cache: questions.jsonl", "Not a directory")),
    ("synthesize gone.yaml", ("gone.yaml", "No such file")),
    ("synthesize synth.yaml --backend procedural recrds=1", ("'recrds'", "'records'")),
    ("synthesize synth.yaml records=[", ("records must be a YAML value", "got '['")),
    ("synthesize synth.yaml output=records.json", ("output: records.json", "Not a directory")),
    ("convert --model empty", ("`--output` is required",)),
    ("convert --model empty --output full", ("--output must be a new or an empty folder, got full",)),
    ("convert --model ./gone --output new", ("--model must be an existing path", "got './gone'")),
    ("convert --model empty --output new", ("empty/config.json does not exist",)),
    ("convert --model records.json --output new", ("config.json cannot be read", "Not a directory")),
    ("convert --model llama --output new", ("got 'llama'", "'fusion_phi'")),
    ("convert --model authors --output new", ("authors must have weights", "model.safetensors")),
    ("convert --model authors --output new --base llama", ("--base is only for LoRA", "authors")),
    ("convert --model authors --output new --image-token-grid 0", ("'0'", "whole number from 1")),
    (
        "verify --model llama --checkpoint authors --authors-code empty --authors-python PYTHON",
        ("got empty", "has no fusion/"),
    ),
    (
        "verify --model llama --checkpoint authors --authors-code CODE --authors-python ./gone",
        ("--authors-python must be", "got './gone'"),
    ),
    (
        "verify --model ./gone --checkpoint authors --authors-code CODE --authors-python PYTHON",
        ("./gone is neither a folder",),
    ),
    (
        "verify --model llama --checkpoint authors --authors-code CODE --authors-python PYTHON",
        ("must be 'fusion', got 'llama'",),
    ),
    (
        "verify --model NANO --checkpoint authors --authors-code CODE --authors-python PYTHON",
        ("authors must have weights",),
    ),
    (
        "verify --model NANO --checkpoint llama --authors-code CODE --authors-python PYTHON",
        ("got 'llama'", "'fusion_phi'"),
    ),
    ("verify --model NANO --checkpoint authors --authors-code CODE", ("--authors-python", "--help")),
    ("verify --model NANO --checkpoint authors --tolerance 2", ("'2'", "below 1")),
    ("verify --model NANO --checkpoint authors --timeout 0", ("'0'", "whole number from 1")),
    ("build --text llama --vision empty", ("`--output` is required", "--dry-run")),
    ("build --text llama --vision empty --output new", ("llama must have weights",)),
    ("build --text empty --vision empty --output new", ("empty/config.json does not exist",)),
    ("build --text authors --vision empty --output new", ("got 'fusion_phi'", "phi3")),
    ("build --text llama --vision empty --output new --query-lens 4,x", ("got '4,x'",)),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command lines name."""
    folder = tmp_path_factory.mktemp("early")
    (folder / "run.yaml").write_text("model: ./model\ndata: gone.json\noutput_dir: out\n")
    (folder / "mix.yaml").write_text("datasets:\n- json_path: gone.json\n")
    (folder / "synth.yaml").write_text("output: made\nrecords: 60\nbackend: procedural\n")
    (folder / "records.json").write_text("[]")
    (folder / "questions.jsonl").write_text('{"question": "what?"}\n')
    for name in ("empty", "full", "llama", "authors", "adapter"):
        (folder / name).mkdir()
    (folder / "full" / "file").touch()
    (folder / "llama" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    fields = ("window_size", "num_of_vision_sampler_layers", "start_of_vision_sampler_layers")
    upstream = {"model_type": "fusion_phi", "query_len": 4, "stride_of_vision_sampler_layers": 1}
    (folder / "authors" / "config.json").write_text(json.dumps(upstream | dict.fromkeys(fields, 1)))
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    shutil.copytree(folder / "adapter", folder / "whole_adapter")
    (folder / "whole_adapter" / "adapter_model.safetensors").touch()
    return folder


def test_errors(folder: Path):
    """In one process: each alone would take longer to start than to fail."""
    before = sorted(folder.iterdir())
    places = {"IMAGE": str(IMAGE), "CONFIG": str(CONFIG), "CODE": str(CODE), "PYTHON": sys.executable}
    places["NANO"] = nano_path()
    commands = [[places.get(word, word) for word in line.split()] for line, _ in ERRORS]
    for (line, parts), result in zip(ERRORS, run_light(folder, commands), strict=True):
        assert result.status == 2 and result.out == "", (line, result)
        assert result.error.startswith("error: ") and result.error.count("\n") == 1, (line, result)
        for part in parts:
            assert part in result.error, (line, result)
        for word in line.split()[1:]:  # an error names a file once
            assert word.startswith("-") or "." not in word or result.error.count(word) <= 1, (line, result)
    made = set(folder.iterdir()) - set(before)
    assert {path.name for path in made} <= {"refuse"}


def test_every_command_has_such_errors():
    assert {line.split()[0] for line, _ in ERRORS} == {*cli.COMMANDS}


@pytest.mark.parametrize("command", ["train run.yaml lerning_rate=1", "convert --model gone --output new"])
def test_a_process_answers_at_once(folder: Path, command: str):
    """As a user has it, with all packages there: the fastest of a few starts."""
    best = float("inf")
    for _ in range(REPEATS):
        begin = os.times()
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        arguments = [sys.executable, "-m", "fusion_hf", *command.split()]
        done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True)
        end = os.times()
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done
        best = min(best, end.children_user + end.children_system - begin.children_user - begin.children_system)
    assert best < ERROR_SECONDS


def test_help_imports_nothing_heavy(folder: Path):
    results = run_light(folder, [*([name, "--help"] for name in COMMANDS), ["data", "check", "--help"]])
    for result in results:
        assert result.status == 0 and result.error == "" and result.out.startswith("usage: "), result


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_fast(folder: Path, command: str):
    times = []
    for _ in range(REPEATS):
        begin = os.times()
        subprocess.run(
            [sys.executable, "-m", "fusion_hf", command, "--help"],
            check=True,
            capture_output=True,
            env=light_environment(folder),
        )
        end = os.times()
        times.append(end.children_user + end.children_system - begin.children_user - begin.children_system)
        if times[-1] < HELP_SECONDS:
            return
    pytest.fail(f"the fastest of {REPEATS} took {min(times):.2f} s")


def test_keys_are_those_of_the_class():
    """They are read from the source of transformers; the class itself, which takes seconds to import, has the same."""

    def shown(known: dict[str, recipe_keys.KeyTypes]) -> dict[str, tuple[list[str], bool]]:
        return {name: (sorted(kind.__name__ for kind in key.kinds), key.takes_none) for name, key in known.items()}

    assert shown(dict(recipe_keys.all_keys())) == shown(recipe_keys.keys_of(FusionTrainingArguments))


def test_keys_of_a_version_that_has_them_elsewhere(monkeypatch: pytest.MonkeyPatch):
    expected = recipe_keys.transformers_keys().keys()
    monkeypatch.setattr(recipe_keys, "SOURCE", "moved.py")
    assert recipe_keys.transformers_keys().keys() == expected


def test_names_that_are_written_twice_are_the_same():
    """Where the first would need torch."""
    assert tuple(sorted(DECODER_LAYERS)) == DECODER_TYPES
    assert record_parsing.IMAGE_TOKEN == IMAGE_TOKEN
