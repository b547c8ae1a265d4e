"""Apply the settings that FUSION requires in vLLM, and reject those that would give wrong answers."""

from typing import Any

import torch
from vllm.config import CompilationMode, ModelConfig, VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

ARCHITECTURE, RENDERER = "FusionForConditionalGeneration", "fusion"  # names in vLLM's registries
# arguments of `vllm.LLM`, which are also flags of vLLM's server
ENGINE_ARGUMENTS: dict[str, Any] = {
    "enable_chunked_prefill": False,
    "enable_prefix_caching": False,
    "async_scheduling": False,
}
# Attention backends whose metadata says where requests start, which `find_prompts` needs. FlashInfer, which vLLM
# prefers on GPUs of compute capability 10, does not.
BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "FLEX_ATTENTION", "ROCM_ATTN", "TRITON_ATTN")
FLASH_CAPABILITY = 80  # minimum compute capability of FlashAttention, 8.0 in vLLM's notation
REASON = "FUSION's samplers rewrite latent tokens from the end of the prompt, so a prompt must be processed as a whole"
GRAPHS = (CUDAGraphMode.NONE, CUDAGraphMode.FULL_DECODE_ONLY)
# `STOCK_TORCH_COMPILE` would compile the whole model, prompts included
MODES = (CompilationMode.NONE, CompilationMode.DYNAMO_TRACE_ONCE, CompilationMode.VLLM_COMPILE)
HOST = "FUSION finds prompts on the host, so only steps without prompts can be captured or compiled"
UNTOLD = "FUSION's samplers must know where prompts start in a step, which other attention backends do not report"


class FusionSettings(VerifyAndUpdateConfig):
    """Hooks that vLLM calls while it makes its configuration, before anything is loaded."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Set the renderer, and extend the vocabulary for the placeholders."""
        if model_config.tokenizer_mode in ("auto", "hf"):
            model_config.tokenizer_mode = RENDERER
        config = model_config.hf_config
        # penalties and prompt log-probabilities index a row of logits by the ids of the prompt
        architecture = model_config.model_arch_config
        architecture.vocab_size = max(architecture.vocab_size, config.image_token_id + 1, config.latent_token_id + 1)

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Raise a `ValueError` for settings that would split prompts or capture them in a graph."""
        scheduler, longest = vllm_config.scheduler_config, vllm_config.model_config.max_model_len
        budget = scheduler.max_num_batched_tokens
        threshold = scheduler.long_prefill_token_threshold
        prefix_caching = vllm_config.cache_config.enable_prefix_caching
        speculative, transfer = vllm_config.speculative_config, vllm_config.kv_transfer_config
        attention = vllm_config.attention_config
        attention.backend = attention.backend or choose_backend(vllm_config)
        chosen = {backend.name for backend in (attention.backend, *attention.backend_per_kind.values()) if backend}
        _require(not scheduler.enable_chunked_prefill, "enable_chunked_prefill", True, "False")
        _require(not prefix_caching, "enable_prefix_caching", True, "False")
        _require(budget >= longest, "max_num_batched_tokens", budget, f"max_model_len = {longest} or more")
        _require(threshold == 0, "long_prefill_token_threshold", threshold, "0")
        _require(not scheduler.async_scheduling, "async_scheduling", True, "False")
        scheduler.async_scheduling = False  # otherwise vLLM would enable it for GPUs later
        _require(speculative is None, "speculative_config", speculative, "None")
        _require(transfer is None, "kv_transfer_config", transfer, "None")
        _require(chosen <= set(BACKENDS), "attention_backend", ", ".join(sorted(chosen)), ", ".join(BACKENDS), UNTOLD)
        choose_execution(vllm_config)


def choose_execution(vllm_config: VllmConfig) -> None:
    """
    Disable graphs and compilation, unless `compilation_config` enables them.

    `cudagraph_mode` `FULL_DECODE_ONLY` captures decoding steps as graphs, and `mode` compiles the language model for
    steps without prompts. By default, vLLM would apply both to prompts as well.

    Args:
        vllm_config: the configuration of vLLM, changed in place.

    Raises:
        ValueError: if another mode is set.
    """
    compilation = vllm_config.compilation_config
    graphs, mode = compilation.cudagraph_mode, compilation.mode
    _require(graphs in (None, *GRAPHS), "cudagraph_mode", _name(graphs), ", ".join(map(_name, GRAPHS)), HOST)
    _require(mode in (None, *MODES), "mode", _name(mode), ", ".join(map(_name, MODES)), HOST)
    compilation.cudagraph_mode = graphs or CUDAGraphMode.NONE
    compilation.mode = mode or CompilationMode.NONE
    if compilation.cudagraph_mode == CUDAGraphMode.NONE and compilation.mode == CompilationMode.NONE:
        vllm_config.model_config.enforce_eager = True
    # vLLM warms up with random ids, which are not chats
    vllm_config.kernel_config.enable_jit_warmup = False


def choose_backend(vllm_config: VllmConfig) -> AttentionBackendEnum | None:
    """
    Return one of BACKENDS for a GPU. Elsewhere return None, since vLLM chooses one of them itself.

    Args:
        vllm_config: the configuration of vLLM.
    """
    if current_platform.is_rocm():
        return AttentionBackendEnum.TRITON_ATTN
    if not current_platform.is_cuda():
        return None
    half = vllm_config.model_config.dtype in (torch.float16, torch.bfloat16)
    plain = half and vllm_config.cache_config.cache_dtype == "auto"
    if plain and current_platform.has_device_capability(FLASH_CAPABILITY):
        return AttentionBackendEnum.FLASH_ATTN
    return AttentionBackendEnum.TRITON_ATTN


def _name(mode: CUDAGraphMode | CompilationMode | None) -> str:
    return "None" if mode is None else mode.name


def _require(condition: bool, name: str, value: object, allowed: str, reason: str = REASON) -> None:
    if not condition:
        flag = name.replace("_", "-")
        advice = f" (--no-{flag})" if value is True else ""
        raise ValueError(f"`{name}` must be {allowed}{advice} for FUSION, got {value!r}. {reason}.")
