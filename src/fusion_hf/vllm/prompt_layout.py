"""Where the turns of a prompt are, found by ids alone: vLLM gives a model nothing else of a prompt without image."""

from dataclasses import dataclass
from math import isqrt
from typing import Any, NamedTuple

import numpy as np

from fusion_hf.model.chat_fusion import BETWEEN_BLOCKS
from fusion_hf.model.configuration_fusion import FusionConfig, TokenBudget, is_perfect_square
from fusion_hf.model.processing_fusion import CHAT_FORMATS, FusionProcessor


class PromptLayout(NamedTuple):
    """A prompt's image and questions: R turns, q latent tokens each."""

    num_image_tokens: int
    query_len: int  # 0 without a turn
    latent_positions: np.ndarray  # (R, q)
    prompt_end_positions: np.ndarray  # (R)

    def check(self, budget: TokenBudget) -> None:
        """Raise a `ValueError` unless the prompt's blocks are as long as the request says."""
        if self.query_len not in (0, budget.query_len):
            raise ValueError(f"A latent block has {self.query_len} tokens, but query_len is {budget.query_len}.")
        if self.num_image_tokens not in (0, budget.num_image_tokens):
            found = f"{self.num_image_tokens} image tokens ({isqrt(self.num_image_tokens)} a side)"
            raise ValueError(f"A prompt has {found}, but image_token_grid is {budget.image_token_grid}.")


@dataclass(frozen=True)
class PromptParser:
    """
    image_token_id, latent_token_id: the placeholders.
    header: what marks an assistant header: its ids without the last, which may be joined with what follows.
    header_length: ids of a whole header.
    """

    image_token_id: int
    latent_token_id: int
    header: tuple[int, ...]
    header_length: int

    @classmethod
    def of(cls, config: FusionConfig, processor: FusionProcessor) -> "PromptParser":
        header = CHAT_FORMATS[processor.chat_format].assistant_header
        ids = processor.tokenizer(header, add_special_tokens=False)["input_ids"]
        return cls(config.image_token_id, config.latent_token_id, tuple(ids[:-1] or ids), len(ids))

    def read(self, ids: list[int]) -> PromptLayout:
        """The turns of a whole prompt: its latent blocks and the ends of its assistant headers, in order.

        Raises:
            ValueError: if the blocks differ in length, the image comes late, or a turn has no header behind its
                blocks: such a prompt is cut, or was never one that FUSION was trained on.
        """
        array = np.asarray(ids)
        image = np.flatnonzero(array == self.image_token_id)
        latent = np.flatnonzero(array == self.latent_token_id)
        if len(latent) == 0:
            if len(image):
                raise ValueError(f"A prompt has {len(image)} image tokens, but no latent block.")
            return PromptLayout(0, 0, np.zeros((0, 0), dtype=np.int64), np.zeros(0, dtype=np.int64))
        if len(image) and image[-1] > latent[0]:
            raise ValueError("The image must come before the first latent block.")
        blocks = np.split(latent, np.flatnonzero(np.diff(latent) > 1) + 1)
        lengths = sorted({len(block) for block in blocks})
        if len(lengths) > 1 or not is_perfect_square(lengths[0]):
            raise ValueError(f"Latent blocks have {lengths} tokens; allowed: one perfect square for all.")
        ends = self._ends(array, np.concatenate([image, latent]))
        if len(ends) != len(blocks):
            raise ValueError(f"A prompt has {len(blocks)} latent blocks for {len(ends)} turns.")
        return PromptLayout(len(image), lengths[0], np.stack(blocks), ends)

    def _ends(self, ids: np.ndarray, marks: np.ndarray) -> np.ndarray:
        """The end of the first header behind the blocks of each turn, (R); `marks`: where image and latents are."""
        windows = np.lib.stride_tricks.sliding_window_view(ids, min(len(self.header), len(ids)))
        headers = np.flatnonzero((windows == np.array(self.header)).all(-1)) + self.header_length - 1
        headers = headers[headers < len(ids)]
        turns = np.split(marks, np.flatnonzero(np.diff(marks) > BETWEEN_BLOCKS + 1) + 1)
        limits = [*(turn[0] for turn in turns[1:]), len(ids)]
        ends = []
        for number, (turn, limit) in enumerate(zip(turns, limits, strict=True)):
            behind = headers[(headers > turn[-1]) & (headers < limit)]
            if len(behind) == 0:
                raise ValueError(
                    f"The blocks of turn {number} have no assistant header behind them: the prompt is cut, or lacks "
                    "its end."
                )
            ends.append(behind[0])
        return np.array(ends)


def request_budget(config: FusionConfig, query_len: Any = None, image_token_grid: Any = None) -> TokenBudget:
    """
    Complete and check how many tokens a request spends on its image.

    Args:
        config: The model's, whose numbers stand for those that a request does not give.
        query_len, image_token_grid: What a client sent.

    Raises:
        ValueError: For a number of latent tokens that the model was not trained with, or an impossible grid.
    """
    length = config.query_len if query_len is None else query_len
    allowed = sorted({config.query_len, *config.query_lens})
    if not isinstance(length, int) or length not in allowed:
        raise ValueError(f"query_len is {length!r}; allowed: {', '.join(map(str, allowed))}.")
    return TokenBudget(length, config.grid_side(image_token_grid))
