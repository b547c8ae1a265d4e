"""What FUSION needs of vLLM's settings, and a refusal at start of what would give wrong answers."""

from typing import Any

from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from fusion_hf.vllm import RENDERER

# arguments of `vllm.LLM` and, as flags, of vLLM's server
ENGINE_ARGUMENTS: dict[str, Any] = {
    "enable_chunked_prefill": False,
    "enable_prefix_caching": False,
    "async_scheduling": False,
}
REASON = "FUSION's samplers rewrite latent tokens from the end of the prompt, so a prompt must be processed as a whole"


class FusionSettings(VerifyAndUpdateConfig):
    """Hooks that vLLM calls while it makes its configuration, before anything is loaded."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Our renderer, room in the vocabulary for the placeholders, and no compilation."""
        if model_config.tokenizer_mode in ("auto", "hf"):
            model_config.tokenizer_mode = RENDERER
        config = model_config.hf_config
        # penalties and prompt log-probabilities index a row of logits by the prompt's ids
        architecture = model_config.model_arch_config
        architecture.vocab_size = max(architecture.vocab_size, config.image_token_id + 1, config.latent_token_id + 1)
        # the rewriting reads positions on the host, which no captured graph may do
        model_config.enforce_eager = True

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Raise a `ValueError` for settings by which a prompt could arrive in pieces."""
        scheduler, longest = vllm_config.scheduler_config, vllm_config.model_config.max_model_len
        budget = scheduler.max_num_batched_tokens
        threshold = scheduler.long_prefill_token_threshold
        prefix_caching = vllm_config.cache_config.enable_prefix_caching
        speculative = vllm_config.speculative_config
        _require(not scheduler.enable_chunked_prefill, "enable_chunked_prefill", True, "False")
        _require(not prefix_caching, "enable_prefix_caching", True, "False")
        _require(budget >= longest, "max_num_batched_tokens", budget, f"max_model_len = {longest} or more")
        _require(threshold == 0, "long_prefill_token_threshold", threshold, "0")
        _require(not scheduler.async_scheduling, "async_scheduling", True, "False")
        scheduler.async_scheduling = False  # where nothing is said, vLLM would choose it for GPUs later
        _require(speculative is None, "speculative_config", speculative, "None")


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        flag = name.replace("_", "-")
        advice = f" (--no-{flag})" if value is True else ""
        raise ValueError(f"{name} is {value!r}; allowed for FUSION: {allowed}{advice}. {REASON}.")
