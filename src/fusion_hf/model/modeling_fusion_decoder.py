"""The decoding side of FUSION: latent tokens in the prompt, and samplers that rewrite them inside the LLM's layers.

Shapes: B batch, S sequence length, R user turns, q latent tokens per turn, w window size, D LLM width.
Source: FUSION, arXiv 2504.09925, "context-aware recursive alignment decoding".
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Cache
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.models.smollm3.modeling_smollm3 import SmolLM3DecoderLayer

from .chat_fusion import BETWEEN_BLOCKS
from .configuration_fusion import FusionConfig, is_perfect_square


class TokenBudget(NamedTuple):
    """How many tokens show a picture to the LLM."""

    query_len: int  # latent tokens per question, a perfect square
    image_token_grid: int  # side of the grid of image tokens

    @classmethod
    def of(
        cls, config: FusionConfig, query_len: int | None = None, image_token_grid: int | None = None
    ) -> "TokenBudget":
        """What a call gives, else the configuration's. Raises a `ValueError` for what no picture can have."""
        length = config.query_len if query_len is None else query_len
        if not is_perfect_square(length):
            raise ValueError(f"query_len is {length}; allowed: a perfect square (1, 4, 9, 16, ...).")
        return cls(length, config.grid_side(image_token_grid))

    @property
    def num_image_tokens(self) -> int:
        return self.image_token_grid**2


class LatentUpdates(NamedTuple):
    """
    What a sampler needs beside the hidden states. A named tuple: device maps and FSDP move tensors inside tuples.

    windows (`(B, q, w * w, D)`): the cell of the global context that each latent token sees.
    latent_positions (`(B, R, q)`): where each turn's latent tokens are; 0 where `valid` is false.
    prompt_end_positions (`(B, R)`): where each turn's prompt ends; 0 where `valid` is false.
    valid (`(B, R)`): whether the turn exists.
    """

    windows: torch.Tensor
    latent_positions: torch.Tensor
    prompt_end_positions: torch.Tensor
    valid: torch.Tensor


