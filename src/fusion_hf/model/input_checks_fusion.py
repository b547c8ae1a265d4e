"""Checks of the inputs of a prompt's pass: ids, images, latent blocks and turns must agree.

All values are compared at once on their device, and only one boolean is read from it. If it is false, the values
themselves are examined row by row to name the problem.

Shapes: B batch, S sequence length, R turns (user messages), T question tokens. Source: FUSION, arXiv 2504.09925.
"""

from math import isqrt
from typing import Protocol

import torch
from torch import nn
from transformers import Cache

from .chat_fusion import BETWEEN_BLOCKS
from .configuration_fusion import NUM_TILES, TILES_PER_SIDE, FusionConfig, TokenBudget
from .modeling_fusion_decoder import PlaceholderMasks
from .turns_fusion import (
    ABSENT,
    IGNORED,
    PromptTurns,
    as_padding_mask,
    can_find_turns,
    check_question_form,
    complete_turns,
    count_blocks,
    find_prompt_ends,
    is_known_question,
    locate_prompt_ends,
    most_turns,
    number_turns,
    order_prompt_ends,
)


class Placeholders(Protocol):
    """A model's configuration or its processor, both of which know the ids of the placeholders."""

    image_token_id: int
    latent_token_id: int


def check_prompt_inputs(
    config: FusionConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    pixel_values: torch.Tensor | None,
    global_features: torch.Tensor | None,
    given: PromptTurns,
    budget: TokenBudget,
    cache: Cache | None,
) -> PromptTurns:
    """
    Check the inputs of a prompt's pass and find missing turns and questions.

    Args:
        config ([`FusionConfig`]): Configuration of the model.
        input_ids (`(B, S)`), attention_mask, pixel_values, global_features, cache: Inputs of the model, see
            [`FusionForConditionalGeneration.forward`].
        given ([`PromptTurns`]): Turns as the caller passed them, see [`complete_turns`].
        budget ([`TokenBudget`]): Token counts of the call.

    Returns:
        [`PromptTurns`]: The completed turns, see [`complete_turns`].

    Raises:
        ValueError: If shapes, types or values disagree. The message names both sides.
    """
    if input_ids.shape[1] == 1:  # no turn begins in a later generation step
        check_image(config, len(input_ids), pixel_values, global_features, budget.query_len)
        ends, has_question = given.prompt_end_positions, pixel_values is not None or global_features is not None
        if has_question or (ends is not None and ends.numel() > 0):
            check_reuse(config, input_ids, pixel_values, global_features, given, cache)
            check_prompt(config, input_ids, attention_mask, pixel_values, ends, budget)
        return given
    ends, question, question_mask = given
    if ends is not None:
        given = given._replace(prompt_end_positions=order_prompt_ends(ends, input_ids))
    if question is not None:
        check_question_form(question, question_mask, input_ids)
    mask = as_padding_mask(attention_mask, input_ids)
    check_image(config, len(input_ids), pixel_values, global_features, budget.query_len)
    if bool(is_consistent(config, input_ids, mask, pixel_values, given, budget)):
        check_reuse(config, input_ids, pixel_values, global_features, given, cache)
        return given
    turns = complete_turns(config, input_ids, attention_mask, pixel_values, given)
    check_reuse(config, input_ids, pixel_values, global_features, turns, cache)
    check_prompt(config, input_ids, attention_mask, pixel_values, turns.prompt_end_positions, budget)
    return turns


def is_consistent(
    config: FusionConfig,
    input_ids: torch.Tensor,
    mask: torch.Tensor | None,
    pixel_values: torch.Tensor | None,
    turns: PromptTurns,
    budget: TokenBudget,
) -> torch.Tensor:
    """
    Compare prompts with their images and turns without reading a value from the device.

    Args:
        config ([`FusionConfig`]): Configuration of the model.
        input_ids (`(B, S)`), mask (`(B, S)`, *optional*), pixel_values: Inputs whose shapes are checked.
        turns ([`PromptTurns`]): Turns whose shapes are checked, with prompt ends in order.
        budget ([`TokenBudget`]): Token counts of the call.

    Returns:
        `()`: True only if [`complete_turns`] has nothing to add or change and [`check_prompt`] finds no problem. It is
        also false for a few valid prompts, such as those that truncation cut inside a block.
    """
    masks = PlaceholderMasks.find(input_ids, config)
    ends, question = turns.prompt_end_positions, turns.instruct_input_ids
    results = [_are_images_right(masks, pixel_values, budget), _are_blocks_whole(masks.latent, budget.query_len)]
    if ends is None:
        results.append(~masks.latent.any())
    elif ends.numel() > 0:
        results.append(_are_ends_in_turns(masks, mask, ends))
        if can_find_turns(config):
            results.append(_are_ends_headers(config, input_ids, mask, ends) | ~masks.latent.any())
    if question is not None:
        results.append(is_known_question(question, config))
    elif pixel_values is not None:
        results.append(~masks.image.any())
    return torch.stack(results).all()


