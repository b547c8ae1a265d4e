"""The FUSION plugin for vLLM, which finds `register` by the entry point `vllm.general_plugins` in each process.

Nothing here imports vLLM before vLLM loads the plugin. Without vLLM, the entry point is never used.
"""


def register() -> None:
    """Register FUSION with vLLM. It is safe to call this several times in a process."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers import TokenizerRegistry

    from fusion_hf.vllm.settings import ARCHITECTURE, RENDERER, FusionSettings

    if ARCHITECTURE in MODELS_CONFIG_MAP:
        return
    MODELS_CONFIG_MAP[ARCHITECTURE] = FusionSettings
    ModelRegistry.register_model(ARCHITECTURE, "fusion_hf.vllm.modeling:VllmFusionForConditionalGeneration")
    TokenizerRegistry.register(RENDERER, "vllm.tokenizers.hf", "CachedHfTokenizer")
    RENDERER_REGISTRY.register(RENDERER, "fusion_hf.vllm.rendering", "FusionRenderer")
