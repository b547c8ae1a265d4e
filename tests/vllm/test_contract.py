"""The names of vLLM that the plugin defines anew or reaches into: if a release drops one, this says which."""

import inspect

import pytest
from tests.helpers.overrides import overridden

pytestmark = pytest.mark.vllm

OVERRIDDEN = {
    "modeling:VllmFusionForConditionalGeneration": {
        "embed_input_ids",
        "embed_multimodal",
        "get_placeholder_str",
        "requires_raw_input_tokens",
    },
    "processing:FusionDummyInputsBuilder": {"get_dummy_mm_data", "get_dummy_text"},
    "processing:FusionMultiModalProcessor": {
        "_apply_hf_processor_main",
        "_get_mm_fields_config",
        "_get_prompt_updates",
        "_postprocess_prompt",
        "get_dummy_inputs",
    },
    "processing:FusionProcessingInfo": {"get_hf_config", "get_supported_mm_limits"},
    "rendering:FusionRenderer": {
        "_process_tokens",
        "_process_tokens_async",
        "_tokenize_prompt",
        "render_messages",
        "render_messages_async",
    },
    "settings:FusionSettings": {"verify_and_update_config", "verify_and_update_model_config"},
}
# of the same classes, what they use of vLLM's without defining it
USED = {
    "modeling:VllmFusionForConditionalGeneration": {"_mark_language_model", "_mark_tower_model"},
    "processing:FusionDummyInputsBuilder": {"_get_dummy_images"},
    "processing:FusionProcessingInfo": {"get_hf_processor"},
}


def load(name: str) -> type:
    from importlib import import_module

    module, _, cls = name.partition(":")
    return getattr(import_module(f"fusion_hf.vllm.{module}"), cls)


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_what_is_defined_anew_is_still_there(name: str):
    assert overridden(load(name), "vllm") == OVERRIDDEN[name]


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_vllm_still_calls_it_with_the_same_arguments(name: str):
    cls = load(name)
    for method in OVERRIDDEN[name]:
        ours = vars(cls)[method]
        base = next(base for base in cls.__mro__[1:] if method in vars(base))
        theirs = vars(base)[method]
        if callable(getattr(cls, method)):
            ours, theirs = (getattr(function, "__func__", function) for function in (ours, theirs))
            assert takes(ours, theirs), f"{method}{inspect.signature(ours)}, in vLLM {inspect.signature(theirs)}"


def takes(ours: object, theirs: object) -> bool:
    """Whether ours takes every argument of theirs, by the same name."""
    own = inspect.signature(ours).parameters
    kinds = {parameter.kind for parameter in own.values()}
    if {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds:
        return True
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    given = [name for name, each in inspect.signature(theirs).parameters.items() if each.kind not in variable]
    return given == [name for name, each in own.items() if each.kind not in variable]


@pytest.mark.parametrize("name", USED)
def test_what_is_used_is_still_there(name: str):
    assert {used for used in USED[name] if not hasattr(load(name), used)} == set()


def test_the_model_has_what_vllm_asks_of_one():
    from vllm.model_executor.models.interfaces import supports_multimodal
    from vllm.model_executor.models.interfaces_base import is_text_generation_model

    model = load("modeling:VllmFusionForConditionalGeneration")
    assert supports_multimodal(model) and is_text_generation_model(model)


def test_attention_still_tells_where_requests_begin():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

    assert {"max_query_len", "query_start_loc", "seq_lens"} <= set(CPUAttentionMetadata.__annotations__)


def test_the_tables_that_register_writes_to_are_still_there():
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import fusion_hf.vllm
    from fusion_hf.vllm.settings import ARCHITECTURE, FusionSettings

    fusion_hf.vllm.register()
    assert MODELS_CONFIG_MAP[ARCHITECTURE] is FusionSettings


def test_a_lost_name_is_found():
    from vllm.renderers.hf import HfRenderer

    lost = type("Lost", (HfRenderer,), {"_process_tokens": None, "_no_such_method": None})
    assert overridden(lost, "vllm") == {"_process_tokens"}
