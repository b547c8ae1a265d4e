"""FUSION as a plugin of vLLM, which finds `register` by the entry point `vllm.general_plugins` in each process.

Nothing here imports vLLM before vLLM asks for it: where vLLM is absent, the entry point is never read.
"""


def register() -> None:
    """Tell vLLM's registries about FUSION; once per process, however often it is called."""
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