class FusionSampler(nn.Module):
    """Rewrites the latent tokens of each turn from its question and the global context."""

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
        """`(B, S, D)` to `(B, S, D)`, changed at the latent positions of valid turns only."""
        width = hidden_states.shape[-1]
        positions = updates.latent_positions.flatten(1).unsqueeze(-1).expand(-1, -1, width)  # (B, R * q, D)
        ends = updates.prompt_end_positions.unsqueeze(-1).expand(-1, -1, width)  # (B, R, D)
        latents = hidden_states.gather(1, positions).unflatten(1, updates.latent_positions.shape[1:])  # (B, R, q, D)
        questions = hidden_states.gather(1, ends).unsqueeze(2).expand_as(latents)

        change = self.change(latents, questions, updates.windows)
        change = torch.where(updates.valid[:, :, None, None], change, 0)
        # adding keeps shapes fixed: a turn that does not exist adds zeros at position 0
        return hidden_states.scatter_add(1, positions, change.flatten(1, 2).to(hidden_states.dtype))

    def change(self, latents: torch.Tensor, questions: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """What is added to latents `(B, R, q, D)` with questions of the same shape and windows `(B, q, w * w, D)`."""
        inputs = self.proj_in(torch.cat([questions, latents], dim=-1))  # (B, R, q, D)
        outputs = self.norm(self.attend(inputs, windows) + inputs)
        return self.linear_2(self.act(self.linear_1(outputs)))

    def attend(self, inputs: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """Latent token j of every turn looks at window j. Keys and values, of the picture, serve all turns."""
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
    """A decoder layer that takes `latent_updates` out of its keywords and, where it has a sampler, applies them."""

    vision_sampler: FusionSampler | None  # no default: a class attribute would hide the registered module

    def __call__(
        self, hidden_states: torch.Tensor, latent_updates: LatentUpdates | None = None, **kwargs: Any
    ) -> torch.Tensor:
        # reentrant checkpointing brings gradients to positional tensors only, so the windows become one
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


# Static classes, since made ones don't pickle. A new backbone is a class here and a line in the table.
class FusionLlamaDecoderLayer(FusionDecoderLayerMixin, LlamaDecoderLayer):
    pass


class FusionMistralDecoderLayer(FusionDecoderLayerMixin, MistralDecoderLayer):
    pass


class FusionPhi3DecoderLayer(FusionDecoderLayerMixin, Phi3DecoderLayer):
    pass


class FusionQwen2DecoderLayer(FusionDecoderLayerMixin, Qwen2DecoderLayer):
    pass


class FusionQwen3DecoderLayer(FusionDecoderLayerMixin, Qwen3DecoderLayer):
    pass


class FusionSmolLM3DecoderLayer(FusionDecoderLayerMixin, SmolLM3DecoderLayer):
    pass


DECODER_LAYERS: dict[str, type[FusionDecoderLayerMixin]] = {
    "llama": FusionLlamaDecoderLayer,
    "mistral": FusionMistralDecoderLayer,
    "phi3": FusionPhi3DecoderLayer,
    "qwen2": FusionQwen2DecoderLayer,
    "qwen3": FusionQwen3DecoderLayer,
    "smollm3": FusionSmolLM3DecoderLayer,
}


class EmbeddedPrompt(NamedTuple):
    """What enters the language model."""

    inputs_embeds: torch.Tensor  # (B, S, D)
    latent_updates: LatentUpdates | None = None
    image_features: torch.Tensor | None = None  # (B, image_token_grid ** 2, D)
    mapping_loss: torch.Tensor | None = None  # ()
    image_outputs: BaseModelOutputWithPooling | None = None


class PromptMarks(NamedTuple):
    """Where image and latent tokens are: boolean masks `(B, S)`."""

    image: torch.Tensor
    latent: torch.Tensor

    @classmethod
    def find(cls, input_ids: torch.Tensor, config: FusionConfig) -> "PromptMarks":
        return cls(input_ids == config.image_token_id, input_ids == config.latent_token_id)

    def fill(self, embeds: torch.Tensor, image: torch.Tensor | None, latents: torch.Tensor) -> torch.Tensor:
        """Put image features `(B, n, D)` and, in each block, latents `(B, q, D)` into `(B, S, D)`; fixed shapes."""
        for mask, features in ((self.image, image), (self.latent, latents)):
            if features is None:
                continue
            order = (mask.cumsum(1) - 1).clamp(min=0) % features.shape[1]  # (B, S)
            placed = features.to(embeds.dtype).gather(1, order.unsqueeze(-1).expand_as(embeds))
            embeds = torch.where(mask.unsqueeze(-1), placed, embeds)
        return embeds

    def latent_updates(self, windows: torch.Tensor, ends: torch.Tensor, query_len: int) -> LatentUpdates:
        """Positions of the latent blocks that belong to the turns in `ends` `(B, R)`."""
        batch, length = self.latent.shape
        slots = ends.shape[1] * query_len
        order = self.latent.cumsum(1) - 1  # (B, S)
        # every position that is no latent of a given turn goes to a slot of its own behind the others
        slot = torch.where(self.latent & (order < slots), order, slots)
        positions = torch.full((batch, slots + 1), -1, device=ends.device)
        positions = positions.scatter(1, slot, torch.arange(length, device=ends.device).expand(batch, -1))
        positions = positions[:, :slots].unflatten(1, (ends.shape[1], query_len))  # (B, R, q)
        valid = (ends >= 0) & (positions >= 0).all(-1)  # (B, R)
        return LatentUpdates(windows, torch.where(valid[..., None], positions, 0), torch.where(valid, ends, 0), valid)


def check_prompt(
    config: FusionConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    pixel_values: torch.Tensor | None,
    prompt_end_positions: torch.Tensor | None,
    budget: TokenBudget,
) -> None:
    """Raise a `ValueError`, with both counts, where ids, pictures, latent blocks and turns of a prompt disagree."""
    batch, length = input_ids.shape
    turns = [[]] * batch if prompt_end_positions is None else prompt_end_positions.tolist()
    if len(turns) != batch:
        raise ValueError(f"prompt_end_positions has {len(turns)} rows for {batch} samples.")
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        attention_mask = torch.ones_like(input_ids)
    for row, (ids, mask) in enumerate(zip(input_ids.cpu(), attention_mask[:, -length:].cpu(), strict=True)):
        attended = mask.nonzero().flatten().tolist()
        last = attended[-1] if attended else length - 1  # a block may be cut by truncation, but only at the very end
        ends = [end for end in turns[row] if end != -1]
        if ends and max(ends) > last:
            raise ValueError(
                f"Sample {row}: `prompt_end_positions` must be at most {last}, its last token, got {max(ends)}. If "
                "the prompt was cut, allow longer samples (`max_length` of a trainer) or leave this one out."
            )
        image = (ids == config.image_token_id).nonzero().flatten().tolist()
        latent = (ids == config.latent_token_id).nonzero().flatten().tolist()
        if image and pixel_values is None:
            raise ValueError(f"Sample {row} has {len(image)} image tokens, but pixel_values is None.")
        if not image and pixel_values is not None and bool(pixel_values[row].any()):
            raise ValueError(
                f"Sample {row} has no image tokens, but an image in `pixel_values`, which must be zeros there. Write "
                "prompts with the processor's chat template."
            )
        most = budget.num_image_tokens
        if image and len(image) != most and (len(image) > most or image[-1] != last):
            allowed = f"one picture gives {most}, as image_token_grid is {budget.image_token_grid}"
            raise ValueError(f"Sample {row} has {len(image)} image tokens; {allowed}.")
        if image and latent and image[-1] > latent[0]:
            raise ValueError(f"Sample {row}: the image must come before the first latent block.")
        _check_blocks(row, _blocks(latent), budget.query_len, last)
        _check_turns(row, image, latent, ends, budget.query_len, last)


def check_reuse(
    config: FusionConfig,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    global_features: torch.Tensor | None,
    instruct_input_ids: torch.Tensor | None,
    prompt_end_positions: torch.Tensor | None,
    cache: Cache | None,
) -> None:
    """Raise a `ValueError` if a cache, or features of tiles, come with what they do not fit."""
    has_turns = prompt_end_positions is not None and prompt_end_positions.numel() > 0
    continues = cache is not None and cache.get_seq_length() > 0
    if global_features is not None and pixel_values is None:
        if not (continues and has_turns):
            raise ValueError(
                "global_features need pixel_values, whose overview is encoded, or past_key_values that hold it and "
                "the prompt_end_positions of the turns that follow."
            )
        if instruct_input_ids is not None:
            raise ValueError("instruct_input_ids guide the overview, and past_key_values hold the overview already.")
    elif continues and has_turns:
        check_continuation(config, input_ids)
        name = "prompt_end_positions" if pixel_values is None else "pixel_values"
        raise ValueError(f"{name} belong to a whole prompt, but the cache holds its beginning already.")


def check_continuation(config: FusionConfig, input_ids: torch.Tensor) -> None:
    """Raise a `ValueError` if ids `(B, S)` that follow a cache hold a picture or a latent block."""
    marks = PromptMarks.find(input_ids, config)
    if bool((marks.image | marks.latent).any()):
        raise ValueError(
            "A prompt with latent blocks cannot continue a cache: pass the whole conversation at once, or the "
            "picture's global_features and no pixel_values."
        )


def _blocks(positions: list[int], gap: int = 0) -> list[range]:
    """Runs of positions that are at most `gap` others apart."""
    starts = [p for i, p in enumerate(positions) if i == 0 or p - positions[i - 1] > gap + 1]
    ends = [p + 1 for i, p in enumerate(positions) if i + 1 == len(positions) or positions[i + 1] - p > gap + 1]
    return [range(start, end) for start, end in zip(starts, ends, strict=True)]


def _check_blocks(row: int, blocks: list[range], query_len: int, last: int) -> None:
    for number, block in enumerate(blocks):
        if len(block) != query_len and not (len(block) < query_len and block[-1] == last):
            count = len(block)
            raise ValueError(f"Sample {row}: latent block {number} has {count} tokens, but query_len is {query_len}.")


def _check_turns(row: int, image: list[int], latent: list[int], ends: list[int], query_len: int, last: int) -> None:
    """Each turn's end must be behind its blocks and before those of the next turn."""
    blocks = len(_blocks(latent))
    if len(ends) > blocks:
        raise ValueError(
            f"Sample {row} has {len(ends)} prompt_end_positions for {blocks} latent blocks. If the sequence was cut, "
            "allow more tokens (`max_length`)."
        )
    turns = _blocks(image + latent, BETWEEN_BLOCKS)
    if image and len(turns) > 1 and turns[0][-1] == image[-1] and not any(end < turns[1].start for end in ends):
        # an image that a text parts from the latent block of its turn; one with a turn's end behind it is in a turn
        # without latent block, since a later question has the image, and the first block of the conversation is its
        turns = [range(turns[0].start, turns[1].stop), *turns[2:]]
    for number, end in enumerate(ends):
        begin = turns[number][-1] + 1 if number < len(turns) else last + 1
        limit = turns[number + 1].start - 1 if number + 1 < len(turns) else last
        if not begin <= end <= limit:
            raise ValueError(
                f"Sample {row}: prompt_end_positions[{number}] is {end}; allowed: {begin} to {limit}, behind its "
                "turn's blocks and before those of the next one."
            )
