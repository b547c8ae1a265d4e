"""What flex attention returns on a GPU, where it is not eager's weights: the tower has to look past it."""

import pytest
import torch
from tests.helpers.tiny import QUERY_LEN, Sample, make_inputs, tiny_config, tiny_model
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.siglip.modeling_siglip import ALL_ATTENTION_FUNCTIONS


@pytest.mark.parametrize("early", ["uniform", "uniform_padded", "masked"])
def test_a_normalizer_of_each_row_is_no_weights(early, monkeypatch):
    config = tiny_config(early_text_attention=early)
    model = tiny_model(config)
    inputs = make_inputs(config, [Sample(questions=[5]), Sample(questions=[3], seed=1)], QUERY_LEN)
    with torch.no_grad():
        expected = model(**inputs).logits

        def with_normalizer(*args, **kwargs):
            output, _ = sdpa_attention_forward(*args, **kwargs)
            return output, output.new_zeros(output.shape[0], output.shape[2], output.shape[1])  # (B, heads, rows)

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", with_normalizer)
        torch.testing.assert_close(model(**inputs).logits, expected)
