"""FUSION's model in vLLM: this package's vision tower, projectors and samplers with the decoder layers of vLLM.

Shapes: S tokens of a step over all requests, B images, P patches per side, N = P * P, T question tokens, D width of
the language model.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors
from vllm.transformers_utils.processor import cached_processor_from_config

from fusion_hf.inference.cpu_linear import use_onednn
from fusion_hf.inference.image_feature_cache import ImageFeatureCache
from fusion_hf.model.configuration_fusion import NUM_CONNECTOR_GROUPS, NUM_TILES, FusionConfig
from fusion_hf.model.modeling_fusion_decoder import FusionSampler
from fusion_hf.model.modeling_fusion_vision import (
    FusionProjector,
    FusionVisionModel,
    encode_blank_image,
    encode_tiles,
    pool_context,
    reduce_grid,
    stitch_tiles,
)
from fusion_hf.model.processing_fusion import IMAGE_TOKEN
from fusion_hf.vllm.latent_updates import find_prompts, make_updates
from fusion_hf.vllm.processing import FusionDummyInputsBuilder, FusionMultiModalProcessor, FusionProcessingInfo
from fusion_hf.vllm.prompt_layout import PromptParser

# models of vLLM whose layers take and return (hidden states, residual)
BACKBONES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# renames weights of a model folder, applied one after the other
RENAMED = {
    r"^model\.language_model\.layers\.(\d+)\.vision_sampler\b": r"samplers.\1",
    r"^model\.language_model\b": "language_model.model",
    r"^lm_head\b": "language_model.lm_head",
    r"^model\.": "",
}


@MULTIMODAL_REGISTRY.register_processor(
    FusionMultiModalProcessor, info=FusionProcessingInfo, dummy_inputs=FusionDummyInputsBuilder
)
class VllmFusionForConditionalGeneration(nn.Module, SupportsMultiModal):
    """FUSION for vLLM. `fusion_hf.vllm.settings` lists the settings that it rejects."""

    # maps the names of weights, and of layers in a `quantization_config`
    hf_to_vllm_mapper = WeightsMapper(orig_to_new_regex={re.compile(key): new for key, new in RENAMED.items()})
    # `forward` also gets the ids, which show where the latent tokens are
    requires_raw_input_tokens = True

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        if modality == "image":
            return IMAGE_TOKEN
        raise ValueError(f"`modality` must be 'image', got {modality!r}.")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        model_config = vllm_config.model_config
        config: FusionConfig = model_config.hf_config
        text_width, vision_width = config.text_config.hidden_size, config.vision_config.hidden_size
        self.config = config
        self.parser = PromptParser.of(config, cached_processor_from_config(model_config))
        self.vocab_size = model_config.get_vocab_size()
        self.suppressed = _suppressed(config, model_config.try_get_generation_config())
        with self._mark_tower_model(vllm_config, "image"):  # type: ignore[operator]
            self.vision_tower = FusionVisionModel(config.vision_config, early_layers=config.vision_early_layers)
            features = (1 + NUM_CONNECTOR_GROUPS) * vision_width
            self.vision_projector = FusionProjector(config, features, text_width)
            self.vision_projector_back = FusionProjector(config, text_width, vision_width)
        self.samplers: Any = nn.ModuleDict({str(layer): FusionSampler(config) for layer in config.sampler_layers})
        with self._mark_language_model(vllm_config):  # type: ignore[operator]
            self.language_model: Any = init_vllm_registered_model(
                vllm_config,
                prefix=maybe_prefix(prefix, "language_model"),
                hf_config=config.text_config,
                architectures=[_backbone(config.text_config)],
            )
        # windows (q * w * w, D), since vLLM caches images together with their questions, not for the next question
        self.windows: ImageFeatureCache[torch.Tensor] = ImageFeatureCache()
        # written by `embed_input_ids` and read by the next `forward`, since vLLM calls both in each step
        self.contexts: list[torch.Tensor] = []
        self.grey: torch.Tensor | None = None

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
        if current_platform.is_cpu():  # vLLM's layers have their own kernels
            for part in (self.vision_tower, self.vision_projector, self.vision_projector_back, self.samplers):
                use_onednn(part)
        return loaded

    def embed_multimodal(self, **kwargs: Any) -> list[torch.Tensor]:
        """
        Encode images with their questions.

        Args:
            **kwargs: `pixel_values` `(B, 5, 3, H, W)`, and `instruct_input_ids` with B rows of ids. May be empty.

        Returns:
            For each image `(n, (1 + c) * D)`: n image tokens and, as further columns, the inputs of its samplers, so
                that vLLM's cache keeps both together.
        """
        if not kwargs:
            return []
        pixel_values, questions = kwargs["pixel_values"], list(kwargs["instruct_input_ids"])
        lengths, grids = kwargs["query_len"].flatten().tolist(), kwargs["image_token_grid"].flatten().tolist()
        windows = self._windows_of(pixel_values, kwargs["image_digest"], lengths)
        alone = self.config.early_text_attention == "uniform_padded"  # the padding of a batch would change the result
        parts = [[row] for row in range(len(questions))] if alone else [list(range(len(questions)))]
        features = torch.cat([self._encode_overviews(pixel_values[p, -1], [questions[i] for i in p]) for p in parts])
        tokens = [
            reduce_grid(features[row : row + 1], self.config.num_patches_per_side, grid)[0]  # (n, D)
            for row, grid in enumerate(grids)
        ]
        return [_pack(*parts) for parts in zip(tokens, windows, strict=True)]

    def _windows_of(self, pixel_values: torch.Tensor, digests: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
        """
        Return the inputs of the samplers, `(q * w * w, D)` for each image, from its tiles or from an earlier
        question.
        """

        def encode(rows: list[int]) -> list[torch.Tensor]:
            tiles = encode_tiles(self.vision_tower, self.vision_projector, pixel_values[rows, :NUM_TILES])
            maps = stitch_tiles(tiles, self.config.num_patches_per_side)  # (B, D, 2P, 2P)
            pooled = [
                pool_context(maps[index : index + 1], lengths[row], self.config.window_size)[1]
                for index, row in enumerate(rows)
            ]
            return [windows.flatten(0, 2) for windows in pooled]

        # vLLM measures memory with equal images without a digest, each of which must be encoded
        pairs = zip(digests.tolist(), lengths, strict=True)
        keys = [(bytes(digest), length) if any(digest) else object() for digest, length in pairs]
        return self.windows.collect(keys, encode)

    def _encode_overviews(self, overviews: torch.Tensor, questions: list[torch.Tensor]) -> torch.Tensor:
        """Encode overviews `(B, 3, H, W)` with their questions, and return `(B, N, D)`."""
        padding = self.config.instruct_pad_token_id
        ids = nn.utils.rnn.pad_sequence(questions, batch_first=True, padding_value=padding)  # (B, T)
        text = self.vision_projector_back(self.language_model.embed_input_ids(ids))
        early = self.config.early_text_attention
        guided = self.vision_tower(overviews, text, ids != padding, early_text_attention=early)
        return self.vision_projector(guided.features[:, : guided.patch_embeddings.shape[1]])

    def _grey_windows(self, query_len: int) -> torch.Tensor:
        """Return the inputs of samplers in prompts without an image, `(q, w * w, D)`."""
        if self.grey is None:
            weight = self.vision_projector.linear_1.weight
            self.grey = encode_blank_image(self.vision_tower, self.vision_projector, weight)
        return pool_context(self.grey, query_len, self.config.window_size)[1][0]

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Return embeddings `(S, D)` with image tokens in place, and zeros for latent tokens, which `forward` fills
        in.

        Args:
            input_ids (`(S,)`): the ids of the step.
            multimodal_embeddings: the embeddings of images.
            is_multimodal (`(S,)`): which tokens are image tokens.
        """
        free = (input_ids == self.config.image_token_id) | (input_ids == self.config.latent_token_id)
        embeds = self.language_model.embed_input_ids(torch.where(free, 0, input_ids))
        embeds = torch.where(free.unsqueeze(-1), 0, embeds)
        width = embeds.shape[-1]
        images = list(multimodal_embeddings) if multimodal_embeddings is not None else []
        self.contexts = [image[:, width:].reshape(-1, width) for image in images]
        if images:
            tokens = torch.cat([image[:, :width] for image in images])
            embeds[is_multimodal] = tokens.to(embeds)
        return embeds

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """
        Compute the hidden states `(S, D)` of a step.

        Args:
            input_ids (`(S,)`): the ids.
            positions (`(S,)`): the positions.
            intermediate_tensors: not supported.
            inputs_embeds (`(S, D)`): the embeddings.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed_input_ids(input_ids)
        prompts = find_prompts(self.parser, input_ids)
        model = self.language_model.model
        if not prompts:  # vLLM may compile this call or capture it in a graph
            return model(None, positions, None, inputs_embeds)
        updates = make_updates(prompts, self.contexts, self.config.window_size, self._grey_windows)
        for update in updates:
            inputs_embeds = update.place(inputs_embeds)
        hidden_states, residual = inputs_embeds, None
        for index, layer in enumerate(model.layers):
            hidden_states, residual = layer(positions, hidden_states, residual)
            if str(index) in self.samplers:
                for update in updates:
                    update.rewrite(self.samplers[str(index)], hidden_states, residual)
        return model.norm(hidden_states, residual)[0]

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """
        Compute the logits `(S, vocabulary)`, with columns for placeholders after the vocabulary of the language
        model.

        Args:
            hidden_states (`(S, D)`): the hidden states.

        Returns:
            The logits, or None on ranks other than the first.
        """
        logits = self.language_model.compute_logits(hidden_states)
        if logits is None:
            return None
        logits = nn.functional.pad(logits, (0, self.vocab_size - logits.shape[-1]), value=-torch.inf)
        logits[:, self.suppressed] = -torch.inf
        return logits


def _backbone(text_config: PreTrainedConfig) -> str:
    model_type = text_config.model_type
    if model_type not in BACKBONES:
        allowed = ", ".join(sorted(BACKBONES))
        raise ValueError(f"`text_config.model_type` must be one of {allowed} in vLLM, got {model_type!r}.")
    return BACKBONES[model_type]


def _suppressed(config: FusionConfig, generation_config: dict[str, Any]) -> list[int]:
    """Return the ids of placeholders, and those that `generation_config.json` forbids, which vLLM does not read."""
    placeholders = {config.image_token_id, config.latent_token_id}
    return sorted(placeholders.union(generation_config.get("suppress_tokens") or []))


def _pack(tokens: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """Append rows of context `(c, D)` to image tokens `(n, D)` as further columns, padded with zeros."""
    missing = -len(context) % len(tokens)
    columns = nn.functional.pad(context, (0, 0, 0, missing)).view(len(tokens), -1)
    return torch.cat([tokens, columns], dim=1)
