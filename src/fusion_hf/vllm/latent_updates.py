"""Find the prompts among the tokens of a step, and apply the samplers to them.

Shapes: S tokens of a step over all requests, P prompts with latent blocks of equal length, R turns, q latent tokens
per turn, w window size, D width of the language model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.forward_context import get_forward_context

from fusion_hf.model.modeling_fusion_decoder import FusionSampler, LatentUpdates
from fusion_hf.vllm.prompt_layout import PromptLayout, PromptParser
from fusion_hf.vllm.settings import REASON


class StepPrompt(NamedTuple):
    """A whole prompt with questions, and its first position among the tokens of a step."""

    start: int
    layout: PromptLayout


class LatentUpdate(NamedTuple):
    """
    An update of latent tokens for some prompts of a step.

    Attributes:
        latents: the initial latent tokens of each turn `(P, q, D)`.
        updates: the [`LatentUpdates`], with positions counted from the start of the step.
    """

    latents: torch.Tensor
    updates: LatentUpdates

    def place(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """
        Return a copy of the embeddings with the latent tokens in place.

        Args:
            inputs_embeds (`(S, D)`): the embeddings.
        """
        valid = self.updates.valid
        latents = self.latents.unsqueeze(1).expand(-1, valid.shape[1], -1, -1)[valid].flatten(0, 1)
        return inputs_embeds.index_copy(0, self.updates.latent_positions[valid].flatten(), latents.to(inputs_embeds))

    def rewrite(self, sampler: FusionSampler, hidden_states: torch.Tensor, residual: torch.Tensor) -> None:
        """
        Apply a sampler to the latent tokens of the stream `hidden_states + residual`.

        Args:
            sampler: the sampler.
            hidden_states (`(S, D)`): the hidden states, changed in place.
            residual (`(S, D)`): the residual.
        """
        _, positions, ends, valid = self.updates
        latents = hidden_states[positions] + residual[positions]  # (P, R, q, D)
        questions = (hidden_states[ends] + residual[ends]).unsqueeze(2).expand_as(latents)
        change = sampler.change(latents, questions, self.updates.windows)
        change = torch.where(valid[:, :, None, None], change, 0)
        hidden_states.index_add_(0, positions.flatten(), change.flatten(0, 2).to(hidden_states.dtype))


def find_prompts(parser: PromptParser, input_ids: torch.Tensor | None) -> list[StepPrompt]:
    """
    Find the prompts with questions in the current step. Steps that only decode are skipped.

    Args:
        parser: finds the turns of a prompt.
        input_ids (`(S,)`): the ids of the step.

    Raises:
        RuntimeError: if a prompt arrives in pieces.
    """
    metadata: Any = get_forward_context().attn_metadata
    if metadata is None or input_ids is None:  # the step that measures memory
        return []
    metadata = next(iter(metadata.values()))
    if metadata.max_query_len == 1:
        return []
    starts, totals = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
    ids = input_ids.tolist()
    prompts = []
    for start, stop, total in zip(starts, starts[1:], totals, strict=False):
        length = stop - start
        if 1 < length < total:
            raise RuntimeError(f"A prompt must arrive as a whole, got {length} of its first {total} tokens. {REASON}.")
        if length == total:
            try:
                layout = parser.read(ids[start:stop])
            except ValueError as error:
                raise RuntimeError(f"A prompt arrived in pieces, or is not a chat: {error} {REASON}.") from error
            if layout.query_len:
                prompts.append(StepPrompt(start, layout))
    return prompts


def make_updates(
    prompts: list[StepPrompt],
    contexts: list[torch.Tensor],
    window_size: int,
    grey_windows: Callable[[int], torch.Tensor],
) -> list[LatentUpdate]:
    """
    Make one update for each number of latent tokens.

    Args:
        prompts: the prompts of the step.
        contexts: the windows of each image in order, `(q * w * w, D)` or more rows.
        window_size: the window size.
        grey_windows: returns the windows of prompts without an image, for a number of latent tokens.

    Raises:
        RuntimeError: if the number of images differs from the number of prompts with an image.
    """
    with_image = [prompt for prompt in prompts if prompt.layout.num_image_tokens]
    if len(with_image) != len(contexts):
        raise RuntimeError(
            f"A step must have one image per prompt with an image ({len(with_image)}), got {len(contexts)}. {REASON}."
        )
    remaining = iter(contexts)
    windows: dict[int, list[torch.Tensor]] = {}
    members: dict[int, list[StepPrompt]] = {}
    for prompt in prompts:
        length = prompt.layout.query_len
        shape = (length, window_size**2)
        own = (
            next(remaining)[: length * window_size**2].unflatten(0, shape)
            if prompt.layout.num_image_tokens
            else grey_windows(length)
        )
        windows.setdefault(length, []).append(own)
        members.setdefault(length, []).append(prompt)
    return [_make_update(members[length], torch.stack(windows[length])) for length in members]


def _make_update(prompts: list[StepPrompt], windows: torch.Tensor) -> LatentUpdate:
    """Make an update from windows `(P, q, w * w, D)`."""
    pad, device = nn.utils.rnn.pad_sequence, windows.device
    positions = [torch.from_numpy(prompt.layout.latent_positions + prompt.start) for prompt in prompts]
    ends = [torch.from_numpy(prompt.layout.prompt_end_positions + prompt.start) for prompt in prompts]
    valid = pad([torch.ones(len(row), dtype=torch.bool) for row in ends], batch_first=True)
    updates = LatentUpdates(
        windows,
        pad(positions, batch_first=True).to(device),  # (P, R, q)
        pad(ends, batch_first=True).to(device),  # (P, R)
        valid.to(device),
    )
    has_image = torch.tensor([prompt.layout.num_image_tokens > 0 for prompt in prompts], device=device)
    # a latent token and its window cover the same cell of the map, so their maxima are equal
    latents = torch.where(has_image[:, None, None], windows.amax(2), 0)
    return LatentUpdate(latents, updates)
