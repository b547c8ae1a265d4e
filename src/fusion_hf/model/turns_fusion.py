"""Turns and questions of a prompt, found in its ids.

FUSION's samplers need the end of each turn's prompt, and its vision tower needs the questions. The processor returns
both. If a caller loses them, such as a trainer that keeps only ids, they are found here. The result does not depend on
padding or on how a batch was assembled.

Shapes: B batch, S sequence length, R turns (user messages), T question tokens. Source: FUSION, arXiv 2504.09925.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .chat_fusion import BETWEEN_BLOCKS, CHAT_FORMATS, VISION_END, VISION_START, TextProtector
from .configuration_fusion import FusionConfig
from .prompt_tokens_fusion import tokenize_alone

ABSENT = -1  # prompt end of a turn that a row does not have
IGNORED = -100  # label that the loss ignores
LOADED_TOKENIZERS = 8  # maximum number of folders whose tokenizers are kept
# Questions in many scripts. Their ids in a prompt are compared with those of the same text alone.
SAMPLES = (
    "What is this?", "was", "a", "I", "3 cats", "(a) or (b)?", '"Stop"', "don't", "<b>", "x = 2", "/home", "e.g. it",
    "¿Qué es?", "Où ?", "Что это?", "Τι είναι;", "这是什么?", "これは何?",
    "이게 뭐야?", "ما هذا؟", "זה מה", "यह क्या है?", "นี่อะไร", "😀?",
)  # fmt: skip


class PromptTurns(NamedTuple):
    """Information about turns that the pass over a prompt needs."""

    prompt_end_positions: torch.Tensor | None  # (B, R)
    instruct_input_ids: torch.Tensor | None  # (B, T)
    instruct_attention_mask: torch.Tensor | None  # (B, T)


def complete_turns(
    config: FusionConfig,
    input_ids: torch.Tensor,
    attention_mask: Any,
    pixel_values: torch.Tensor | None,
    given: PromptTurns,
) -> PromptTurns:
    """
    Find missing turns and questions, and correct positions that padding has moved.

    Args:
        config ([`FusionConfig`]): Configuration of the model.
        input_ids (`(B, S)`): Prompts. Prompts without latent blocks have no turns.
        attention_mask (`(B, S)`, *optional*): Mask of the padding. None, or a mask of another rank, means no padding.
        pixel_values (*optional*): Images. Without them, no question is needed.
        given ([`PromptTurns`]): Turns as the caller passed them. An empty tensor `(B, 0)` means no samplers or no
            question.

    Returns:
        [`PromptTurns`]: The completed turns.

    Raises:
        ValueError: If something that is missing cannot be found, or if positions disagree with the ids.
    """
    ends, question, question_mask = given
    if ends is not None:
        ends = order_prompt_ends(ends, input_ids)
    if question is not None:
        check_question_form(question, question_mask, input_ids)
        _check_question_ids(question, config)
    mask = as_padding_mask(attention_mask, input_ids)
    if bool((input_ids == config.latent_token_id).any()):
        if ends is None:
            _require_format(config, "prompt_end_positions", "samplers")
            ends = find_prompt_ends(input_ids, mask, config)
            _require_headers(ends, input_ids, config)
        elif ends.numel() > 0 and can_find_turns(config):
            ends = _put_right(ends, find_prompt_ends(input_ids, mask, config), mask)
    if question is None and pixel_values is not None and bool((input_ids == config.image_token_id).any()):
        _require_format(config, "instruct_input_ids", "question")
        question, question_mask = find_questions(input_ids, mask, config)
    return PromptTurns(ends, question, question_mask)


def as_padding_mask(attention_mask: Any, input_ids: torch.Tensor) -> torch.Tensor | None:
    """
    Return the part of an attention mask that belongs to ids.

    Args:
        attention_mask (*optional*): Any attention mask that transformers accepts.
        input_ids (`(B, S)`): Ids of the prompts.

    Returns:
        `(B, S)`: The mask, or None if it does not describe padding.

    Raises:
        ValueError: If the mask does not cover the ids.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        return None
    if len(attention_mask) != len(input_ids) or attention_mask.shape[1] < input_ids.shape[1]:
        raise ValueError(
            f"`attention_mask` must cover `input_ids` of shape {tuple(input_ids.shape)}, got the shape "
            f"{tuple(attention_mask.shape)}."
        )
    return attention_mask[:, -input_ids.shape[1] :]


