"""vLLM on the CPU, in the tests' own process: one engine per module, since loading one takes 10 to 30 s."""

import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


@pytest.fixture(scope="session", autouse=True)
def environment() -> Iterator[None]:
    """What vLLM reads when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def load(environment: None) -> Iterator[Callable[..., Any]]:
    """Makes engines in float32 with the settings that FUSION needs, where the arguments do not change them."""
    from vllm import LLM

    from fusion_hf.vllm.settings import ENGINE_ARGUMENTS

    engines = []

    def make(folder: Any, **arguments: Any) -> LLM:
        defaults = {
            "dtype": "float32",
            "distributed_executor_backend": "uni",
            "max_model_len": 512,
            "max_num_batched_tokens": 1024,
            "disable_log_stats": True,
        }
        engines.append(LLM(str(folder), **(defaults | ENGINE_ARGUMENTS | arguments)))
        # GPUs have the other one, for which `tests.helpers.vllm_gpu_runner` has asked on a CPU
        is_wanted = "VLLM_USE_V2_MODEL_RUNNER" in os.environ or torch.cuda.is_available()
        assert engines[-1].llm_engine.vllm_config.use_v2_model_runner == is_wanted
        return engines[-1]

    yield make
    while engines:
        engines.pop().llm_engine.engine_core.shutdown()
    gc.collect()
