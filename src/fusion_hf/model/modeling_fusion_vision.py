"""Vision side of FUSION: SigLIP layers over patches and question tokens, feature connector, and projectors.

Shapes: B batch, P patches of a tile per side, N = P * P, T question tokens, Dv tower width, D LLM width.
Source: FUSION, arXiv 2504.09925, "text-guided vision encoding".
"""

from dataclasses import dataclass
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import SiglipVisionConfig
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.siglip.modeling_siglip import (
    SiglipAttention,
    SiglipEncoderLayer,
    SiglipPreTrainedModel,
    SiglipVisionEmbeddings,
    eager_attention_forward,
)
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import capture_outputs

from .configuration_fusion import (
    EARLY_TEXT_ATTENTION,
    NUM_CONNECTOR_GROUPS,
    NUM_TILES,
    TILES_PER_SIDE,
    FusionConfig,
)

# outputs that the tower can record
RECORDED = ("output_hidden_states", "output_attentions")
TILES_AT_A_TIME = 2  # per layer when a CPU computes activations a second time: enough for efficient products


class Packing(NamedTuple):
    """Shapes of two parts, overviews with questions and tiles, whose tokens are concatenated in one row."""

    guided: tuple[int, int]  # B, N + T
    tiles: tuple[int, int]  # 4 B, N

    @classmethod
    def of(cls, guided: torch.Tensor, tiles: torch.Tensor) -> "Packing":
        """
        Create the packing of two tensors.

        Args:
            guided (`(B, N + T, ...)`): Overviews with their questions.
            tiles (`(4 B, N, ...)`): Tiles.

        Returns:
            [`Packing`]: Their shapes.
        """
        return cls((guided.shape[0], guided.shape[1]), (tiles.shape[0], tiles.shape[1]))

    def join(self, guided: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
        """
        Concatenate both parts in one row.

        Args:
            guided (`(B, N + T, D)`): Overviews with their questions.
            tiles (`(4 B, N, D)`): Tiles.

        Returns:
            `(1, B (N + T) + 4 B N, D)`: The row.
        """
        return torch.cat([guided.flatten(0, 1), tiles.flatten(0, 1)]).unsqueeze(0)

    def split(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Split a row into its parts, the inverse of `join`."""
        rows = self.guided[0] * self.guided[1]
        return packed[0, :rows].unflatten(0, self.guided), packed[0, rows:].unflatten(0, self.tiles)


class FusionVisionAttention(SiglipAttention):
    """SigLIP attention in which question tokens attend uniformly in early layers."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        num_patches: int | None = None,
        uniform_weights: torch.Tensor | None = None,
        packing: Packing | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Compute self-attention over patches and question tokens.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, N + T, Dv)`): Patches, then question tokens. With `packing`,
                the tiles follow them: `(1, B (N + T) + 4 B N, Dv)`.
            num_patches (`int`, *optional*): N, passed in early layers only.
            uniform_weights (`torch.Tensor` of shape `(B, 1, N + T)`, *optional*): Weights, with the sum 1, of the keys
                that a question token averages. None in an early layer hides the question from the patches instead.
            packing ([`Packing`], *optional*): Parts of `hidden_states`, each of which attends to itself.

        Returns:
            The output, of the shape of `hidden_states`, and the weights `(B, heads, N + T, N + T)`, which are None
            with `packing` or without eager attention.
        """
        if packing is not None:
            packed = self._attend_packed(hidden_states, attention_mask, packing)
            if num_patches is None:
                return packed, None
            (hidden_states, _), (output, tiles) = packing.split(hidden_states), packing.split(packed)
            output, _ = self._guide(hidden_states, output, None, num_patches, uniform_weights, **kwargs)
            return packing.join(output, tiles), None
        output, weights = super().forward(hidden_states, attention_mask, **kwargs)
        if self.config._attn_implementation != "eager":
            weights = None  # on a GPU, flex attention returns the normalizer of each row here
        if num_patches is None:
            return output, weights
        return self._guide(hidden_states, output, weights, num_patches, uniform_weights, **kwargs)

    def _attend_packed(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, packing: Packing
    ) -> torch.Tensor:
        """Apply each linear layer to all tokens `(1, rows, Dv)` at once. The mask covers overviews and questions."""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        projected = [packing.split(layer(hidden_states)) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        dropout, outputs = self.dropout if self.training else 0.0, []
        for part, mask in zip(zip(*projected, strict=True), (attention_mask, None), strict=True):
            heads = [rows.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for rows in part]  # (b, heads, n, d)
            output, _ = attend(
                self, *heads, mask, is_causal=self.is_causal, scaling=self.scale, dropout=dropout
            )  # (b, n, heads, d)
            outputs.append(output.flatten(2))
        return self.out_proj(packing.join(*outputs))

    def _guide(
        self,
        hidden_states: torch.Tensor,
        output: torch.Tensor,
        weights: torch.Tensor | None,
        num_patches: int,
        uniform_weights: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Convert the output and weights of full attention to those of an early layer."""
        patches, text = output.split([num_patches, output.shape[1] - num_patches], dim=1)
        if uniform_weights is None:
            patches, patch_weights = super().forward(hidden_states[:, :num_patches], None, **kwargs)
            if weights is not None and patch_weights is not None:
                patch_weights = nn.functional.pad(patch_weights, (0, text.shape[1]))
                weights = torch.cat([patch_weights, weights[:, :, num_patches:]], dim=2)
        else:
            # the mean of the values is the value of the mean, so one row passes both layers for all T rows
            mean = torch.bmm(uniform_weights.to(hidden_states.dtype), hidden_states)  # (B, 1, Dv)
            text = self.out_proj(self.v_proj(mean)).expand_as(text)
            if weights is not None:
                text_weights = uniform_weights.to(weights.dtype).unsqueeze(1).expand_as(weights[:, :, num_patches:])
                weights = torch.cat([weights[:, :, :num_patches], text_weights], dim=2)
        return torch.cat([patches, text], dim=1), weights


class FusionVisionLayer(SiglipEncoderLayer):
    """A SigLIP layer with FUSION's attention."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__(config)
        self.self_attn = FusionVisionAttention(config)


@dataclass
class FusionVisionModelOutput(ModelOutput):
    """
    features (`(B, N + T, 3 * Dv)`): Last hidden state and the means of two groups of hidden states, for every token.
    patch_embeddings (`(B, N, Dv)`): Input of the first layer for each patch.
    tile_features (`(4 B, N, 3 * Dv)`, *optional*): Features of the tiles that were passed.
    hidden_states, attentions (*optional*): Outputs of every layer, over patches and question tokens, if asked for.
    """

    features: torch.Tensor = None  # type: ignore[assignment]  # outputs have a default for every field
    patch_embeddings: torch.Tensor = None  # type: ignore[assignment]
    tile_features: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None

    def of_image(self, image_features: torch.Tensor) -> BaseModelOutputWithPooling:
        """
        Convert to the output that image models of transformers return.

        Args:
            image_features (`(B, n, D)`): Projected features.

        Returns:
            [`BaseModelOutputWithPooling`]: Output with `image_features` as `pooler_output`.
        """
        num_patches, width = self.patch_embeddings.shape[1:]
        return BaseModelOutputWithPooling(
            last_hidden_state=self.features[:, :num_patches, :width],  # (B, N, Dv)
            pooler_output=image_features,
            hidden_states=self.hidden_states,
            attentions=self.attentions,
        )


class FusionVisionModel(SiglipPreTrainedModel):
    """SigLIP layers that also read a question, and the feature connector (paper: "text-guided vision encoding")."""

    config: SiglipVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["FusionVisionLayer"]
    _can_record_outputs = {"hidden_states": FusionVisionLayer, "attentions": FusionVisionAttention}
    # GPUs are faster with all tiles at once. The memory planner, which uses CPU tensors, can ask for the GPU's way.
    splits_on_cpu = True

    def __init__(self, config: SiglipVisionConfig, early_layers: int):
        super().__init__(config)
        self.early_layers = early_layers
        self.embeddings = SiglipVisionEmbeddings(config)
        self.layers = nn.ModuleList([FusionVisionLayer(config) for _ in range(config.num_hidden_layers)])
        self.post_init()

    def takes_tiles(self, pixel_values: torch.Tensor, asked: dict[str, Any]) -> bool:
        """
        Return whether tiles run through the layers together with overviews.

        On a GPU, this is faster than one after the other. On a CPU, it is not. Callers that record eager attention
        weights, or that watch layers by hooks, expect overviews and tiles in separate passes.

        Args:
            pixel_values (`(B, 5, 3, H, W)`): Tiles and overviews.
            asked (`dict`): Further arguments of the pass, such as `output_attentions`.
        """
        if not _is_on_gpu(pixel_values) or self.config._attn_implementation == "eager":
            return False
        recorded = any(asked.get(name, getattr(self.config, name)) for name in RECORDED)
        return not recorded and not any(layer._forward_hooks for layer in self.layers)

    @capture_outputs
    def forward(
        self,
        pixel_values: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        text_mask: torch.Tensor | None = None,
        early_text_attention: str = "uniform",
        tiles: torch.Tensor | None = None,
        rows_at_a_time: int | None = None,
        **kwargs: Any,
    ) -> FusionVisionModelOutput:
        """
        Encode one tile of each image, guided by its question.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): One tile of each image.
            text_embeds (`torch.Tensor` of shape `(B, T, Dv)`, *optional*): Question in the width of the tower.
            text_mask (`torch.Tensor` of shape `(B, T)`, *optional*): Mask of the valid question tokens.
            early_text_attention (`str`): See [`FusionConfig`].
            tiles (`torch.Tensor` of shape `(B, 4, 3, H, W)`, *optional*): Tiles that are encoded in the same pass
                without a question. Nothing can be recorded then.
            rows_at_a_time (`int`, *optional*): Number of the B tiles that pass a layer together, which limits the
                memory for activations. Not supported with a question.

        Returns:
            [`FusionVisionModelOutput`]: Features of all tokens.
        """
        batch = len(pixel_values)
        pixels = pixel_values if tiles is None else torch.cat([pixel_values, tiles.flatten(0, 1)])
        embeddings = self.embeddings(pixels)
        patch_embeddings = embeddings[:batch]  # (B, N, Dv)
        hidden_states, attention_mask = patch_embeddings, None
        early_kwargs: dict[str, Any] = {}
        if text_embeds is not None and text_mask is not None and text_embeds.shape[1] > 0:
            hidden_states = torch.cat([patch_embeddings, text_embeds], dim=1)  # (B, N + T, Dv)
            key_mask = nn.functional.pad(text_mask, (patch_embeddings.shape[1], 0), value=True)  # (B, N + T)
            attention_mask = create_bidirectional_mask(self.config, hidden_states, key_mask)
            weights = _uniform_weights(key_mask, early_text_attention)
            early_kwargs = {"num_patches": patch_embeddings.shape[1], "uniform_weights": weights}
        packing = None
        if tiles is not None:
            packing = Packing.of(hidden_states, embeddings[batch:])
            hidden_states = packing.join(hidden_states, embeddings[batch:])
            kwargs["packing"] = packing

        # running sums of h_0 .. h_{k-1} and h_k .. h_{2k-1}, so that the states themselves are not kept
        sums: list[torch.Tensor] = []
        for index, layer in enumerate(self.layers):
            group = index // self.early_layers
            if group == len(sums) < NUM_CONNECTOR_GROUPS:
                sums.append(hidden_states)
            elif group < NUM_CONNECTOR_GROUPS:
                sums[group] = sums[group] + hidden_states
            layer_kwargs = early_kwargs if index < self.early_layers else {}
            parts = [hidden_states] if rows_at_a_time is None else hidden_states.split(rows_at_a_time)
            outputs = [layer(part, attention_mask, **layer_kwargs, **kwargs) for part in parts]
            hidden_states = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        means = [total / self.early_layers for total in sums]
        features, tile_features = torch.cat([hidden_states, *means], dim=-1), None
        if packing is not None:
            features, tile_features = packing.split(features)
        return FusionVisionModelOutput(features, patch_embeddings, tile_features)


def _is_on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda"


def _uniform_weights(key_mask: torch.Tensor, early_text_attention: str) -> torch.Tensor | None:
    """Compute the weights `(B, 1, N + T)` of the mean that question tokens take in early layers; None if masked."""
    if early_text_attention not in EARLY_TEXT_ATTENTION:
        allowed = ", ".join(map(repr, EARLY_TEXT_ATTENTION))
        raise ValueError(f"`early_text_attention` must be one of {allowed}, got {early_text_attention!r}.")
    if early_text_attention == "masked":
        return None
    weights = (torch.ones_like(key_mask) if early_text_attention == "uniform_padded" else key_mask).float()
    return (weights / weights.sum(-1, keepdim=True)).unsqueeze(1)


class FusionProjector(nn.Module):
    """Two linear layers with biases and an activation between them."""

    def __init__(self, config: FusionConfig, in_features: int, out_features: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_features, out_features)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(out_features, out_features)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project features `(..., in_features)` to `(..., out_features)`."""
        return self.linear_2(self.act(self.linear_1(features)))


class EncodedImage(NamedTuple):
    """One image per sample after the tower and the projector, before the grid is reduced."""

    image_features: torch.Tensor  # (B, N, D)
    global_features: torch.Tensor  # (B, D, 2P, 2P)
    patch_embeddings: torch.Tensor  # (B, N, Dv)
    instruct_embeds: torch.Tensor  # (B, T, D)
    instruct_features: torch.Tensor  # (B, T, D)
    instruct_mask: torch.Tensor  # (B, T)
    guided: FusionVisionModelOutput  # output for the overview with its question


def encode_tiles(tower: FusionVisionModel, projector: FusionProjector, tiles: torch.Tensor) -> torch.Tensor:
    """
    Encode tiles without a question.

    Args:
        tower ([`FusionVisionModel`]): Vision tower.
        projector ([`FusionProjector`]): Projector to the width of the language model.
        tiles (`(B, 4, 3, H, W)`): Tiles of the images.

    Returns:
        `(4 B, N, D)`: Projected features.
    """
    on_cpu, splits = _is_lone_cpu(tiles), False
    if on_cpu and torch.is_grad_enabled():
        is_checkpointed = tower.training and any(layer.gradient_checkpointing for layer in tower.layers)
        splits = is_checkpointed and tower.splits_on_cpu
    # four tiles are enough for a CPU, and the activations of more do not fit in its caches
    parts = tiles.split(1) if on_cpu and not torch.is_grad_enabled() else [tiles]
    settings = {"rows_at_a_time": TILES_AT_A_TIME} if splits else {}
    return torch.cat([projector(tower(part.flatten(0, 1), **settings).features) for part in parts])


def _is_lone_cpu(tiles: torch.Tensor) -> bool:
    """Return whether tiles may be encoded in parts: on a CPU, if no other process must take the same steps."""
    if tiles.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    # all ranks of FSDP must call the tower equally often, whatever their images
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_world_size() == 1


def stitch_tiles(features: torch.Tensor, side: int) -> torch.Tensor:
    """
    Stitch the features of tiles to one map per image.

    Args:
        features (`(4 B, N, D)`): Features of the tiles.
        side (`int`): Number of patches per side of a tile, P.

    Returns:
        `(B, D, 2P, 2P)`: The maps.
    """
    features = features.view(-1, TILES_PER_SIDE, TILES_PER_SIDE, side, side, features.shape[-1])
    # (B, row, column, y, x, D) -> (B, D, row, y, column, x)
    return features.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def blank_pixels(config: SiglipVisionConfig, like: torch.Tensor, *shape: int) -> torch.Tensor:
    """
    Create mid grey pixels, which are zeros.

    Args:
        config (`SiglipVisionConfig`): Configuration of the tower.
        like (`torch.Tensor`): Tensor with the dtype and the device for the result.
        shape (`int`): Leading dimensions of the result.

    Returns:
        `(*shape, 3, H, W)`: The pixels.
    """
    return like.new_zeros(*shape, config.num_channels, config.image_size, config.image_size)


def encode_blank_image(tower: FusionVisionModel, projector: FusionProjector, like: torch.Tensor) -> torch.Tensor:
    """
    Encode the blank (mid grey) image that samplers read in prompts without an image.

    Args:
        tower ([`FusionVisionModel`]): Vision tower.
        projector ([`FusionProjector`]): Projector to the width of the language model.
        like (`torch.Tensor`): Tensor with the dtype and the device for the pixels.

    Returns:
        `(1, D, 2P, 2P)`: Projected features as one map.
    """
    features = projector(tower(blank_pixels(tower.config, like, 1)).features)  # (1, N, D)
    return stitch_tiles(features.repeat(NUM_TILES, 1, 1), tower.config.image_size // tower.config.patch_size)


def adaptive_max_pool(feature_map: torch.Tensor, side: int) -> torch.Tensor:
    """
    Max-pool maps to a square.

    Args:
        feature_map (`(B, D, H, W)`): The maps.
        side (`int`): Side of the result.

    Returns:
        `(B, D, side, side)`: The pooled maps.
    """
    if feature_map.device.type == "mps":  # Metal does not support sizes that do not divide evenly
        return nn.functional.adaptive_max_pool2d(feature_map.cpu(), side).to(feature_map.device)
    return nn.functional.adaptive_max_pool2d(feature_map, side)


def reduce_grid(image_features: torch.Tensor, side: int, grid: int) -> torch.Tensor:
    """
    Resize image features bilinearly to a smaller grid, as in FUSION-L.

    Args:
        image_features (`(B, N, D)`): Image features.
        side (`int`): Number of patches per side, P.
        grid (`int`): Side of the new grid.

    Returns:
        `(B, grid ** 2, D)`: The resized features.
    """
    if grid == side:
        return image_features
    feature_map = image_features.transpose(1, 2).unflatten(-1, (side, side))
    feature_map = nn.functional.interpolate(feature_map, size=(grid, grid), mode="bilinear", align_corners=False)
    return feature_map.flatten(2).transpose(1, 2)


def pool_context(global_features: torch.Tensor, query_len: int, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Max-pool the global context to latent tokens and windows.

    Args:
        global_features (`(B, D, 2P, 2P)`): Features of the tiles as one map per image.
        query_len (`int`): Number of latent tokens, q.
        window (`int`): Side of a window, w.

    Returns:
        Initial latent tokens `(B, q, D)`, and the windows `(B, q, w * w, D)` that samplers attend to.
    """
    side = isqrt(query_len)
    latents = adaptive_max_pool(global_features, side).flatten(2).transpose(1, 2)
    windows = adaptive_max_pool(global_features, side * window)  # (B, D, s * w, s * w)
    windows = windows.unflatten(3, (side, window)).unflatten(2, (side, window))  # (B, D, s, w, s, w)
    return latents, windows.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)
