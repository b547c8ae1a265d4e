"""transformers' common suite for image processors."""

import subprocess
import unittest
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import pytest
from tests.transformers_suites.model_tester import IMAGE_SIZE, TILES
from tests.transformers_suites.not_applicable import NotApplicable
from tests.transformers_suites.suites import load, mixin
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from fusion_hf import FusionImageProcessor

pytestmark = pytest.mark.slow
run_process = subprocess.run


@dataclass
class ImageProcessorTester:
    """What the suite asks for; its attributes are its interface."""

    batch_size: int = 7
    num_channels: int = 3
    min_resolution: int = 30
    max_resolution: int = 400

    def prepare_image_processor_dict(self) -> dict[str, Any]:
        return {
            "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            "image_mean": [0.5, 0.4, 0.3],
            "image_std": [0.5, 0.6, 0.7],
            "exif_transpose": False,
            "max_image_pixels": 1_000_000,
        }

    def prepare_image_inputs(self, **kwargs: Any) -> list[Any]:
        sizes = {name: getattr(self, name) for name in ("batch_size", "min_resolution", "max_resolution")}
        prepare = load("test_image_processing_common").prepare_image_inputs
        return prepare(num_channels=self.num_channels, **sizes, **kwargs)

    def prepare_processor_inputs(self, **kwargs: Any) -> dict[str, Any]:
        return {"images": self.prepare_image_inputs(**kwargs)}

    def expected_output_image_shape(self, images: list[Any]) -> tuple[int, ...]:
        return TILES, 3, IMAGE_SIZE, IMAGE_SIZE


class ImageProcessorTest(
    NotApplicable, mixin("test_image_processing_common", "ImageProcessingTestMixin"), unittest.TestCase
):
    image_processor_tester_class = ImageProcessorTester
    image_processing_classes: ClassVar = {"pil": FusionImageProcessor}
    test_cast_dtype = True

    def setUp(self) -> None:
        unittest.TestCase.setUp(self)  # the suite's own looks our classes up in transformers' tables
        self.skip_if_not_applicable()
        self.image_processor_tester = ImageProcessorTester()
        patchers = (
            # processes that the suite starts know transformers' own classes only
            patch("subprocess.run", run_with_package),
            # transformers 5.17 exports a placeholder where torchvision is missing
            patch.object(load("test_image_processing_common"), "AutoImageProcessor", AutoImageProcessor),
        )
        for patcher in patchers:
            patcher.start()
            self.addCleanup(patcher.stop)

    @property
    def image_processor_dict(self) -> dict[str, Any]:
        return self.image_processor_tester.prepare_image_processor_dict()


def run_with_package(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess:
    """Run `python -c SCRIPT ...` with FUSION's classes registered."""
    python, option, script, *arguments = command
    return run_process([python, option, f"import fusion_hf\n{script}", *arguments], **kwargs)


@pytest.mark.parametrize("input_data_format", ["channels_first", "channels_last"])
def test_fourth_channel_is_dropped(input_data_format: str) -> None:
    """In place of the suite's test of four channels, which the tower cannot read."""
    processor = FusionImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    image = np.random.default_rng(0).integers(0, 256, (40, 100, 4), dtype=np.uint8)
    expected = processor(image[..., :3], return_tensors="np").pixel_values
    if input_data_format == "channels_first":
        image = image.transpose(2, 0, 1)
    np.testing.assert_array_equal(processor(image, return_tensors="np").pixel_values, expected)
