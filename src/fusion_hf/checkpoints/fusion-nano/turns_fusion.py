"""The turns and the questions of a prompt, found in its ids.

FUSION's samplers need to know where each turn's prompt ends, and its vision tower needs the questions. The processor
gives both. A caller that loses them, such as a trainer that keeps nothing but ids, gets them back here: what is found
in the ids does not depend on padding, nor on how a batch was put together.

Shapes: B batch, S sequence length, R turns (user messages), T question tokens. Source: FUSION, arXiv 2504.09925.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .chat_fusion import BETWEEN_BLOCKS, CHAT_FORMATS, VISION_END, protect
from .configuration_fusion import FusionConfig
from .processing_fusion import tokenize_alone

ABSENT = -1  # in place of the prompt end of a turn that a row does not have
IGNORED = -100  # in labels
LOADED_TOKENIZERS = 8  # most folders whose tokenizers are kept
# Questions in many scripts, whose ids in a prompt are compared with those of the same text alone.
SAMPLES = (
    *(
        "What is this?",
        "was",
        "a",
        "I",
        "3 cats",
        "(a) or (b)?",
        '"Stop"',
        "don't",
        "<b>",
        "x = 2",
        "/home",
        "e.g. it",
    ),
    *(
        "¿Qué es?",
        "Où ?",
        "Что это?",
        "Τι είναι;",
        "这是什么?",
        "これは何?",
        "이게 뭐야?",
        "ما هذا؟",
        "זה מה",
        "यह क्या है?",
        "นี่อะไร",
        "😀?",
    ),
)


class PromptTurns(NamedTuple):
    """What a prompt's pass needs to know about its turns."""

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
    Find what the caller did not give, and put right what padding has moved.

    Args:
        config ([`FusionConfig`]): of the model.
        input_ids (`(B, S)`): prompts with latent blocks; without one they are returned as they are.
        attention_mask (`(B, S)`, *optional*): one of other dimensions, or none, means that there is no padding.
        pixel_values (*optional*): without an image no question is looked for.
        given ([`PromptTurns`]): as the caller gave it. An empty tensor `(B, 0)` asks for no samplers or no question.

    Raises:
        ValueError: if something is missing that cannot be found, or if positions disagree with the ids.
    """
    ends, question, question_mask = given
    if ends is not None:
        ends = _checked_type(ends, input_ids)
    if not bool((input_ids == config.latent_token_id).any()):
        return PromptTurns(ends, question, question_mask)
    mask = attention_mask if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 else None
    mask = None if mask is None else mask[:, -input_ids.shape[1] :]
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


def can_find_turns(config: FusionConfig) -> bool:
    """Return whether the configuration says how turns are written in ids. Folders of older releases do not say it."""
    return config.assistant_header_ids is not None and config.turn_end_token_id is not None


def _require_format(config: FusionConfig, argument: str, purpose: str) -> None:
    if not can_find_turns(config):
        raise ValueError(
            f"`{argument}` is missing, and the model's configuration has no `assistant_header_ids` and "
            f"`turn_end_token_id` to find it in `input_ids`. Pass `{argument}` as the processor returns it, or an "
            f"empty `(B, 0)` tensor for no {purpose}."
        )


def _require_headers(ends: torch.Tensor, input_ids: torch.Tensor, config: FusionConfig) -> None:
    latent = input_ids == config.latent_token_id
    for row, (found, has_latents) in enumerate(zip(ends.tolist(), latent.any(1).tolist(), strict=True)):
        if has_latents and found[0] == ABSENT:
            raise ValueError(
                f"Sample {row} has a latent block and no assistant header behind it, so `prompt_end_positions` cannot "
                "be found. End the prompt as the chat template does with `add_generation_prompt=True`, allow longer "
                "samples if a trainer cut it (`max_length`), or pass `prompt_end_positions` (an empty `(B, 0)` tensor "
                "for no samplers)."
            )


def _checked_type(ends: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Prompt ends `(B, R)` in order, absent ones last."""
    if isinstance(ends, torch.Tensor) and ends.ndim == 2 and ends.numel() == 0:
        return ends  # an empty tensor is of no type in particular
    if not isinstance(ends, torch.Tensor) or ends.is_floating_point() or ends.dtype == torch.bool:
        kind = ends.dtype if isinstance(ends, torch.Tensor) else type(ends).__name__
        raise ValueError(f"`prompt_end_positions` must be a tensor of integers, got {kind}.")
    if ends.ndim != 2 or len(ends) != len(input_ids):
        raise ValueError(
            f"`prompt_end_positions` must have the shape (B, R) with B = {len(input_ids)} samples, got "
            f"{tuple(ends.shape)}."
        )
    # nothing can end at position 0, which collators of other projects pad with
    is_absent = ends <= 0
    order = is_absent.long().argsort(dim=1, stable=True)
    return ends.masked_fill(is_absent, ABSENT).gather(1, order)


