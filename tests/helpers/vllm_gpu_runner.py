"""A pytest plugin: vLLM with the runner that it has on GPUs, whose Triton kernels an interpreter computes on a CPU."""

import os
from types import SimpleNamespace

# both are read when vLLM is imported
os.environ |= {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}

import triton.backends

# vLLM for CPUs uses Triton where it has such a backend, of which it asks no more than this
triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
