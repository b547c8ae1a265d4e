"""Tokens of prompts with the characters that each of them covers: padding, shifts, and what is dropped again.

Source of the sequence: FUSION, arXiv 2504.09925, and its authors' code.
"""

import re
from typing import Any, NamedTuple

from .chat_fusion import BREAK, IMAGE_TOKEN


class PromptTokens(NamedTuple):
    """One tokenized prompt."""

    ids: list[int]
    mask: list[int]
    offsets: list[tuple[int, int]]  # of the characters that a token covers

    def select(self, kept: list[int]) -> "PromptTokens":
        """Keep the tokens with these indices."""
        return PromptTokens([self.ids[i] for i in kept], [self.mask[i] for i in kept], [self.offsets[i] for i in kept])

    def drop(self, text: str, begin: int = 0) -> "PromptTokens":
        """
        Drop the tokens that cover nothing but a `BREAK`, and those that begin too early.

        Args:
            text (`str`): of the prompt.
            begin (`int`): the first character to keep.
        """
        breaks = {i for i, character in enumerate(text) if character == BREAK} if BREAK in text else ()
        if not breaks and not begin:
            return self
        is_break = [start in breaks and end == start + 1 for start, end in self.offsets]
        return self.select(
            [i for i, (start, end) in enumerate(self.offsets) if not is_break[i] and (start >= begin or start == end)]
        )

    def pad(self, length: int, token: int, on_left: bool) -> "PromptTokens":
        """Pad the attended tokens with a token to a length, on the left or on the right."""
        kept = self.select([i for i, mask in enumerate(self.mask) if mask])
        missing = length - len(kept.ids)
        added = PromptTokens([token] * missing, [0] * missing, [(0, 0)] * missing)
        first, second = (added, kept) if on_left else (kept, added)
        return PromptTokens(first.ids + second.ids, first.mask + second.mask, first.offsets + second.offsets)


def tokenize_alone(questions: list[str], tokenizer: Any) -> list[list[int]]:
    """
    Tokenize texts as the tokenizer does by default: the ids that guide the vision tower.

    Args:
        questions (`list[str]`): protected texts, see [`TextProtector`].
        tokenizer ([`PreTrainedTokenizerBase`]): of the model.

    Returns:
        The ids of each text.
    """
    encoded = tokenizer(questions, return_offsets_mapping=True, padding=False)
    columns = zip(encoded["input_ids"], encoded["attention_mask"], encoded["offset_mapping"], questions, strict=True)
    return [PromptTokens(*tokens).drop(question).ids for *tokens, question in columns]


def pad_rows(rows: list[list[int]], value: int) -> list[list[int]]:
    """Pad rows with a value on the right, to the length of the longest."""
    longest = max(map(len, rows))
    return [row + [value] * (longest - len(row)) for row in rows]


def shift_offsets(offsets: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """Move character spans to a text without its first `count` characters, or with as many more; padding has none."""
    return [(max(start - count, 0), max(end - count, 0)) if end > start else (0, 0) for start, end in offsets]


def describe_replacement(text: str, shift: int, num_image_tokens: int) -> list[dict[str, Any]]:
    """Describe, as transformers does, what became of a text's image mark, with `shift` characters less before it."""
    found, block = re.search(IMAGE_TOKEN, text), IMAGE_TOKEN * num_image_tokens
    if found is None:
        return []
    spans = shift_offsets([found.span(), (found.start(), found.start() + len(block))], shift)
    return [dict(zip(("span", "new_span"), spans, strict=True), type="image", text=IMAGE_TOKEN, replacement=block)]
