"""Convert an image and its question to the inputs of the model's `embed_multimodal`."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdate,
)

from fusion_hf.model.configuration_fusion import NUM_TILES, FusionConfig
from fusion_hf.model.image_opening_fusion import identify_image
from fusion_hf.model.processing_fusion import IMAGE_TOKEN

IMAGE = "image"
DIGEST_BYTES = 16


class FusionProcessingInfo(BaseProcessingInfo):
    def get_hf_config(self) -> FusionConfig:
        return self.ctx.get_hf_config(FusionConfig)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {IMAGE: 1}


class FusionDummyInputsBuilder(BaseDummyInputsBuilder[FusionProcessingInfo]):
    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return IMAGE_TOKEN * mm_counts.get(IMAGE, 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]) -> Any:
        size = self.info.get_hf_config().vision_config.image_size
        overrides = mm_options.get(IMAGE)
        count = mm_counts.get(IMAGE, 0)
        return {IMAGE: self._get_dummy_images(width=size, height=size, num_images=count, overrides=overrides)}


class FusionMultiModalProcessor(BaseMultiModalProcessor[FusionProcessingInfo]):
    """
    Process an image. The ids of the question and the numbers of tokens are processor arguments, which vLLM
    hashes with the image.
    """

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> ProcessorInputs:
        """Return the largest possible image, with which vLLM measures memory."""
        inputs = super().get_dummy_inputs(*args, **kwargs)
        config = self.info.get_hf_config()
        inputs.hf_processor_mm_kwargs = {
            "instruct_input_ids": [config.instruct_pad_token_id + 1],
            "query_len": max(config.query_len, *config.query_lens),
            "image_token_grid": config.num_patches_per_side,
            "image_digest": [0] * DIGEST_BYTES,
        }
        return inputs

    def _apply_hf_processor_main(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        images = [_as_sent(item) for items in mm_items.values() for item in items.data]
        if not images:
            return BatchFeature()
        processor = self.info.get_hf_processor().image_processor
        pixel_values = torch.from_numpy(np.asarray(processor(images, return_tensors="np")["pixel_values"]))
        pixel_values = pixel_values.to(self.info.ctx.model_config.dtype)
        values = {name: torch.tensor(value) for name, value in hf_kwargs.items()}
        values = {name: value.expand(len(images), *value.shape) for name, value in values.items()}
        digests = torch.stack([_digest(tiles) for tiles in pixel_values[:, :NUM_TILES]])
        return BatchFeature({"pixel_values": pixel_values, "image_digest": digests, **values})

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = {name: MultiModalFieldConfig.batched(IMAGE) for name in ("pixel_values", "instruct_input_ids")}
        numbers = ("image_digest", "query_len", "image_token_grid")  # read on the host
        return fields | {name: MultiModalFieldConfig.batched(IMAGE, keep_on_cpu=True) for name in numbers}

    def _postprocess_prompt(self, prompt: list[int]) -> list[int]:
        """Replace the image tokens by one, which `_get_prompt_updates` expands again."""
        token = self.info.get_hf_config().image_token_id
        return [x for i, x in enumerate(prompt) if x != token or i == 0 or prompt[i - 1] != token]

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, Any],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        token = self.info.get_hf_config().image_token_id
        count = hf_processor_mm_kwargs["image_token_grid"] ** 2
        return [PromptReplacement(modality=IMAGE, target=[token], replacement=[token] * count)]


def _digest(tiles: torch.Tensor) -> torch.Tensor:
    """Hash tiles `(4, 3, H, W)`, so that the model recognizes the image in other questions."""
    content = tiles.contiguous().view(torch.uint8).numpy().data
    return torch.frombuffer(bytearray(hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()), dtype=torch.uint8)


def _as_sent(item: Any) -> Any:
    """Return the image as it was sent, since vLLM's decoding makes transparent pixels white and ours does not."""
    return identify_image(item.original_bytes) if isinstance(item, MediaWithBytes) else item