def _are_images_right(masks: PlaceholderMasks, pixel_values: torch.Tensor | None, budget: TokenBudget) -> torch.Tensor:
    """Check, as a boolean `()`, that each image has all its tokens before the first latent block, and has pixels."""
    count, positions = masks.image.sum(1), torch.arange(masks.image.shape[1], device=masks.image.device)
    last_image = torch.where(masks.image, positions, -1).amax(1)  # (B)
    first_latent = torch.where(masks.latent, positions, masks.latent.shape[1]).amin(1)
    is_right = ((count == 0) | (count == budget.num_image_tokens)) & (last_image < first_latent)
    if pixel_values is None:
        return (is_right & (count == 0)).all()
    return (is_right & ((count > 0) | ~pixel_values.flatten(1).any(1))).all()


def _are_blocks_whole(latent: torch.Tensor, query_len: int) -> torch.Tensor:
    """Check, as a boolean `()`, that all runs of latent tokens in `(B, S)` have the length `query_len`."""
    order = latent.cumsum(1) - 1
    is_start, is_end = latent.clone(), latent.clone()
    is_start[:, 1:] &= ~latent[:, :-1]
    is_end[:, :-1] &= ~latent[:, 1:]
    # runs start and end at multiples of query_len tokens, and there are as many runs as multiples
    starts_right = ~is_start | (order % query_len == 0)
    ends_right = ~is_end | (order % query_len == query_len - 1)
    return (starts_right & ends_right).all() & (is_start.sum(1) * query_len == latent.sum(1)).all()


def _are_ends_in_turns(masks: PlaceholderMasks, mask: torch.Tensor | None, ends: torch.Tensor) -> torch.Tensor:
    """Check, as a boolean `()`, that the ends `(B, R)` are behind the blocks of their turns and before the next."""
    is_block = masks.image | masks.latent
    batch, length = is_block.shape
    positions = torch.arange(length, device=ends.device).expand(batch, -1)
    attended = positions if mask is None else torch.where(mask.bool(), positions, -1)
    last = attended.amax(1, keepdim=True)  # (B, 1)
    last = torch.where(last < 0, length - 1, last)
    turn, most = number_turns(is_block), most_turns(length)
    is_begin = torch.diff(turn, dim=1, prepend=turn.new_zeros(batch, 1)) > 0
    # column 0 holds what stands before all turns, the last column what follows them
    final = ends.new_full((batch, most + 2), -1)
    final.scatter_reduce_(1, turn, torch.where(is_block, positions, -1), "amax")
    first = (last + 1).repeat(1, most + 2).scatter_reduce_(1, turn, torch.where(is_begin, positions, length), "amin")
    number = torch.arange(1, ends.shape[1] + 1, device=ends.device).clamp(max=most).expand(batch, -1)  # (B, R)
    is_present = ends != ABSENT
    is_inside = (final.gather(1, number) < ends) & (ends < first.gather(1, number + 1)) & (ends <= last)
    count = is_present.sum(1)
    return (is_inside | ~is_present).all() & ((count <= count_blocks(masks.latent)) & (count <= turn[:, -1])).all()


def _are_ends_headers(
    config: FusionConfig, input_ids: torch.Tensor, mask: torch.Tensor | None, ends: torch.Tensor
) -> torch.Tensor:
    """Check, as a boolean `()`, that the ends `(B, R)` are the first headers of all rows with assistant headers."""
    found = locate_prompt_ends(input_ids, mask, config, most_turns(input_ids.shape[1]))  # (B, most)
    has_headers = (found != ABSENT).any(1)
    missing = max(0, ends.shape[1] - found.shape[1])
    found = nn.functional.pad(found, (0, missing), value=ABSENT)[:, : ends.shape[1]]
    is_same = ((ends == found) | (ends == ABSENT)).all(1) & (ends != ABSENT).any(1)
    return (is_same | ~has_headers).all()


