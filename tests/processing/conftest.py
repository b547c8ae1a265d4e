"""A processor with a small, real tokenizer: the one of `fusion-nano`."""

import pytest

from fusion_hf import FusionProcessor
from fusion_hf.nano.build import build_config, build_processor
from fusion_hf.nano.word_tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def processor() -> FusionProcessor:
    tokenizer = build_tokenizer(["what color is the shape?", "red", "what shape is it?", "circle"])
    return build_processor(tokenizer, build_config(tokenizer))