def lacks_turns(pixel_values: torch.Tensor | None, given: PromptTurns) -> bool:
    """
    Return whether turns or questions are missing that a prompt with latent blocks needs.

    Args:
        pixel_values (*optional*): Images of the prompts.
        given ([`PromptTurns`]): Turns as the caller passed them.
    """
    return given.prompt_end_positions is None or (given.instruct_input_ids is None and pixel_values is not None)


def can_find_turns(config: FusionConfig) -> bool:
    """Return whether the configuration describes how ids mark turns, which folders of older releases do not."""
    return config.assistant_header_ids is not None and config.turn_end_token_id is not None


def _require_format(config: FusionConfig, argument: str, purpose: str) -> None:
    known = can_find_turns(config) and (argument != "instruct_input_ids" or config.user_header_ids is not None)
    if not known:
        raise ValueError(
            f"`{argument}` is missing and cannot be found in `input_ids`, because the model's configuration lacks "
            f"`assistant_header_ids`, `user_header_ids` or `turn_end_token_id`. Pass `{argument}` as the processor "
            f"returns it, or an empty `(B, 0)` tensor for no {purpose}."
        )


def _require_headers(ends: torch.Tensor, input_ids: torch.Tensor, config: FusionConfig) -> None:
    latent = input_ids == config.latent_token_id
    for row, (found, has_latents) in enumerate(zip(ends.tolist(), latent.any(1).tolist(), strict=True)):
        # the last block of a truncated or unfinished conversation may have no header
        known = [end for end in found if end != ABSENT]
        if has_latents and (not known or found[: len(known)] != known):
            raise ValueError(
                f"Sample {row} has a latent block but no assistant header behind it, so `prompt_end_positions` cannot "
                "be found. End the prompt as the chat template does with `add_generation_prompt=True`, allow longer "
                "samples if a trainer truncated it (`max_length`), or pass `prompt_end_positions` (an empty `(B, 0)` "
                "tensor for no samplers)."
            )


def order_prompt_ends(ends: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """
    Sort given `prompt_end_positions`.

    Args:
        ends (`(B, R)`): Positions as the caller passed them, padded with -1 or 0 on any side.
        input_ids (`(B, S)`): Ids of the prompts.

    Returns:
        `(B, R)`: Integers on the device of `input_ids`: the present positions in their order, then -1.

    Raises:
        ValueError: If the shape or the type is wrong.
    """
    if not isinstance(ends, torch.Tensor):
        raise ValueError(f"`prompt_end_positions` must be a tensor of integers, got {type(ends).__name__}.")
    if ends.ndim != 2 or len(ends) != len(input_ids):
        raise ValueError(
            f"`prompt_end_positions` must have the shape (B, R) with B = {len(input_ids)} samples, got "
            f"{tuple(ends.shape)}."
        )
    if ends.numel() == 0:
        return ends  # an empty tensor may have any type
    if ends.is_floating_point() or ends.is_complex() or ends.dtype == torch.bool:
        raise ValueError(f"`prompt_end_positions` must be a tensor of integers, got {ends.dtype}.")
    ends = ends.to(input_ids.device, torch.long)
    # no prompt can end at position 0, which collators of other projects use for padding
    is_absent = (ends == ABSENT) | (ends == 0)
    order = is_absent.long().argsort(dim=1, stable=True)
    return ends.masked_fill(is_absent, ABSENT).gather(1, order)


def check_question_form(question: torch.Tensor, mask: torch.Tensor | None, input_ids: torch.Tensor) -> None:
    """
    Check the shapes and types of given questions.

    Args:
        question (`(B, T)`): Ids of the questions.
        mask (`(B, T)`, *optional*): Mask of the questions.
        input_ids (`(B, S)`): Ids of the prompts.

    Raises:
        ValueError: If the vision tower cannot read them.
    """
    given = {"instruct_input_ids": question} | ({} if mask is None else {"instruct_attention_mask": mask})
    for name, value in given.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"`{name}` must be a tensor, got {type(value).__name__}.")
        if value.ndim != 2 or len(value) != len(input_ids):
            raise ValueError(
                f"`{name}` must have the shape (B, T) with B = {len(input_ids)} samples, got {tuple(value.shape)}."
            )
        if value.shape != question.shape:
            raise ValueError(
                f"`{name}` must have the shape of `instruct_input_ids`, {tuple(question.shape)}, got "
                f"{tuple(value.shape)}."
            )
    is_integer = not question.is_floating_point() and not question.is_complex() and question.dtype != torch.bool
    if question.numel() > 0 and not is_integer:
        raise ValueError(f"`instruct_input_ids` must be a tensor of integers, got {question.dtype}.")


