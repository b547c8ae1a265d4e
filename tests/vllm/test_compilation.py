"""Graphs of decoding and compiled decoding, which are off unless somebody asks for them: the answers stay the same."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.helpers.vllm_models import CASES, Reference, answer_of, largest_difference, write_random_model

import fusion_hf

pytestmark = pytest.mark.vllm
TOLERANCE = 1e-4
HALF_TOLERANCE = 0.1  # of log-probabilities in bfloat16
COMPILED = {"compilation_config": {"mode": 3}}  # which vLLM turns into one trace on a CPU
GRAPHS = {"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}}
READS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__")
OURS = Path(fusion_hf.__file__).parent


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, (True, "NONE", "NONE")),
        ({"cudagraph_mode": "NONE", "mode": 0}, (True, "NONE", "NONE")),
        ({"cudagraph_mode": "FULL_DECODE_ONLY"}, (False, "FULL_DECODE_ONLY", "NONE")),
        ({"mode": 3}, (False, "NONE", "VLLM_COMPILE")),
        ({"cudagraph_mode": "FULL_DECODE_ONLY", "mode": 3}, (False, "FULL_DECODE_ONLY", "VLLM_COMPILE")),
    ],
)
def test_what_is_run_as_it_is_written(environment: None, asked: dict[str, Any], expected: tuple[bool, str, str]):
    from vllm.config import CompilationConfig

    from fusion_hf.vllm.settings import choose_execution

    config = SimpleNamespace(
        compilation_config=CompilationConfig(**asked),
        model_config=SimpleNamespace(enforce_eager=False),
        kernel_config=SimpleNamespace(enable_jit_warmup=True),
    )
    choose_execution(config)
    compilation = config.compilation_config
    found = (config.model_config.enforce_eager, compilation.cudagraph_mode.name, compilation.mode.name)
    assert found == expected
    assert not config.kernel_config.enable_jit_warmup


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


def model_of(engine: Any) -> Any:
    return engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.get_model()


@contextmanager
def no_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An error where this package's code reads a tensor on the host, which waits for a GPU and breaks its graph."""

    def refusing(name: str, original: Any) -> Any:
        def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            caller = Path(sys._getframe(1).f_code.co_filename)
            assert OURS not in caller.parents, f"{name} in {caller}"
            return original(tensor, *args, **kwargs)

        return read

    with monkeypatch.context() as patch:
        for name in READS:
            patch.setattr(torch.Tensor, name, refusing(name, getattr(torch.Tensor, name)))
        yield


def test_decoding_reads_nothing_on_the_host(load, folder, reference, monkeypatch):
    from fusion_hf.vllm import modeling

    steps = {"prompts": 0, "decoding": 0}
    forward = modeling.VllmFusionForConditionalGeneration.forward

    def watched(model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        metadata = modeling.find_prompts.__globals__["get_forward_context"]().attn_metadata
        if metadata is None or next(iter(metadata.values())).max_query_len > 1:
            steps["prompts"] += 1
            return forward(model, *args, **kwargs)
        steps["decoding"] += 1
        with no_reads(monkeypatch):
            return forward(model, *args, **kwargs)

    monkeypatch.setattr(modeling.VllmFusionForConditionalGeneration, "forward", watched)
    assert largest_difference(reference, load(folder, max_num_seqs=5)) < TOLERANCE
    assert min(steps.values()) > 1, steps
    with pytest.raises(AssertionError, match="turns_fusion"), no_reads(monkeypatch):
        modeling.PromptParser.of(reference.config, reference.processor).read(reference_ids(reference))


def reference_ids(reference: Reference) -> list[int]:
    return reference.processor.apply_chat_template(CASES[0].messages, tokenize=True, add_generation_prompt=True)[0]


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["llama", "phi3", "mistral", "qwen2", "qwen3"])
def test_compiled_decoding_answers_as_transformers(load, tmp_path, backbone):
    """In one trace of the language model, which is all that vLLM compiles on a CPU."""
    from vllm.config import CompilationMode

    folder = write_random_model(tmp_path, backbone)
    engine = load(folder, max_num_seqs=5, **COMPILED)
    assert engine.llm_engine.vllm_config.compilation_config.mode == CompilationMode.DYNAMO_TRACE_ONCE
    assert model_of(engine).language_model.model.compiled
    assert largest_difference(Reference(folder), engine) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", TOLERANCE), ("bfloat16", HALF_TOLERANCE)])
def test_graphs_of_decoding_answer_as_no_graphs(load, folder, monkeypatch, dtype, tolerance):
    """Several rounds of growing numbers of requests, so that graphs of several sizes are recorded and replayed."""
    from vllm import SamplingParams
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

    replayed = []
    replay = ModelCudaGraphManager.run_fullgraph

    def count(manager: Any, descriptor: Any) -> Any:
        replayed.append(descriptor.num_reqs)
        return replay(manager, descriptor)

    monkeypatch.setattr(ModelCudaGraphManager, "run_fullgraph", count)
    reference = Reference(folder)
    arguments = {"dtype": dtype, "max_num_seqs": len(CASES), "gpu_memory_utilization": 0.2}
    settings = [SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=0) for _ in CASES]

    def answers(engine: Any) -> list[Any]:
        rounds = [CASES[:count] for count in (1, 5, len(CASES), 3)]
        asked = [[reference.prompt(case) for case in cases] for cases in rounds]
        outputs = [engine.generate(prompts, settings[: len(prompts)], use_tqdm=False) for prompts in asked]
        return [answer_of(output) for group in outputs for output in group]

    expected = answers(load(folder, **arguments))
    assert not replayed
    found = answers(load(folder, **arguments, **GRAPHS))
    assert len(set(replayed)) > 2, replayed
    pairs = zip(found, expected, strict=True)
    assert max(answer.difference(other) for answer, other in pairs) < tolerance
