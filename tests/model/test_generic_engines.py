"""An engine that runs any model of transformers in a loop of its own is refused: it would drop the samplers."""

import pytest
from tests.helpers.tiny import tiny_config
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fusion_hf import FusionForConditionalGeneration, FusionModel

VLLM = "vllm"  # as its transformers backend calls its attention


@pytest.mark.parametrize("cls", [FusionModel, FusionForConditionalGeneration])
def test_vllms_attention_is_refused_even_where_it_is_registered(cls, monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, VLLM, sdpa_attention_forward)
    config = tiny_config()
    cls(config)
    config.text_config._attn_implementation = VLLM
    with pytest.raises(ValueError, match=r"without FUSION's samplers.*fusion_hf\[vllm\]"):
        cls(config)


def test_transformers_says_that_generic_backends_are_not_for_it():
    assert not FusionForConditionalGeneration.is_backend_compatible()