def _put_right(ends: torch.Tensor, found: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """
    Prompt ends `(B, R)` as they are in the ids, where a collator moved rows and did not move their positions.

    Raises:
        ValueError: if a row's positions are not those of its headers and were not moved with its padding.
    """
    rows = [[end for end in row if end != ABSENT] for row in ends.tolist()]
    known = [[end for end in row if end != ABSENT] for row in found.tolist()]
    padding = [0] * len(rows) if mask is None else mask.long().argmax(1).tolist()  # on the left
    moved = [_shift(given, exact) for given, exact in zip(rows, known, strict=True)]
    is_batch = len({shift for shift in moved if shift is not None}) > 1
    for row, (given, exact, shift) in enumerate(zip(rows, known, moved, strict=True)):
        if shift == 0 or not given or not exact:
            continue
        if shift is None or not (is_batch or shift == -padding[row]):
            raise ValueError(
                f"Sample {row}: `prompt_end_positions` must be where its assistant headers end, {exact}, got {given}."
            )
        ends[row, : len(given)] = ends.new_tensor(exact[: len(given)])
    return ends


def _shift(given: list[int], exact: list[int]) -> int | None:
    """By how much all given positions are behind the exact ones; None if it is not the same for all."""
    shifts = {end - known for end, known in zip(given, exact, strict=False)}
    return shifts.pop() if len(shifts) == 1 and len(given) <= len(exact) else None


def ignore_placeholders(labels: torch.Tensor, config: FusionConfig) -> torch.Tensor:
    """Set image and latent placeholders in labels `(B, S)` to -100: the language model has no such words to learn."""
    return labels.masked_fill((labels == config.image_token_id) | (labels == config.latent_token_id), IGNORED)


def check_labelled_ends(
    input_ids: torch.Tensor, labels: torch.Tensor, ends: torch.Tensor, config: FusionConfig
) -> None:
    """
    Check that no prompt ends inside an answer, from which the answer would leak into the latent tokens.

    Args:
        input_ids (`(B, S)`), labels (`(B, S)`): a position before the answer has the label -100, unless a trainer
            labels prompts as well.
        ends (`(B, R)`): `prompt_end_positions`, which the ids do not confirm.

    Raises:
        ValueError: if one is a labelled token whose prompt is not labelled.
    """
    if can_find_turns(config) or not isinstance(ends, torch.Tensor) or ends.ndim != 2 or ends.numel() == 0:
        return
    is_text = (input_ids != config.image_token_id) & (input_ids != config.latent_token_id)
    for row, positions in enumerate(ends.tolist()):
        for turn, end in enumerate(positions):
            if not 0 < end < labels.shape[1] or labels[row, end] == IGNORED:
                continue
            block = (~is_text[row, :end]).nonzero().flatten().tolist()
            begin = block[-1] + 1 if block else 0
            if bool((labels[row, begin:end] == IGNORED).any()):
                raise ValueError(
                    f"Sample {row}: `prompt_end_positions[{turn}]` must be before the answer, whose labels are not "
                    f"{IGNORED}, got {end}."
                )


def find_prompt_ends(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: FusionConfig
) -> torch.Tensor:
    """
    Find the last token of the assistant header behind the blocks of each turn.

    A turn begins with one block, of the image or of latent tokens, or with several next to each other. An image in a
    later question takes the first block of the conversation, so that a latent block may be behind its prompt's end.

    Args:
        input_ids (`(B, S)`): prompts.
        attention_mask (`(B, S)`, *optional*): what is padding is not looked at.
        config ([`FusionConfig`]): says how an assistant header is written in ids.

    Returns:
        `(B, R)`: indices in `input_ids`, -1 for a turn without a header behind it.
    """
    length = input_ids.shape[1]
    header = input_ids.new_tensor(config.assistant_header_ids)  # (h,)
    latent = input_ids == config.latent_token_id  # (B, S)
    is_block = latent | (input_ids == config.image_token_id)
    begins = is_block.clone()
    for distance in range(1, BETWEEN_BLOCKS + 2):
        begins[:, distance:] &= ~is_block[:, :-distance]
    turn = begins.cumsum(1)  # (B, S): how many turns have begun
    most = int(turn[:, -1].max())
    found = torch.full((len(input_ids), most + 1), length, device=input_ids.device)  # (B, 1 + R)
    reach = len(header) - 1 + config.assistant_header_tail  # from a header's first token to its last
    if length > reach:
        is_header = (input_ids.unfold(1, len(header), 1) == header).all(-1)[:, : length - reach]  # (B, S - reach)
        ends = torch.arange(reach, length, device=input_ids.device).expand(len(input_ids), -1)
        if attention_mask is not None:
            is_header = is_header & attention_mask[:, reach:].bool()
        # the first header behind each turn's blocks; what stands before all of them goes to column 0
        ends = torch.where(is_header, ends, length)
        found.scatter_reduce_(1, turn[:, : length - reach], ends, "amin")
    found = torch.where(found < length, found, ABSENT)
    # an image that a text, but no header, parts from the first latent block belongs to that block's turn
    has_latents = torch.zeros_like(found).scatter_reduce_(1, turn, latent.long(), "amax")  # (B, 1 + R)
    is_alone = ((found == ABSENT) & (has_latents == 0))[:, 1:]
    found = found[:, 1:].gather(1, is_alone.long().argsort(dim=1, stable=True))
    # truncation may leave the end of a turn whose latent block was behind it
    num_blocks = latent[:, :1].sum(1) + (latent[:, 1:] & ~latent[:, :-1]).sum(1)  # (B)
    found = found.masked_fill(torch.arange(found.shape[1], device=found.device) >= num_blocks[:, None], ABSENT)
    return found[:, : int(num_blocks.max())]


def find_questions(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: FusionConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cut the questions out of prompts, with the ids that the tokenizer gives a question of its own.

    Args:
        input_ids (`(B, S)`), attention_mask (`(B, S)`, *optional*): as the model takes them.
        config ([`FusionConfig`]): says which id ends a turn. Where the ids of a question depend on the text before it,
            the tokenizer in the folder that the model was loaded from is asked.

    Returns:
        `instruct_input_ids` and `instruct_attention_mask`, `(B, T)`. A prompt without an image has no question.

    Raises:
        ValueError: if the ids of the questions depend on the text before them and there is no tokenizer to ask.
    """
    rows, pad = input_ids.tolist(), config.instruct_pad_token_id
    if attention_mask is not None:
        masks = attention_mask.tolist()
        rows = [[i for i, kept in zip(*row, strict=True) if kept] for row in zip(rows, masks, strict=True)]
    questions = [_question(ids, config) or [pad] for ids in rows]
    longest = max(map(len, questions))
    padded = input_ids.new_tensor([ids + [pad] * (longest - len(ids)) for ids in questions])  # (B, T)
    return padded, (padded != pad).long()


def _question(ids: list[int], config: FusionConfig) -> list[int]:
    """The questions of one prompt as ids of their own."""
    if config.image_token_id not in ids:
        return []
    cuts = _cut(ids, config)
    if len(cuts) == 1 and config.questions_are_cut:
        return [*(config.question_prefix_ids or ()), *cuts[0]]
    # the questions of several turns are tokenized as one text, so that ids at their borders may be others
    commit = getattr(config, "_commit_hash", None)  # only what comes from the Hub has one
    tokenizer = load_tokenizer(config._name_or_path, commit)
    if tokenizer is None:
        raise ValueError(
            f"`instruct_input_ids` is missing, and {config._name_or_path!r}, from which the model was loaded, has no "
            "tokenizer to find it in `input_ids`: the ids of these questions depend on the text before them. Pass "
            "`instruct_input_ids` as the processor returns it, or an empty `(B, 0)` tensor for no question."
        )
    if any(number >= len(tokenizer) for cut in cuts for number in cut):
        raise ValueError(
            f"`instruct_input_ids` is missing, and the tokenizer in {config._name_or_path!r} lacks a token of "
            "`input_ids`. Pass `instruct_input_ids` as the processor returns it."
        )
    texts = [tokenizer.decode(cut, clean_up_tokenization_spaces=False).strip() for cut in cuts]
    # what looks like a special token and is none was broken up in the prompt
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    sanitize = not any(number in special for cut in cuts for number in cut)
    return tokenize_alone([protect("".join(texts), tokenizer, sanitize)], tokenizer)[0]


def _cut(ids: list[int], config: FusionConfig) -> list[list[int]]:
    """The ids between each turn's blocks and its end, without the separator that may begin them."""
    separator, cuts = config.question_separator_ids or [], []
    marks = {config.image_token_id, config.latent_token_id}
    places = [place for place, number in enumerate(ids) if number in marks]
    end = 0
    for place, following in zip(places, [*places[1:], len(ids)], strict=True):
        start = place + 1
        if place < end or following - start <= BETWEEN_BLOCKS:  # of a block inside a turn's
            continue
        if ids[start : start + 1] == [config.vision_end_token_id]:
            start += 1
        end = ids.index(config.turn_end_token_id, start) if config.turn_end_token_id in ids[start:] else len(ids)
        if following < end:  # an image that a text, but no turn's end, parts from the latent block
            continue
        if ids[start : start + len(separator)] == separator:
            start += len(separator)
        cuts.append(ids[start:end])
    return cuts


@lru_cache(maxsize=LOADED_TOKENIZERS)
def load_tokenizer(folder: str, revision: str | None) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a model folder or repository, once in a process; None if there is none."""
    if not folder:
        return None
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, revision=revision or "main")
    except (OSError, ValueError):
        return None


def describe_turns(processor: Any) -> dict[str, Any]:
    """
    Describe how a processor's chat format is written in ids.

    Args:
        processor ([`FusionProcessor`]): of the model.

    Returns:
        Values for the fields of [`FusionConfig`] by which the model finds turns and questions in ids.
    """
    tokenizer, chat_format = processor.tokenizer, CHAT_FORMATS[processor.chat_format]
    vocabulary = tokenizer.get_vocab()
    end, vision_end = vocabulary[chat_format.turn_end], vocabulary[VISION_END]

    def behind_vision_end(text: str) -> list[int]:
        ids = tokenizer(f"{VISION_END}{text}{chat_format.turn_end}", add_special_tokens=False)["input_ids"]
        return ids[ids.index(vision_end) + 1 : ids.index(end)]

    header = tokenizer(chat_format.assistant_header, add_special_tokens=False)["input_ids"]
    named = len(header)
    while (
        not tokenizer.decode(header[named - 1 : named]).strip() and header[named - 1] not in tokenizer.all_special_ids
    ):
        named -= 1
    separator, prefix = behind_vision_end("\n"), tokenizer("")["input_ids"]
    texts = [protect(text, tokenizer) for text in SAMPLES]
    cuts = [[*prefix, *behind_vision_end(f"\n{text}")[len(separator) :]] for text in texts]
    return {
        "assistant_header_ids": header[:named],
        "assistant_header_tail": len(header) - named,
        "turn_end_token_id": end,
        "question_separator_ids": separator,
        "question_prefix_ids": prefix,
        "questions_are_cut": cuts == tokenize_alone(texts, tokenizer),
    }
