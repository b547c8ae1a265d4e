"""vLLM's log-probabilities are those of our transformers model, for every kind of prompt in one batch."""

import pytest
from tests.helpers.vllm_models import Reference, largest_difference, write_random_model

pytestmark = pytest.mark.vllm
TOLERANCE = 1e-4
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(16)],
    "long_factor": [2.0 + i for i in range(16)],
}
# backbone -> further settings; phi3's placeholders lie behind its vocabulary
MODELS = {
    "llama": {},
    "llama, reduced grid": {"image_token_grid": 3},
    "llama, padded means": {"early_text_attention": "uniform_padded"},
    "llama, masked": {"early_text_attention": "masked"},
    "llama, tied": {"tie_word_embeddings": True},
    "phi3": {
        "text": {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 512, "num_key_value_heads": 2}
    },
    "mistral": {"text": {"sliding_window": None}},
    "qwen2": {},
    "qwen3": {},
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory, load):
    """The reference and the engine of one model. So few requests at a time that prompts meet decodes."""
    folder = tmp_path_factory.mktemp("model")
    write_random_model(folder, request.param.split(",")[0], **MODELS[request.param])
    return Reference(folder), load(folder, max_num_seqs=5)


def test_every_prompt_in_one_batch(pair):
    assert largest_difference(*pair) < TOLERANCE
