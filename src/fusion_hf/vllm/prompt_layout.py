"""Where the turns of a prompt are, found by ids alone: vLLM gives a model nothing else of a prompt without image."""

import copy
from dataclasses import dataclass
from math import isqrt
from typing import Any, NamedTuple

import numpy as np
import torch

from fusion_hf.model.configuration_fusion import FusionConfig, TokenBudget, is_perfect_square
from fusion_hf.model.processing_fusion import FusionProcessor
from fusion_hf.model.turns_fusion import ABSENT, describe_turns, find_prompt_ends, number_turns


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
    """Finds turns as the model itself does; `config` says how they are written in ids."""

    config: FusionConfig

    @classmethod
    def of(cls, config: FusionConfig, processor: FusionProcessor) -> "PromptParser":
        """For a model and its processor: folders of older releases do not say how turns are written."""
        config = copy.copy(config)
        for name, value in describe_turns(processor).items():
            setattr(config, name, value)
        return cls(config)

    def read(self, ids: list[int]) -> PromptLayout:
        """Read the turns of a whole prompt: its latent blocks and the ends of its assistant headers, in order.

        Raises:
            ValueError: if the blocks differ in length, the image comes late, or a turn has no header behind its
                blocks: such a prompt is cut, or was never one that FUSION was trained on.
        """
        array = np.asarray(ids)
        image = np.flatnonzero(array == self.config.image_token_id)
        latent = np.flatnonzero(array == self.config.latent_token_id)
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
        prompt = torch.tensor([ids], device="cpu")
        ends = find_prompt_ends(prompt, None, self.config)[0].numpy()
        if ABSENT in ends:
            number = int((ends == ABSENT).argmax())
            raise ValueError(
                f"The blocks of turn {number} have no assistant header behind them: the prompt is cut, or lacks "
                "its end."
            )
        is_block = (prompt == self.config.image_token_id) | (prompt == self.config.latent_token_id)
        turns = int(number_turns(is_block)[0, -1])
        if turns != len(blocks):
            raise ValueError(f"A prompt has {len(blocks)} latent blocks for {turns} turns.")
        return PromptLayout(len(image), lengths[0], np.stack(blocks), ends)


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
