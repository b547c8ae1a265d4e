"""transformers' common suite for processors."""

import unittest
from typing import Any

import pytest
from tests.transformers_suites.not_applicable import NotApplicable
from tests.transformers_suites.suites import mixin
from tests.transformers_suites.tiny import tiny_image_processor, tiny_tokenizer

from fusion_hf import FusionImageProcessor, FusionProcessor

pytestmark = pytest.mark.slow


class ProcessorTest(NotApplicable, mixin("test_processing_common", "ProcessorTesterMixin"), unittest.TestCase):
    processor_class = FusionProcessor

    @classmethod
    def _setup_tokenizer(cls) -> Any:
        return tiny_tokenizer()

    @classmethod
    def _setup_image_processor(cls) -> FusionImageProcessor:
        return tiny_image_processor()

    @staticmethod
    def prepare_processor_dict() -> dict[str, Any]:
        return {"chat_format": "chatml", "num_image_tokens": 16, "query_len": 4}
