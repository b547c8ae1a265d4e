"""Find the turns of a prompt by ids alone, since vLLM gives a model nothing else about a prompt without an image."""

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
    """The image and the questions of a prompt, with R turns and q latent tokens each."""

    num_image_tokens: int
    query_len: int  # 0 without a turn
    latent_positions: np.ndarray  # (R, q)
    prompt_end_positions: np.ndarray  # (R)

    def check(self, budget: TokenBudget) -> None:
        """
        Check that the blocks of the prompt have the lengths that the request sets.

        Args:
            budget: the numbers of image tokens and latent tokens of the request.

        Raises:
            ValueError: if a length differs.
        """
        if self.query_len not in (0, budget.query_len):
            raise ValueError(
                f"A latent block must have `query_len` = {budget.query_len} tokens, got {self.query_len}."
            )
        if self.num_image_tokens not in (0, budget.num_image_tokens):
            found = f"{isqrt(self.num_image_tokens)} ({self.num_image_tokens} image tokens)"
            raise ValueError(f"The side of a prompt's image must be {budget.image_token_grid} tokens, got {found}.")


@dataclass(frozen=True)
class PromptParser:
    """Find turns as the model itself does. `config` says how they are written in ids."""

    config: FusionConfig

    @classmethod
    def of(cls, config: FusionConfig, processor: FusionProcessor) -> "PromptParser":
        """
        Make the parser of a model. Folders of older releases do not say how turns are written, but the processor
        does.

        Args:
            config: the configuration of the model.
            processor: the processor of the model.
        """
        config = copy.copy(config)
        for name, value in describe_turns(processor).items():
            setattr(config, name, value)
        return cls(config)

    def read(self, ids: list[int]) -> PromptLayout:
        """
        Find the latent blocks of a whole prompt, and the ends of its assistant headers.

        Args:
            ids: the ids of the prompt.

        Raises:
            ValueError: if the blocks differ in length, the image does not come first, or a turn has no header after
                its blocks. Such a prompt is cut, or has a format that FUSION was not trained on.
        """
        array = np.asarray(ids)
        image = np.flatnonzero(array == self.config.image_token_id)
        latent = np.flatnonzero(array == self.config.latent_token_id)
        if len(latent) == 0:
            if len(image):
                raise ValueError(f"A prompt with {len(image)} image tokens must have a latent block, got none.")
            return PromptLayout(0, 0, np.zeros((0, 0), dtype=np.int64), np.zeros(0, dtype=np.int64))
        if len(image) and image[-1] > latent[0]:
            raise ValueError("The image must come before the first latent block.")
        blocks = np.split(latent, np.flatnonzero(np.diff(latent) > 1) + 1)
        lengths = sorted({len(block) for block in blocks})
        if len(lengths) > 1 or not is_perfect_square(lengths[0]):
            raise ValueError(
                f"All latent blocks must have the same number of tokens, a perfect square, got {lengths}."
            )
        prompt = torch.tensor([ids], device="cpu")
        ends = find_prompt_ends(prompt, None, self.config)[0].numpy()
        if ABSENT in ends:
            number = int((ends == ABSENT).argmax())
            raise ValueError(
                f"An assistant header must follow the blocks of turn {number}, got none. The prompt is cut or "
                "incomplete."
            )
        is_block = (prompt == self.config.image_token_id) | (prompt == self.config.latent_token_id)
        turns = int(number_turns(is_block)[0, -1])
        if turns != len(blocks):
            raise ValueError(f"A prompt with {turns} turns must have one latent block per turn, got {len(blocks)}.")
        return PromptLayout(len(image), lengths[0], np.stack(blocks), ends)


def request_budget(config: FusionConfig, query_len: Any = None, image_token_grid: Any = None) -> TokenBudget:
    """
    Complete and check the numbers of image tokens and latent tokens of a request.

    Args:
        config: the configuration of the model, which has the defaults.
        query_len: the number of latent tokens that the client sent, or None.
        image_token_grid: the side of the grid of image tokens that the client sent, or None.

    Raises:
        ValueError: if the model was not trained with this number of latent tokens, or the grid is invalid.
    """
    length = config.query_len if query_len is None else query_len
    allowed = sorted({config.query_len, *config.query_lens})
    if not isinstance(length, int) or length not in allowed:
        raise ValueError(f"`query_len` must be one of {', '.join(map(str, allowed))}, got {length!r}.")
    return TokenBudget(length, config.grid_side(image_token_grid))
