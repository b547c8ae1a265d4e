"""transformers' common suites for models and configurations."""

import unittest
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
from transformers.models.auto import modeling_auto

from fusion_hf import FusionConfig, FusionForConditionalGeneration, FusionModel
from tests.transformers_suites.suites import load, mixin
from tests.transformers_suites.tiny import FusionModelTester


pytestmark = pytest.mark.slow


class ModelSuite(mixin("test_modeling_common", "ModelTesterMixin")):
    all_model_classes = (FusionModel, FusionForConditionalGeneration)
    additional_model_inputs: ClassVar = ["pixel_values", "instruct_input_ids", "prompt_end_positions"]
    test_can_init_all_missing_weights_before_2023 = True
    _is_composite = True
    backbone: str

    def setUp(self) -> None:
        self.model_tester = FusionModelTester(self, self.backbone)
        # the suites find out by these tables, which list transformers' own classes, what each class is for
        for name, model in (
            ("MODEL_MAPPING_NAMES", "FusionModel"),
            ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "FusionForConditionalGeneration"),
        ):
            patcher = patch.dict(getattr(modeling_auto, name), {"fusion": model})
            patcher.start()
            self.addCleanup(patcher.stop)


class LlamaModelTest(ModelSuite, unittest.TestCase):
    backbone = "llama"

    def test_config(self) -> None:
        tester: Any = load("test_configuration_common").ConfigTester(
            self, FusionConfig, has_text_modality=False, common_properties=["text_config", "vision_config"]
        )
        tester.run_common_tests()
