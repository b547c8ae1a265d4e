"""The prompts among the tokens of a step, and what samplers change in them.

Shapes: S tokens of a step, all requests in a row; P prompts with equally long latent blocks, R turns, q latent tokens
per turn, w window size, D LLM width.
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
    """A whole prompt with questions, and where it begins among the tokens of a step."""

    start: int
    layout: PromptLayout


class LatentUpdate(NamedTuple):
    """
    latents (`(P, q, D)`): what the latent tokens of each turn start from.
    updates ([`LatentUpdates`]): their positions count from the beginning of the step.
    """

    latents: torch.Tensor
    updates: LatentUpdates

    def place(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Return a copy of `(S, D)` with the latent tokens in place."""
        valid = self.updates.valid
        latents = self.latents.unsqueeze(1).expand(-1, valid.shape[1], -1, -1)[valid].flatten(0, 1)
        return inputs_embeds.index_copy(0, self.updates.latent_positions[valid].flatten(), latents.to(inputs_embeds))

    def rewrite(self, sampler: FusionSampler, hidden_states: torch.Tensor, residual: torch.Tensor) -> None:
        """Change `hidden_states` `(S, D)`, in place, of a stream `hidden_states + residual`."""
        _, positions, ends, valid = self.updates
        latents = hidden_states[positions] + residual[positions]  # (P, R, q, D)
        questions = (hidden_states[ends] + residual[ends]).unsqueeze(2).expand_as(latents)
        change = sampler.change(latents, questions, self.updates.windows)
        change = torch.where(valid[:, :, None, None], change, 0)
        hidden_states.index_add_(0, positions.flatten(), change.flatten(0, 2).to(hidden_states.dtype))


def find_prompts(parser: PromptParser, input_ids: torch.Tensor | None) -> list[StepPrompt]:
    """
    Find the prompts with questions in the present step. A step of decoding alone is not looked at.

    Raises:
        RuntimeError: if a prompt arrives in pieces.
    """
    metadata: Any = get_forward_context().attn_metadata
    if metadata is None or input_ids is None:  # vLLM measures memory
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
            raise RuntimeError(f"A prompt arrives in pieces: {length} of its first {total} tokens. {REASON}.")
        if length == total:
            try:
                layout = parser.read(ids[start:stop])
            except ValueError as error:
                raise RuntimeError(f"A prompt arrives in pieces, or is no chat: {error} {REASON}.") from error
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
    Make one update for each number of latent tokens. `contexts`: `(q * w * w or more, D)` of each image, in order.

    Raises:
        RuntimeError: if there are more or fewer images than prompts with one.
    """
    with_image = [prompt for prompt in prompts if prompt.layout.num_image_tokens]
    if len(with_image) != len(contexts):
        raise RuntimeError(f"A step has {len(contexts)} images for {len(with_image)} prompts with one. {REASON}.")
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
    """`windows`: `(P, q, w * w, D)`."""
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
    # a latent token's cell of the map is that of its window, so its maximum is the window's
    latents = torch.where(has_image[:, None, None], windows.amax(2), 0)
    return LatentUpdate(latents, updates)