def is_known_question(question: torch.Tensor, config: FusionConfig) -> torch.Tensor:
    """Check, as a boolean `()`, that all ids of questions `(B, T)` have an embedding."""
    return ((question >= 0) & (question < config.text_config.vocab_size)).all()


def _check_question_ids(question: torch.Tensor, config: FusionConfig) -> None:
    """Raise a `ValueError` if an id of questions `(B, T)` has no embedding."""
    if question.numel() == 0:
        return
    least, most = int(question.min()), int(question.max())
    allowed = config.text_config.vocab_size - 1
    if least < 0 or most > allowed:
        wrong = least if least < 0 else most
        raise ValueError(
            f"`instruct_input_ids` must hold ids from 0 to {allowed}, and {config.instruct_pad_token_id} as padding, "
            f"got {wrong}."
        )


def _put_right(ends: torch.Tensor, found: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Move prompt ends `(B, R)` with rows that a collator moved. Raise a `ValueError` if they fit no headers."""
    rows = [[end for end in row if end != ABSENT] for row in ends.tolist()]
    known = [[end for end in row if end != ABSENT] for row in found.tolist()]
    length = found.new_zeros(len(rows)) if mask is None else mask.long().sum(1)
    padding = [0] * len(rows) if mask is None else mask.long().argmax(1).tolist()  # on the left
    moved = [_shift(given, exact) for given, exact in zip(rows, known, strict=True)]
    is_batch = _is_moved_batch(rows, moved, length.tolist())
    for row, (given, exact, shift) in enumerate(zip(rows, known, moved, strict=True)):
        if shift == 0 or not exact:
            continue
        if shift is None or not (is_batch or shift == -padding[row]):
            raise ValueError(
                f"Sample {row}: `prompt_end_positions` must be the ends of its assistant headers, {exact}, got "
                f"{given}. Pass an empty `(B, 0)` tensor for no samplers."
            )
        ends[row, : len(given)] = ends.new_tensor(exact[: len(given)])
    return ends


def _is_moved_batch(rows: list[list[int]], moved: list[int | None], lengths: list[int]) -> bool:
    """Return whether left padding was lost: prompts ended together before answers followed, or whole rows did."""
    given = [(row[-1], shift, length) for row, shift, length in zip(rows, moved, lengths, strict=True) if row]
    shifts = [shift for _, shift, _ in given if shift is not None]
    if len(shifts) < len(given) or len(set(shifts)) < 2 or min(shifts) < 0:
        return False
    ends_together = len({end for end, _, _ in given}) == 1
    return ends_together or len({shift + length for _, shift, length in given if shift is not None}) == 1


def _shift(given: list[int], exact: list[int]) -> int | None:
    """Return by how much all given positions are behind the exact ones; None if shifts differ or none is given."""
    shifts = {end - known for end, known in zip(given, exact, strict=False)}
    return shifts.pop() if len(shifts) == 1 and len(given) <= len(exact) else None


def ignore_placeholders(labels: torch.Tensor | None, config: FusionConfig) -> torch.Tensor | None:
    """
    Set image and latent placeholders in labels to -100, because the language model cannot predict them.

    Args:
        labels (`(B, S)`, *optional*): The labels.
        config ([`FusionConfig`]): Configuration of the model.

    Returns:
        `(B, S)`: A copy of the labels, or None.
    """
    if labels is None:
        return None
    return labels.masked_fill((labels == config.image_token_id) | (labels == config.latent_token_id), IGNORED)


def find_prompt_ends(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: FusionConfig
) -> torch.Tensor:
    """
    Find the last token of the assistant header behind the blocks of each turn.

    A turn begins with one block of image or latent tokens, or with several adjacent blocks. An image in a later
    question takes the first block of the conversation, so a latent block may follow its prompt's end.

    Args:
        input_ids (`(B, S)`): Ids of the prompts.
        attention_mask (`(B, S)`, *optional*): Mask of the padding, which is skipped.
        config ([`FusionConfig`]): Configuration with the ids of an assistant header.

    Returns:
        `(B, R)`: Indices in `input_ids`, -1 for a turn without a header behind it.
    """
    latent = input_ids == config.latent_token_id
    most = int(number_turns(latent | (input_ids == config.image_token_id))[:, -1].max())
    return locate_prompt_ends(input_ids, attention_mask, config, most)[:, : int(count_blocks(latent).max())]


def most_turns(length: int) -> int:
    """Return the maximum number of turns that can begin in a prompt with `length` tokens."""
    return -(-length // (BETWEEN_BLOCKS + 2))


def number_turns(is_block: torch.Tensor) -> torch.Tensor:
    """Return `(B, S)`, how many turns have begun at each position, from a mask `(B, S)` of the blocks."""
    begins = is_block.clone()
    for distance in range(1, BETWEEN_BLOCKS + 2):
        begins[:, distance:] &= ~is_block[:, :-distance]
    return begins.cumsum(1)


def count_blocks(latent: torch.Tensor) -> torch.Tensor:
    """Return the number `(B,)` of runs of latent tokens, from a mask `(B, S)` of these tokens."""
    return latent[:, :1].sum(1) + (latent[:, 1:] & ~latent[:, :-1]).sum(1)


def locate_prompt_ends(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: FusionConfig, most: int
) -> torch.Tensor:
    """
    Find prompt ends as [`find_prompt_ends`] does, without reading a value from the device.

    Args:
        input_ids (`(B, S)`), attention_mask (`(B, S)`, *optional*), config: See [`find_prompt_ends`].
        most (`int`): Upper bound for the number of turns in any prompt.

    Returns:
        `(B, most)`: Indices in `input_ids`, -1 for a turn that has no header behind it or does not exist.
    """
    length = input_ids.shape[1]
    header = config.assistant_header_ids or []
    latent = input_ids == config.latent_token_id  # (B, S)
    turn = number_turns(latent | (input_ids == config.image_token_id))
    found = torch.full((len(input_ids), most + 1), length, device=input_ids.device)  # (B, 1 + most)
    reach = len(header) - 1 + config.assistant_header_tail  # from a header's first token to its last
    if length > reach:
        # compare with numbers, because a tensor would have to be copied to the device
        parts = [input_ids[:, place : length - reach + place] == token for place, token in enumerate(header)]
        is_header = torch.stack(parts).all(0)  # (B, S - reach)
        ends = torch.arange(reach, length, device=input_ids.device).expand(len(input_ids), -1)
        if attention_mask is not None:
            is_header = is_header & attention_mask[:, reach:].bool()
        # the first header behind each turn's blocks; headers before all blocks go to column 0
        ends = torch.where(is_header, ends, length)
        found.scatter_reduce_(1, turn[:, : length - reach], ends, "amin")
    found = torch.where(found < length, found, ABSENT)
    # an image that text, but no header, separates from the first latent block belongs to the turn of that block
    has_latents = torch.zeros_like(found).scatter_reduce_(1, turn, latent.long(), "amax")  # (B, 1 + R)
    is_alone = ((found == ABSENT) & (has_latents == 0))[:, 1:]
    found = found[:, 1:].gather(1, is_alone.long().argsort(dim=1, stable=True))
    # truncation may keep the end of a turn but remove the latent block behind it
    turns = torch.arange(most, device=found.device)
    return found.masked_fill(turns >= count_blocks(latent)[:, None], ABSENT)


def find_questions(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: FusionConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Extract the questions from prompts, with the ids that the tokenizer gives to a standalone question.

    Args:
        input_ids (`(B, S)`), attention_mask (`(B, S)`, *optional*): Inputs of the model.
        config ([`FusionConfig`]): Configuration with the ids that begin and end a user message. If the ids of a
            question depend on the text before it, the tokenizer is loaded from the folder of the model.

    Returns:
        `instruct_input_ids` and `instruct_attention_mask`, `(B, T)`. A prompt without an image has no question.

    Raises:
        ValueError: If a prompt is not written as the chat template does, or if a tokenizer is needed but missing.
    """
    rows, pad = input_ids.tolist(), config.instruct_pad_token_id
    if attention_mask is not None:
        masks = attention_mask.tolist()
        rows = [[i for i, kept in zip(*row, strict=True) if kept] for row in zip(rows, masks, strict=True)]
    questions = [_question(row, ids, config) or [pad] for row, ids in enumerate(rows)]
    longest = max(map(len, questions))
    padded = input_ids.new_tensor([ids + [pad] * (longest - len(ids)) for ids in questions])  # (B, T)
    return padded, (padded != pad).long()


def _question(row: int, ids: list[int], config: FusionConfig) -> list[int]:
    """Return the questions of one prompt as ids of a standalone text."""
    if config.image_token_id not in ids:
        return []
    messages = _user_messages(ids, config)
    if messages is None:
        raise ValueError(
            f"Sample {row} has an image, but its user messages are truncated or not written as the chat template "
            "does, so `instruct_input_ids` cannot be found. Pass `instruct_input_ids` as the processor returns it, or "
            "an empty `(B, 0)` tensor for no question."
        )
    if len(messages) == 1 and config.questions_are_cut:
        return [*(config.question_prefix_ids or ()), *messages[0]]
    # the questions of several turns are tokenized as one text, so the ids at their borders may differ
    commit = getattr(config, "_commit_hash", None)  # only models from the Hub have one
    tokenizer = load_tokenizer(config._name_or_path, commit)
    if tokenizer is None:
        raise ValueError(
            "`instruct_input_ids` is missing and cannot be found in `input_ids`, because the ids of these questions "
            f"depend on the text before them and {config._name_or_path!r} has no tokenizer. Pass `instruct_input_ids` "
            "as the processor returns it, or an empty `(B, 0)` tensor for no question."
        )
    if any(number >= len(tokenizer) for message in messages for number in message):
        raise ValueError(
            "`instruct_input_ids` is missing and cannot be found in `input_ids`, because the tokenizer in "
            f"{config._name_or_path!r} lacks one of their tokens. Pass `instruct_input_ids` as the processor returns "
            "it."
        )
    texts = [tokenizer.decode(message, clean_up_tokenization_spaces=False).strip() for message in messages]
    # text that only looks like a special token was broken up in the prompt
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    sanitize = not any(number in special for message in messages for number in message)
    return tokenize_alone([TextProtector(tokenizer, sanitize).protect("".join(texts))], tokenizer)[0]


def _user_messages(ids: list[int], config: FusionConfig) -> list[list[int]] | None:
    """Return a prompt's user messages without blocks and separators; None if one is not written as the template."""
    header = config.user_header_ids or []
    starts = [i + len(header) for i in range(len(ids) - len(header) + 1) if ids[i : i + len(header)] == header]
    messages = []
    for start in starts:
        if config.turn_end_token_id not in ids[start:]:
            return None
        text = _without_blocks(ids[start : ids.index(config.turn_end_token_id, start)], config)
        if text is None:
            return None
        messages.append(text)
    return messages or None


def _without_blocks(message: list[int], config: FusionConfig) -> list[int] | None:
    """Return the rest of a message behind its blocks; None if there is no block, or another one in the rest."""
    placeholders = {config.image_token_id, config.latent_token_id}
    start = config.user_header_tail
    while start < len(message) and message[start] in placeholders | {config.vision_start_token_id}:
        is_framed = message[start] == config.vision_start_token_id
        end = next((i for i in range(start + 1, len(message)) if message[i] not in placeholders), len(message))
        if is_framed and message[end : end + 1] != [config.vision_end_token_id]:
            return None
        start = end + is_framed
    if start == config.user_header_tail or placeholders & set(message[start:]):
        return None
    separator = config.question_separator_ids or []
    return (
        message[start + len(separator) :] if message[start : start + len(separator)] == separator else message[start:]
    )


@lru_cache(maxsize=LOADED_TOKENIZERS)
def load_tokenizer(folder: str, revision: str | None) -> PreTrainedTokenizerBase | None:
    """
    Load the tokenizer of a model, once per process.

    Args:
        folder (`str`): Model folder or repository.
        revision (`str`, *optional*): Commit of a repository.

    Returns:
        `PreTrainedTokenizerBase`: The tokenizer, or None if there is none.
    """
    if not folder:
        return None
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, revision=revision or "main")
    except (OSError, ValueError):
        return None


