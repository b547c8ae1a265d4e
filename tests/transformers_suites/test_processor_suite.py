"""transformers' common suite for processors."""

import unittest
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version
from PIL import Image
from tests.transformers_suites.model_tester import byte_tokenizer, suite_image_processor
from tests.transformers_suites.not_applicable import NotApplicable
from tests.transformers_suites.suites import mixin

from fusion_hf import FusionImageProcessor, FusionProcessor

pytestmark = pytest.mark.slow
PROCESSOR_VALUES = {"chat_format": "chatml", "num_image_tokens": 16, "query_len": 4}


class ProcessorTest(NotApplicable, mixin("test_processing_common", "ProcessorTesterMixin"), unittest.TestCase):
    processor_class = FusionProcessor

    @classmethod
    def _setup_tokenizer(cls) -> Any:
        return byte_tokenizer()

    @classmethod
    def _setup_image_processor(cls) -> FusionImageProcessor:
        return suite_image_processor()

    @staticmethod
    def prepare_processor_dict() -> dict[str, Any]:
        return dict(PROCESSOR_VALUES)


def test_processor_files_survive_loading(tmp_path: Path) -> None:
    """In place of the suite's comparison of processors, one of what they save."""
    first, second = tmp_path / "first", tmp_path / "second"
    saved = FusionProcessor(suite_image_processor(), byte_tokenizer(), **PROCESSOR_VALUES)
    saved.save_pretrained(first)
    loaded = FusionProcessor.from_pretrained(first)
    assert vars(saved).keys() - vars(loaded).keys() == {"auto_map"}  # what the suite's test stumbles over
    loaded.save_pretrained(second)
    names = {path.name for path in first.iterdir()}
    assert names == {path.name for path in second.iterdir()}
    for name in names - {"tokenizer_config.json"}:  # to which transformers adds how it was loaded
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_image_tokens_of_a_batch_are_counted_without_it() -> None:
    """In place of the suite's count, which goes on to two images in a prompt."""
    processor = FusionProcessor(suite_image_processor(), byte_tokenizer(), **PROCESSOR_VALUES)
    sizes = [(100, 100), (300, 100), (500, 30), (213, 167)]  # height, width
    inputs = processor(
        [Image.new("RGB", (width, height)) for height, width in sizes],
        ["<image>\nwhat is it?", "what?<image>", "<image>", "<image>\nand a longer question?"],
        padding=True,
        return_mm_token_type_ids=True,
        return_tensors="pt",
    )
    counted = processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens
    assert inputs["mm_token_type_ids"].sum(-1).tolist() == counted == [PROCESSOR_VALUES["num_image_tokens"]] * 4


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="older versions shift the mask by the expanded image"
)
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_assistant_mask_of_a_conversation_with_an_image(padding_side: str) -> None:
    """In place of the suite's conversations of three images."""
    processor = FusionProcessor(suite_image_processor(), byte_tokenizer(), **PROCESSOR_VALUES)
    image = {"type": "image", "image": Image.new("RGB", (30, 20))}
    later = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "it is"}]
    question = {"role": "user", "content": [image, {"type": "text", "text": "what?"}]}
    inputs = processor.apply_chat_template(
        [[question, {"role": "assistant", "content": "a red one"}, *later], later],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": padding_side},
    )
    pairs = zip(inputs["input_ids"], inputs["assistant_masks"].bool(), strict=True)
    said = [processor.tokenizer.decode(ids[mask]) for ids, mask in pairs]
    assert said == ["a red one<|im_end|>it is<|im_end|>", "it is<|im_end|>"]
