"""What is refused at start, and, with the refusal taken away, what would have gone wrong."""

import sys
from dataclasses import fields, is_dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.helpers.vllm_models import CASES, QUESTIONS, Case, Reference, answer_of, write_random_model

pytestmark = pytest.mark.vllm
CONVERSATION = CASES[6]  # one image, three questions
SEVERAL = [CASES[0], CASES[7], CASES[10], CONVERSATION]
TOLERANCE = 1e-4
CHUNK = 24  # tokens; shorter than each prompt of `SEVERAL`
CHUNKED = {"enable_chunked_prefill": True, "max_num_batched_tokens": CHUNK, "max_num_seqs": 2}
THRESHOLD = {"long_prefill_token_threshold": CHUNK}
CACHED = {"enable_prefix_caching": True, "block_size": 32}
STORE = "shared_storage_path"
TRANSFER = {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": {STORE: "unused"}}
STORED = {"kv_transfer_config": TRANSFER}
UNSAFE = {
    "enable_chunked_prefill": CHUNKED,
    "enable_prefix_caching": CACHED,
    "max_num_batched_tokens": {"max_num_batched_tokens": CHUNK, "max_num_seqs": 2},
    "long_prefill_token_threshold": THRESHOLD,
    "async_scheduling": {"async_scheduling": True},
    "cudagraph_mode": {"compilation_config": {"cudagraph_mode": "PIECEWISE"}},
    "kv_transfer_config": STORED,
    "attention_backend": {"attention_backend": "FLASHINFER"},
    "`mode` must be .*got 'STOCK_TORCH_COMPILE'": {"compilation_config": {"mode": 1}},
    "speculative_config": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def reference(folder):
    return Reference(folder)


def ask(engine: Any, reference: Reference, cases: list[Any] = SEVERAL, at_once: int = 1) -> list[float]:
    """The differences to the reference's log-probabilities; the prompts come `at_once`, group after group."""
    from vllm import SamplingParams

    differences = []
    for group in batched(cases, at_once):
        settings = [
            SamplingParams(temperature=0, max_tokens=case.max_tokens, logprobs=0, detokenize=False) for case in group
        ]
        outputs = engine.generate([reference.prompt(case) for case in group], settings, use_tqdm=False)
        pairs = zip(group, outputs, strict=True)
        differences += [reference.answer(case).difference(answer_of(output)) for case, output in pairs]
    return differences


def batched(cases: list[Any], size: int) -> list[list[Any]]:
    return [cases[start : start + size] for start in range(0, len(cases), size)]


def without_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM as it is without the check at start."""
    from fusion_hf.vllm.settings import FusionSettings

    monkeypatch.setattr(FusionSettings, "verify_and_update_config", staticmethod(lambda config: None))


def without_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model as it is without the check of each step: it changes what it finds of a prompt."""
    from fusion_hf.vllm import latent_updates, modeling

    def find(parser, input_ids):
        metadata = latent_updates.get_forward_context().attn_metadata
        if metadata is None:
            return []
        starts = next(iter(metadata.values())).query_start_loc.tolist()
        found = []
        for start, stop in pairwise(starts):
            try:
                layout = parser.read(input_ids[start:stop].tolist())
            except ValueError:
                continue
            if layout.query_len:
                found.append(latent_updates.StepPrompt(start, layout))
        return found

    def make(prompts, contexts, window_size, *others):
        images = [prompt for prompt in prompts if prompt.layout.num_image_tokens]
        # a piece may hold a part of an image's features
        is_whole = len(images) == len(contexts) and all(
            len(context) >= prompt.layout.query_len * window_size**2
            for prompt, context in zip(images, contexts, strict=True)
        )
        given = (prompts, contexts) if is_whole else ([], [])
        return latent_updates.make_updates(*given, window_size, *others)

    monkeypatch.setattr(modeling, "find_prompts", find)
    monkeypatch.setattr(modeling, "make_updates", make)


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_settings_are_refused_at_start(load, folder, name):
    with pytest.raises(ValueError, match=name) as error:
        load(folder, **UNSAFE[name])
    assert "must be" in str(error.value) or "max_model_len" in str(error.value)


def test_attention_that_is_allowed_says_where_requests_begin(environment):
    """Their modules can be imported on a CPU; what they say to a model cannot be seen there."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from fusion_hf.vllm.settings import BACKENDS

    for name in BACKENDS:
        module = sys.modules[AttentionBackendEnum[name].get_class().__module__]
        (metadata,) = (
            kind
            for key, kind in vars(module).items()
            if key.endswith("Metadata") and is_dataclass(kind) and kind.__module__ == module.__name__
        )
        assert {"max_query_len", "query_start_loc", "seq_lens"} <= {field.name for field in fields(metadata)}, name


@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "cache", "expected"),
    [
        ("cuda", 100, torch.bfloat16, "auto", "FLASH_ATTN"),  # where vLLM would take FlashInfer
        ("cuda", 90, torch.float16, "auto", "FLASH_ATTN"),
        ("cuda", 90, torch.bfloat16, "fp8", "TRITON_ATTN"),
        ("cuda", 90, torch.float32, "auto", "TRITON_ATTN"),
        ("cuda", 75, torch.float16, "auto", "TRITON_ATTN"),  # which FlashAttention does not know
        ("rocm", 94, torch.bfloat16, "auto", "TRITON_ATTN"),
        ("cpu", 0, torch.float32, "auto", None),
    ],
)
def test_attention_on_gpus(environment, monkeypatch, platform, capability, dtype, cache, expected):
    from fusion_hf.vllm import settings

    described = SimpleNamespace(
        is_cuda=lambda: platform == "cuda",
        is_rocm=lambda: platform == "rocm",
        has_device_capability=lambda least: capability >= least,
    )
    monkeypatch.setattr(settings, "current_platform", described)
    config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=dtype), cache_config=SimpleNamespace(cache_dtype=cache)
    )
    backend = settings.choose_backend(config)
    assert (backend.name if backend else None) == expected
    assert backend is None or backend.name in settings.BACKENDS


@pytest.mark.parametrize(
    ("unsafe", "at_once"),
    [
        pytest.param(CHUNKED, 1, id="chunked prefill, small budget"),
        pytest.param(THRESHOLD, 2, id="long prefill threshold"),  # does nothing to a prompt alone
        pytest.param(CACHED, 1, id="prefix caching"),
    ],
)
def test_a_prompt_in_pieces_is_noticed_and_would_be_answered_wrongly(
    load, folder, reference, unsafe, at_once, monkeypatch
):
    safe = load(folder)
    assert max(ask(safe, reference, at_once=at_once)) < TOLERANCE
    without_refusal(monkeypatch)
    # the same conversation a turn longer shares its beginning with the one before
    cases = [CASES[0], CONVERSATION, *SEVERAL]
    with pytest.raises(RuntimeError, match=r"A prompt (must arrive as a whole|arrived in pieces)"):
        ask(load(folder, **unsafe), reference, cases, at_once)
    without_check(monkeypatch)
    assert max(ask(load(folder, **unsafe), reference, cases, at_once)) > 100 * TOLERANCE


def test_keys_from_a_store_are_noticed(load, folder, reference, monkeypatch, tmp_path, request):
    """Two texts that differ in their last words alone."""
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    monkeypatch.setitem(TRANSFER["kv_connector_extra_config"], STORE, str(tmp_path))
    first, second = (Case([f"{' '.join(QUESTIONS * 3)} {last}"], color=None) for last in QUESTIONS[:2])
    without_refusal(monkeypatch)
    request.addfinalizer(ensure_kv_transfer_shutdown)  # it is the process's, and the next engine has none
    engine = load(folder, block_size=32, **STORED)
    assert max(ask(engine, reference, [first])) < TOLERANCE
    with pytest.raises(RuntimeError, match=r"A prompt (must arrive as a whole|arrived in pieces)"):
        ask(engine, reference, [second])


def test_a_preempted_prompt_is_processed_again_as_a_whole(load, folder, reference, monkeypatch):
    """So few blocks that requests have to give their places up while they are answered."""
    from vllm import SamplingParams
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted = []
    preempt = Scheduler._preempt_request

    def count(scheduler, request, *args, **kwargs):
        preempted.append(request.num_output_tokens)
        return preempt(scheduler, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", count)
    engine = load(folder, num_gpu_blocks_override=20, block_size=32)
    settings = SamplingParams(temperature=0, max_tokens=96, ignore_eos=True, logprobs=0, detokenize=False)
    prompts = [reference.prompt(CASES[number]) for number in (0, 2, 9, 10)]
    together = engine.generate(prompts, settings, use_tqdm=False)
    assert max(preempted) > 1, preempted
    for prompt, output in zip(prompts, together, strict=True):
        (alone,) = engine.generate([prompt], settings, use_tqdm=False)
        assert answer_of(output).difference(answer_of(alone)) < TOLERANCE
