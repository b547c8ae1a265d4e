"""Decoder side of FUSION: latent tokens in the prompt, and samplers that update them inside the LLM's layers.

Shapes: B batch, S sequence length, R user turns, q latent tokens per turn, w window size, D LLM width.
Source: FUSION, arXiv 2504.09925, "context-aware recursive alignment decoding".
"""

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_fusion import FusionConfig


class LatentUpdates(NamedTuple):
    """
    Inputs of a sampler besides the hidden states. A named tuple, because device maps and FSDP move tensors in tuples.

    windows (`(B, q, w * w, D)`): Cells of the global context that each latent token attends to.
    latent_positions (`(B, R, q)`): Positions of each turn's latent tokens; 0 where `valid` is false.
    prompt_end_positions (`(B, R)`): Position of each turn's last prompt token; 0 where `valid` is false.
    valid (`(B, R)`): Whether the turn exists.
    """

    windows: torch.Tensor
    latent_positions: torch.Tensor
    prompt_end_positions: torch.Tensor
    valid: torch.Tensor


class FusionSampler(nn.Module):
    """Updates the latent tokens of each turn from the question and the global context."""

    def __init__(self, config: FusionConfig):
        super().__init__()
        width = config.text_config.hidden_size
        self.num_heads = config.sampler_num_heads
        self.proj_in = nn.Linear(2 * width, width, bias=False)
        self.proj_context = nn.Linear(width, width, bias=False)
        self.q_norm, self.k_norm, self.v_norm = (nn.LayerNorm(width) for _ in range(3))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.linear_1 = nn.Linear(width, width, bias=False)
        self.linear_2 = nn.Linear(width, width, bias=False)
        self.act = ACT2FN[config.projector_hidden_act]

    def forward(self, hidden_states: torch.Tensor, updates: LatentUpdates) -> torch.Tensor:
        """
        Update the latent tokens of all valid turns.

        Args:
            hidden_states (`(B, S, D)`): Hidden states after a layer of the language model.
            updates ([`LatentUpdates`]): Windows and positions of the latent tokens.

        Returns:
            `(B, S, D)`: The hidden states, changed only at the latent positions of valid turns.
        """
        width = hidden_states.shape[-1]
        positions = updates.latent_positions.flatten(1).unsqueeze(-1).expand(-1, -1, width)  # (B, R * q, D)
        ends = updates.prompt_end_positions.unsqueeze(-1).expand(-1, -1, width)  # (B, R, D)
        latents = hidden_states.gather(1, positions).unflatten(1, updates.latent_positions.shape[1:])  # (B, R, q, D)
        questions = hidden_states.gather(1, ends).unsqueeze(2).expand_as(latents)

        change = self.change(latents, questions, updates.windows)
        change = torch.where(updates.valid[:, :, None, None], change, 0)
        # adding keeps shapes fixed: a turn that does not exist adds zeros to position 0
        return hidden_states.scatter_add(1, positions, change.flatten(1, 2).to(hidden_states.dtype))

    def change(self, latents: torch.Tensor, questions: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """
        Compute the change of latent tokens.

        Args:
            latents (`(B, R, q, D)`): Latent tokens of each turn.
            questions (`(B, R, q, D)`): Hidden state of the last prompt token of each turn, repeated for each latent
                token.
            windows (`(B, q, w * w, D)`): Cells of the global context.

        Returns:
            `(B, R, q, D)`: What is added to the latent tokens.
        """
        inputs = self.proj_in(torch.cat([questions, latents], dim=-1))  # (B, R, q, D)
        outputs = self.norm(self.attend(inputs, windows) + inputs)
        return self.linear_2(self.act(self.linear_1(outputs)))

    def attend(self, inputs: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """
        Let latent token j of every turn attend to window j. All turns share the keys and values.

        Args:
            inputs (`(B, R, q, D)`): Latent tokens, combined with their questions.
            windows (`(B, q, w * w, D)`): Cells of the global context.

        Returns:
            `(B, R, q, D)`: The attention outputs.
        """
        batch, turns, latents, width = inputs.shape
        context = self.proj_context(windows.to(inputs.dtype))  # (B, q, w * w, D)
        heads = (self.num_heads, width // self.num_heads)
        query = self.q_proj(self.q_norm(inputs)).transpose(1, 2)  # (B, q, R, D)
        key, value = self.k_proj(self.k_norm(context)), self.v_proj(self.v_norm(context))
        query, key, value = (x.flatten(0, 1).unflatten(-1, heads).transpose(1, 2) for x in (query, key, value))
        attended = nn.functional.scaled_dot_product_attention(query, key, value)  # (B * q, heads, R, D / heads)
        attended = attended.transpose(1, 2).reshape(batch, latents, turns, width).transpose(1, 2)
        return self.o_proj(attended)  # (B, R, q, D)


class FusionDecoderLayerMixin:
    """A decoder layer that takes `latent_updates` from its keywords and applies them if it has a sampler."""

    vision_sampler: FusionSampler | None  # no default: a class attribute would hide the registered module

    def __call__(
        self, hidden_states: torch.Tensor, latent_updates: LatentUpdates | None = None, **kwargs: Any
    ) -> torch.Tensor:
        # reentrant checkpointing passes gradients only to positional tensors, so the windows become one
        windows = () if latent_updates is None else (latent_updates.windows,)
        return super().__call__(hidden_states, *windows, latent_updates=latent_updates, **kwargs)  # type: ignore[misc]

    def forward(
        self,
        hidden_states: torch.Tensor,
        windows: torch.Tensor | None = None,
        latent_updates: LatentUpdates | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        hidden_states = super().forward(hidden_states, **kwargs)  # type: ignore[misc]
        if windows is not None and latent_updates is not None and self.vision_sampler is not None:
            hidden_states = self.vision_sampler(hidden_states, LatentUpdates(windows, *latent_updates[1:]))
        return hidden_states


# Layers that can get samplers, by the model type of their language model. To add a backbone, add a line here.
DECODER_LAYERS = {
    "llama": "LlamaDecoderLayer",
    "mistral": "MistralDecoderLayer",
    "phi3": "Phi3DecoderLayer",
    "qwen2": "Qwen2DecoderLayer",
    "qwen3": "Qwen3DecoderLayer",
    "smollm3": "SmolLM3DecoderLayer",
}
# Names of the classes, which pickles contain and `_no_split_modules` compares.
FUSION_LAYERS = {f"Fusion{name}": model_type for model_type, name in DECODER_LAYERS.items()}


def decoder_layer(model_type: str) -> type[FusionDecoderLayerMixin]:
    """
    Return the class of a layer that takes `latent_updates`. No other language model is imported.

    Args:
        model_type (`str`): Model type of the language model, a key of `DECODER_LAYERS`.
    """
    name = DECODER_LAYERS[model_type]
    return globals().get(f"Fusion{name}") or _make_layer(model_type, name)


def _make_layer(model_type: str, name: str) -> type[FusionDecoderLayerMixin]:
    base = getattr(import_module(f"transformers.models.{model_type}.modeling_{model_type}"), name)
    layer = type(f"Fusion{name}", (FusionDecoderLayerMixin, base), {"__module__": __name__})
    return globals().setdefault(layer.__name__, layer)  # one class for all threads


def __getattr__(name: str) -> Any:
    """Create the class of a layer when a pickle or an import asks for its name."""
    if name in FUSION_LAYERS:
        return decoder_layer(FUSION_LAYERS[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class EmbeddedPrompt(NamedTuple):
    """Inputs of the language model for one prompt."""

    inputs_embeds: torch.Tensor  # (B, S, D)
    latent_updates: LatentUpdates | None = None
    image_features: torch.Tensor | None = None  # (B, image_token_grid ** 2, D)
    mapping_loss: torch.Tensor | None = None  # ()
    image_outputs: BaseModelOutputWithPooling | None = None


class PlaceholderMasks(NamedTuple):
    """Positions of image and latent tokens as boolean masks `(B, S)`."""

    image: torch.Tensor
    latent: torch.Tensor

    @classmethod
    def find(cls, input_ids: torch.Tensor, config: FusionConfig) -> "PlaceholderMasks":
        """
        Find the placeholders of prompts by their ids.

        Args:
            input_ids (`(B, S)`): Ids of the prompts.
            config ([`FusionConfig`]): Configuration of the model.

        Returns:
            [`PlaceholderMasks`]: Masks of the placeholders.
        """
        return cls(input_ids == config.image_token_id, input_ids == config.latent_token_id)

    def any(self) -> bool:
        """Return whether there is a placeholder. This reads a value from the device."""
        return bool((self.image | self.latent).any())

    def fill(self, embeds: torch.Tensor, image: torch.Tensor | None, latents: torch.Tensor) -> torch.Tensor:
        """
        Fill image features and latent tokens into embeddings, with fixed shapes.

        Args:
            embeds (`(B, S, D)`): Embeddings of the prompts.
            image (`(B, n, D)`, *optional*): Image features.
            latents (`(B, q, D)`): Initial latent tokens, which fill each block.

        Returns:
            `(B, S, D)`: The embeddings with both in place.
        """
        for mask, features in ((self.image, image), (self.latent, latents)):
            if features is None:
                continue
            order = (mask.cumsum(1) - 1).clamp(min=0) % features.shape[1]  # (B, S)
            placed = features.to(embeds.dtype).gather(1, order.unsqueeze(-1).expand_as(embeds))
            embeds = torch.where(mask.unsqueeze(-1), placed, embeds)
        return embeds

    def latent_updates(self, windows: torch.Tensor, ends: torch.Tensor, query_len: int) -> LatentUpdates:
        """
        Find the positions of the latent blocks that belong to given turns.

        Args:
            windows (`(B, q, w * w, D)`): Cells of the global context.
            ends (`(B, R)`): Position of each turn's last prompt token, -1 for a turn that does not exist.
            query_len (`int`): Number of latent tokens per turn, q.

        Returns:
            [`LatentUpdates`]: Inputs of the samplers.
        """
        batch, length = self.latent.shape
        slots = ends.shape[1] * query_len
        order = self.latent.cumsum(1) - 1  # (B, S)
        # positions that are not latent tokens of a given turn go to an extra slot behind the others
        slot = torch.where(self.latent & (order < slots), order, slots)
        positions = torch.full((batch, slots + 1), -1, device=ends.device)
        positions = positions.scatter(1, slot, torch.arange(length, device=ends.device).expand(batch, -1))
        positions = positions[:, :slots].unflatten(1, (ends.shape[1], query_len))  # (B, R, q)
        valid = (ends >= 0) & (positions >= 0).all(-1)  # (B, R)
        return LatentUpdates(windows, torch.where(valid[..., None], positions, 0), torch.where(valid, ends, 0), valid)