def check_ids(input_ids: torch.Tensor | None) -> None:
    """
    Check the shape of ids.

    Args:
        input_ids (`(B, S)`, *optional*): Ids of the prompts.

    Raises:
        ValueError: If the ids are not a tensor of shape `(B, S)`.
    """
    if input_ids is None or (isinstance(input_ids, torch.Tensor) and input_ids.ndim == 2):
        return
    got = tuple(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
    raise ValueError(f"`input_ids` must be a tensor of shape (B, S), got {got}.")


def check_embeds_alone(
    pixel_values: torch.Tensor | None, global_features: torch.Tensor | None, given: PromptTurns
) -> None:
    """
    Check that `inputs_embeds` come without inputs that depend on ids.

    Args:
        pixel_values, global_features, given: Inputs of the model, see [`FusionForConditionalGeneration.forward`].

    Raises:
        ValueError: If such an input is given. The message names the first one.
    """
    ends, question, _ = given
    is_given = {
        "pixel_values": pixel_values is not None,
        "global_features": global_features is not None,
        "prompt_end_positions": ends is not None and ends.numel() > 0,
        "instruct_input_ids": question is not None and len(question) > 0,
    }
    for name, value in is_given.items():
        if value:
            raise ValueError(f"`{name}` must be None without `input_ids`: the model finds placeholders by their ids.")


def check_tiles(config: FusionConfig, pixel_values: torch.Tensor) -> None:
    """
    Check the shape of tiles.

    Args:
        config ([`FusionConfig`]): Configuration of the model.
        pixel_values: Tiles of images `(B, 4, 3, H, W)`, or tiles with their overviews `(B, 5, 3, H, W)`.

    Raises:
        ValueError: If the shape is wrong. The message names both shapes.
    """
    size, channels = config.vision_config.image_size, config.vision_config.num_channels
    allowed = [(NUM_TILES + 1, channels, size, size), (NUM_TILES, channels, size, size)]
    if tuple(pixel_values.shape[1:]) not in allowed:
        shapes = " or ".join(f"(B, {', '.join(map(str, shape))})" for shape in allowed)
        raise ValueError(f"`pixel_values` must have the shape {shapes}, got {tuple(pixel_values.shape)}.")


def check_image(
    config: FusionConfig,
    batch: int,
    pixel_values: torch.Tensor | None,
    global_features: torch.Tensor | None,
    query_len: int,
) -> None:
    """
    Check that images, or the features of their tiles, fit the model, the latent tokens and the batch size.

    Args:
        config ([`FusionConfig`]): Configuration of the model.
        batch (`int`): Number of samples B.
        pixel_values, global_features (*optional*): Inputs of the model, see
            [`FusionForConditionalGeneration.forward`].
        query_len (`int`): Number of latent tokens per turn.

    Raises:
        ValueError: If a shape does not fit. The message names both shapes.
    """
    if pixel_values is not None:
        size, channels = config.vision_config.image_size, config.vision_config.num_channels
        expected = (batch, NUM_TILES + 1, channels, size, size)
        overviews = (batch, 1, channels, size, size)
        needed = [expected] if global_features is None else [expected, overviews]
        if tuple(pixel_values.shape) not in needed:
            shapes = " or ".join(map(str, needed))
            got = tuple(pixel_values.shape)
            raise ValueError(f"`pixel_values` must have the shape {shapes} for {batch} samples, got {got}.")
    if global_features is not None:
        whole, pooled = TILES_PER_SIDE * config.num_patches_per_side, isqrt(query_len) * config.window_size
        width = config.text_config.hidden_size
        features = (batch, width, whole, whole)
        if tuple(global_features.shape) not in (features, (batch, width, pooled, pooled)):
            raise ValueError(
                f"`global_features` must have the shape {features} for {batch} samples of this model, as "
                f"`get_global_features` returns them, or be pooled to {pooled} x {pooled} for a `query_len` of "
                f"{query_len}, got {tuple(global_features.shape)}."
            )
        if not global_features.is_floating_point():
            raise ValueError(f"`global_features` must be a floating-point tensor, got {global_features.dtype}.")


def check_prompt(
    config: Placeholders,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    pixel_values: torch.Tensor | None,
    prompt_end_positions: torch.Tensor | None,
    budget: TokenBudget,
) -> None:
    """
    Check row by row on the CPU that ids, images, latent blocks and turns of prompts agree.

    Args:
        config ([`FusionConfig`] or [`FusionProcessor`]): Configuration or processor, which know the placeholders.
        input_ids (`(B, S)`), attention_mask (`(B, S)`, *optional*), pixel_values (`(B, ...)`, *optional*),
            prompt_end_positions (`(B, R)`, *optional*): Inputs of the model.
        budget ([`TokenBudget`]): Token counts of the call.

    Raises:
        ValueError: If they disagree. The message names the sample and both counts.
    """
    batch, length = input_ids.shape
    turns = [[]] * batch if prompt_end_positions is None else prompt_end_positions.tolist()
    if len(turns) != batch:
        raise ValueError(f"`prompt_end_positions` must have a row for each of {batch} samples, got {len(turns)}.")
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        attention_mask = torch.ones_like(input_ids)
    for row, (ids, mask) in enumerate(zip(input_ids.cpu(), attention_mask[:, -length:].cpu(), strict=True)):
        attended = mask.nonzero().flatten().tolist()
        last = attended[-1] if attended else length - 1  # truncation may cut a block, but only at the very end
        ends = [end for end in turns[row] if end != -1]
        if ends and max(ends) > last:
            raise ValueError(
                f"Sample {row}: `prompt_end_positions` must be at most {last}, the last token, got {max(ends)}. If "
                "the prompt was truncated, allow longer samples (`max_length` of a trainer) or leave this one out."
            )
        image = (ids == config.image_token_id).nonzero().flatten().tolist()
        latent = (ids == config.latent_token_id).nonzero().flatten().tolist()
        if image and pixel_values is None:
            raise ValueError(f"Sample {row} has {len(image)} image tokens, but `pixel_values` is None.")
        if not image and pixel_values is not None and bool(pixel_values[row].any()):
            raise ValueError(
                f"Sample {row} has no image tokens, so its `pixel_values` must be zeros, but they hold an image. "
                "Write prompts with the chat template of the processor."
            )
        most = budget.num_image_tokens
        if image and len(image) != most and (len(image) > most or image[-1] != last):
            raise ValueError(
                f"Sample {row} must have {most} image tokens, as `image_token_grid` is {budget.image_token_grid}, got "
                f"{len(image)}."
            )
        if image and latent and image[-1] > latent[0]:
            raise ValueError(f"Sample {row}: the image must come before the first latent block.")
        _check_blocks(row, _blocks(latent), budget.query_len, last)
        _check_turns(row, image, latent, ends, budget.query_len, last)


def check_reuse(
    config: FusionConfig,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    global_features: torch.Tensor | None,
    turns: PromptTurns,
    cache: Cache | None,
) -> None:
    """
    Check that a cache and features of tiles are passed with the inputs that they need.

    Args:
        config ([`FusionConfig`]): Configuration of the model.
        input_ids (`(B, S)`), pixel_values, global_features, turns, cache: Inputs of the model, see
            [`FusionForConditionalGeneration.forward`].

    Raises:
        ValueError: If an input is missing, or must not be given. The message names it.
    """
    has_turns = turns.prompt_end_positions is not None and turns.prompt_end_positions.numel() > 0
    continues = cache is not None and cache.get_seq_length() > 0
    if global_features is not None and pixel_values is None:
        if not (continues and has_turns):
            raise ValueError(
                "`global_features` need `pixel_values`, whose overview is encoded, or a cache that holds the overview "
                "and the `prompt_end_positions` of the following turns."
            )
        if turns.instruct_input_ids is not None:
            raise ValueError("`instruct_input_ids` must be None, because the cache holds the guided overview already.")
    elif continues and has_turns:
        check_continuation(config, input_ids)
        name = "prompt_end_positions" if pixel_values is None else "pixel_values"
        raise ValueError(f"`{name}` must be None, because the cache already holds the beginning of the prompt.")


def check_continuation(config: FusionConfig, input_ids: torch.Tensor) -> None:
    """
    Check ids that follow a cache.

    Args:
        config ([`FusionConfig`]): Configuration of the model.
        input_ids (`(B, S)`): Ids that are not in the cache yet.

    Raises:
        ValueError: If the ids contain image or latent tokens.
    """
    if PlaceholderMasks.find(input_ids, config).any():
        raise ValueError(
            "A prompt with image or latent tokens cannot continue a cache. Pass the whole conversation at once, or "
            "pass `global_features` of the image without `pixel_values`."
        )


def _blocks(positions: list[int], gap: int = 0) -> list[range]:
    """Return the runs of positions with gaps of at most `gap` other positions."""
    starts = [p for i, p in enumerate(positions) if i == 0 or p - positions[i - 1] > gap + 1]
    ends = [p + 1 for i, p in enumerate(positions) if i + 1 == len(positions) or positions[i + 1] - p > gap + 1]
    return [range(start, end) for start, end in zip(starts, ends, strict=True)]


def _check_blocks(row: int, blocks: list[range], query_len: int, last: int) -> None:
    for number, block in enumerate(blocks):
        if len(block) != query_len and not (len(block) < query_len and block[-1] == last):
            count = len(block)
            allowed = f"{query_len} tokens (`query_len`)"
            raise ValueError(f"Sample {row}: latent block {number} must have {allowed}, got {count}.")


def _check_turns(row: int, image: list[int], latent: list[int], ends: list[int], query_len: int, last: int) -> None:
    """Check that each turn ends behind its blocks and before those of the next turn."""
    blocks = len(_blocks(latent))
    if len(ends) > blocks:
        raise ValueError(
            f"Sample {row} has {len(ends)} `prompt_end_positions` but {blocks} latent blocks. If the sequence was "
            "truncated, allow more tokens (`max_length`)."
        )
    turns = _blocks(image + latent, BETWEEN_BLOCKS)
    if image and len(turns) > 1 and turns[0][-1] == image[-1] and not any(end < turns[1].start for end in ends):
        # Text separates the image from the latent block of its turn. If a turn ended behind the image, the image would
        # belong to a turn without a latent block: a later question has the image and takes the first block.
        turns = [range(turns[0].start, turns[1].stop), *turns[2:]]
    for number, end in enumerate(ends):
        begin = turns[number][-1] + 1 if number < len(turns) else last + 1
        limit = turns[number + 1].start - 1 if number + 1 < len(turns) else last
        if not begin <= end <= limit:
            raise ValueError(
                f"Sample {row}: `prompt_end_positions[{number}]` must be from {begin} to {limit}, behind the blocks "
                f"of its turn and before those of the next one, got {end}."
            )


def check_labelled_ends(
    input_ids: torch.Tensor, labels: torch.Tensor, ends: torch.Tensor, config: FusionConfig
) -> None:
    """
    Check that no prompt ends inside an answer, because the answer would leak into the latent tokens.

    Args:
        input_ids (`(B, S)`), labels (`(B, S)`): Ids and labels. Positions before an answer have the label -100, unless
            a trainer labels prompts as well.
        ends (`(B, R)`): `prompt_end_positions`. For rows with assistant headers, they are compared with the headers.
        config ([`FusionConfig`]): Configuration of the model.

    Raises:
        ValueError: If a prompt ends at a labelled token although the prompt itself is not labelled.
    """
    if not isinstance(ends, torch.Tensor) or ends.ndim != 2 or ends.numel() == 0:
        return
    if len(ends) != len(input_ids) or labels.shape != input_ids.shape:
        return  # another check refuses these
    ends = ends.to(labels.device, torch.long)
    leaks = _find_leaks(input_ids, labels, ends, config)  # (B, R)
    if not bool(leaks.any()):
        return
    if can_find_turns(config):  # the ids confirm or correct the ends of rows with headers
        found = find_prompt_ends(input_ids, None, config)
        leaks &= (found == ABSENT).all(1, keepdim=True) & (found.shape[1] > 0)
    for row, turn in leaks.nonzero().tolist():
        raise ValueError(
            f"Sample {row}: `prompt_end_positions[{turn}]` must be before the answer (the labels that are not "
            f"{IGNORED}), got {int(ends[row, turn])}."
        )


def _find_leaks(
    input_ids: torch.Tensor, labels: torch.Tensor, ends: torch.Tensor, config: FusionConfig
) -> torch.Tensor:
    """Return which ends `(B, R)` are labelled although a token between the last block and the end is not labelled."""
    length = labels.shape[1]
    masks = PlaceholderMasks.find(input_ids, config)
    positions = torch.arange(length, device=labels.device).expand_as(labels)
    last_block = torch.where(masks.image | masks.latent, positions, -1).cummax(1).values  # (B, S)
    num_ignored = (labels == IGNORED).cumsum(1)
    is_inside = (ends > 0) & (ends < length)
    before = (ends - 1).clamp(0, length - 1)
    begin = last_block.gather(1, before)  # the block's last token, or -1
    ignored = num_ignored.gather(1, before) - torch.where(begin < 0, 0, num_ignored.gather(1, begin.clamp(min=0)))
    is_labelled = labels.gather(1, ends.clamp(0, length - 1)) != IGNORED
    return is_inside & is_labelled & (ignored > 0)