def describe_turns(processor: Any) -> dict[str, Any]:
    """
    Describe how the chat format of a processor is written in ids.

    Args:
        processor ([`FusionProcessor`]): Processor of the model.

    Returns:
        `dict`: Values for the fields of [`FusionConfig`] by which the model finds turns and questions in ids.
    """
    tokenizer, chat_format = processor.tokenizer, CHAT_FORMATS[processor.chat_format]
    vocabulary = tokenizer.get_vocab()
    end, vision_end = vocabulary[chat_format.turn_end], vocabulary[VISION_END]

    def behind_vision_end(text: str) -> list[int]:
        ids = tokenizer(f"{VISION_END}{text}{chat_format.turn_end}", add_special_tokens=False)["input_ids"]
        return ids[ids.index(vision_end) + 1 : ids.index(end)]

    header, header_tail = _describe_header(chat_format.assistant_header, tokenizer)
    user_header, user_header_tail = _describe_header(chat_format.user_header, tokenizer, VISION_START)
    separator, prefix = behind_vision_end("\n"), tokenizer("")["input_ids"]
    texts = list(map(TextProtector(tokenizer).protect, SAMPLES))
    cuts = [[*prefix, *behind_vision_end(f"\n{text}")[len(separator) :]] for text in texts]
    return {
        "assistant_header_ids": header,
        "assistant_header_tail": header_tail,
        "user_header_ids": user_header,
        "user_header_tail": user_header_tail,
        "turn_end_token_id": end,
        "question_separator_ids": separator,
        "question_prefix_ids": prefix,
        "questions_are_cut": cuts == tokenize_alone(texts, tokenizer),
    }


def _describe_header(header: str, tokenizer: Any, next_token: str = "") -> tuple[list[int], int]:
    """Return the ids of a header without white space at its end, and the number of white-space tokens at its end."""
    ids = tokenizer(header + next_token, add_special_tokens=False)["input_ids"]
    ids = ids[:-1] if next_token else ids
    named = len(ids)
    while not tokenizer.decode(ids[named - 1 : named]).strip() and ids[named - 1] not in tokenizer.all_special_ids:
        named -= 1
    return ids[:named], len(ids) - named
