"""Tokens of prompts with the characters that each token covers: padding, shifting and dropping tokens.

Source of the sequence: FUSION, arXiv 2504.09925, and its authors' code.
"""

import re
from typing import Any, NamedTuple

from .chat_fusion import BREAK, IMAGE_TOKEN


class PromptTokens(NamedTuple):
    """One tokenized prompt."""

    ids: list[int]
    mask: list[int]
    offsets: list[tuple[int, int]]  # spans of the characters that each token covers

    def select(self, kept: list[int]) -> "PromptTokens":
        """Return only the tokens with these indices."""
        return PromptTokens([self.ids[i] for i in kept], [self.mask[i] for i in kept], [self.offsets[i] for i in kept])

    def drop(self, text: str, begin: int = 0) -> "PromptTokens":
        """
        Drop tokens that cover only a `BREAK`, and tokens that start before a character.

        Args:
            text (`str`): Text of the prompt.
            begin (`int`): First character to keep.
        """
        breaks = {i for i, character in enumerate(text) if character == BREAK} if BREAK in text else ()
        if not breaks and not begin:
            return self
        is_break = [start in breaks and end == start + 1 for start, end in self.offsets]
        return self.select(
            [i for i, (start, end) in enumerate(self.offsets) if not is_break[i] and (start >= begin or start == end)]
        )

    def pad(self, length: int, token: int, on_left: bool) -> "PromptTokens":
        """
        Pad the attended tokens to a length.

        Args:
            length (`int`): Number of tokens of the result.
            token (`int`): Id of the padding token.
            on_left (`bool`): Whether to pad on the left instead of the right.

        Returns:
            [`PromptTokens`]: The padded tokens.
        """
        kept = self.select([i for i, mask in enumerate(self.mask) if mask])
        missing = length - len(kept.ids)
        added = PromptTokens([token] * missing, [0] * missing, [(0, 0)] * missing)
        first, second = (added, kept) if on_left else (kept, added)
        return PromptTokens(first.ids + second.ids, first.mask + second.mask, first.offsets + second.offsets)


def tokenize_alone(questions: list[str], tokenizer: Any) -> list[list[int]]:
    """
    Tokenize texts as the tokenizer does by default, for the ids that guide the vision tower.

    Args:
        questions (`list[str]`): Protected texts, see [`TextProtector`].
        tokenizer ([`PreTrainedTokenizerBase`]): Tokenizer of the model.

    Returns:
        `list[list[int]]`: Ids of each text.
    """
    encoded = tokenizer(questions, return_offsets_mapping=True, padding=False)
    columns = zip(encoded["input_ids"], encoded["attention_mask"], encoded["offset_mapping"], questions, strict=True)
    return [PromptTokens(*tokens).drop(question).ids for *tokens, question in columns]


def pad_rows(rows: list[list[int]], value: int) -> list[list[int]]:
    """Pad rows with `value` on the right to the length of the longest row."""
    longest = max(map(len, rows))
    return [row + [value] * (longest - len(row)) for row in rows]


def shift_offsets(offsets: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """
    Move character spans to the left.

    Args:
        offsets (`list[tuple[int, int]]`): Spans of the tokens. Padding has empty spans.
        count (`int`): Number of characters, negative to move to the right.

    Returns:
        `list[tuple[int, int]]`: The moved spans.
    """
    return [(max(start - count, 0), max(end - count, 0)) if end > start else (0, 0) for start, end in offsets]


def describe_replacement(text: str, shift: int, num_image_tokens: int) -> list[dict[str, Any]]:
    """
    Describe the replacement of a text's image mark, in the format of transformers.

    Args:
        text (`str`): Text with at most one image mark.
        shift (`int`): Number of characters before the prompt that the caller passed.
        num_image_tokens (`int`): Number of image tokens that replace the mark.

    Returns:
        `list[dict]`: One replacement, or an empty list for a text without an image.
    """
    found, block = re.search(IMAGE_TOKEN, text), IMAGE_TOKEN * num_image_tokens
    if found is None:
        return []
    spans = shift_offsets([found.span(), (found.start(), found.start() + len(block))], shift)
    return [dict(zip(("span", "new_span"), spans, strict=True), type="image", text=IMAGE_TOKEN, replacement=block)]
