"""transformers' common suites for models and configurations."""

import unittest
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
import torch
from tests.transformers_suites.model_tester import (
    BEHIND_VOCAB,
    SMALL_IDS,
    FusionModelTester,
    suite_config,
    suite_inputs,
)
from tests.transformers_suites.not_applicable import NOT_APPLICABLE, NotApplicable
from tests.transformers_suites.suites import load, mixin
from transformers.models.auto import modeling_auto

from fusion_hf import FusionConfig, FusionForConditionalGeneration, FusionModel
from fusion_hf.model.modeling_fusion_vision import FusionVisionLayer
from fusion_hf.training.gradient_checkpointing import enable_checkpointing

pytestmark = [
    pytest.mark.slow,
    # one of the suite's tests gives the older name, and looks for the warning
    pytest.mark.filterwarnings("default:`past_key_values` is deprecated:FutureWarning"),
]

# Placeholders lie behind the vocabulary, so they have no embedding that could be given in place of their ids.
TEXT_ONLY = ("test_inputs_embeds", "test_inputs_embeds_matches_input_ids")
# These clamp ids to a vocabulary that they have cut, and would turn placeholders into words.
WITH_SMALL_PLACEHOLDERS = ("test_resize_tokens_embeddings", "test_resize_embeddings_untied")


class ModelSuite(NotApplicable, mixin("test_modeling_common", "ModelTesterMixin")):
    all_model_classes = (FusionModel, FusionForConditionalGeneration)
    additional_model_inputs: ClassVar = ["pixel_values", "instruct_input_ids", "prompt_end_positions"]
    test_can_init_all_missing_weights_before_2023 = True
    _is_composite = True
    backbone: str

    def setUp(self) -> None:
        super().setUp()
        name = self._testMethodName
        placeholders = SMALL_IDS if name in WITH_SMALL_PLACEHOLDERS else BEHIND_VOCAB
        self.model_tester = FusionModelTester(self, self.backbone, placeholders, text_only=name in TEXT_ONLY)
        # the suites find out by these tables, which list transformers' own classes, what each class is for
        for table, model in (
            ("MODEL_MAPPING_NAMES", "FusionModel"),
            ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "FusionForConditionalGeneration"),
        ):
            patcher = patch.dict(getattr(modeling_auto, table), {"fusion": model})
            patcher.start()
            self.addCleanup(patcher.stop)


class LlamaModelTest(ModelSuite, unittest.TestCase):
    backbone = "llama"

    def test_config(self) -> None:
        tester: Any = load("test_configuration_common").ConfigTester(
            self, FusionConfig, has_text_modality=False, common_properties=["text_config", "vision_config"]
        )
        tester.run_common_tests()


class Phi3ModelTest(ModelSuite, unittest.TestCase):
    backbone = "phi3"


class Qwen2ModelTest(ModelSuite, unittest.TestCase):
    backbone = "qwen2"


def gradients(model: FusionForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"].clamp(max=model.config.text_config.vocab_size - 1)).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("backbone", ["llama", "phi3", "qwen2"])
def test_checkpointing_keeps_gradients(backbone: str, use_reentrant: bool) -> None:
    """In place of the suite's tests of checkpointing, and stricter: they compare only which gradients are not zero."""
    torch.manual_seed(0)
    model = FusionForConditionalGeneration(suite_config(backbone, sampler_layers=[0, 1])).train()
    inputs = suite_inputs(batch_size=2, turns=2, answer=3)
    expected = gradients(model, inputs)
    enable_checkpointing(model, use_reentrant)
    calls = []
    layer = next(module for module in model.modules() if isinstance(module, FusionVisionLayer))
    layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    found = gradients(model, inputs)
    assert len(calls) == 4  # overview and tiles, each computed twice: the suite's tests expect one call of a layer
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_the_table_names_tests_of_the_suites() -> None:
    suites = [
        mixin("test_modeling_common", "ModelTesterMixin"),
        mixin("test_image_processing_common", "ImageProcessingTestMixin"),
        mixin("test_processing_common", "ProcessorTesterMixin"),
    ]
    assert [name for name in NOT_APPLICABLE if not any(hasattr(suite, name) for suite in suites)] == []
