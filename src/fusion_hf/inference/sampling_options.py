"""How an answer is chosen: the most likely one, by beam search, or sampled. This module imports nothing large."""

from dataclasses import dataclass, replace
from typing import Any

from fusion_hf.common.errors import InputError

LARGEST_TEMPERATURE = 2.0
LARGEST_SEED = 2**32 - 1


def _check(is_allowed: bool, name: str, allowed: str, value: object) -> None:
    if not is_allowed:
        raise InputError(f"`{name}` must be {allowed}, got {value}.")


@dataclass(frozen=True)
class SamplingOptions:
    """
    How an answer is chosen.

    Args:
        temperature: 0 for the most likely answer. Above 0, the answer is sampled from the probabilities after the
            logits are divided by this number.
        top_p: Sample only from the most likely tokens whose probabilities add up to this number.
        seed: Seed of the random numbers. The same seed gives the same answer, whatever else is in the batch.
        num_beams: Number of beams of a beam search. 1 means no beam search.

    Raises:
        InputError: If a value is out of range, or if values cannot be combined.

    Example:
        >>> from fusion_hf.inference import ChatModel, SamplingOptions, question_message
        >>> chat_model = ChatModel.load()  # fusion-nano
        >>> image = chat_model.open_image("docs/assets/red_circle.png")
        >>> sampling = SamplingOptions(temperature=0.2, seed=1)
        >>> chat_model.answer([question_message("what color is the shape?", image)], 8, sampling=sampling)
        'red'
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    num_beams: int = 1

    def __post_init__(self) -> None:
        _check(
            0 <= self.temperature <= LARGEST_TEMPERATURE,
            "temperature",
            f"a number from 0 to {LARGEST_TEMPERATURE:g}",
            self.temperature,
        )
        _check(0 < self.top_p <= 1, "top_p", "a number above 0 and at most 1", self.top_p)
        _check(0 <= self.seed <= LARGEST_SEED, "seed", f"a whole number from 0 to {LARGEST_SEED}", self.seed)
        _check(self.num_beams >= 1, "num_beams", "a whole number from 1", self.num_beams)
        if self.is_sampled:
            _check(self.num_beams == 1, "num_beams", "1 when `temperature` is above 0", self.num_beams)
        else:
            _check(self.top_p == 1, "top_p", "1 when `temperature` is 0", self.top_p)

    @property
    def is_sampled(self) -> bool:
        """Whether random numbers choose the answer."""
        return self.temperature > 0

    def of_answer(self, number: int) -> "SamplingOptions":
        """Return the options of the answer with this number in a run: each one has random numbers of its own."""
        return replace(self, seed=(self.seed + number) % (LARGEST_SEED + 1))

    def as_settings(self) -> dict[str, Any]:
        """Return the settings on which the answers of a run depend, none for the most likely answers."""
        if self.is_sampled:
            return {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        return {} if self.num_beams == 1 else {"num_beams": self.num_beams}


MOST_LIKELY = SamplingOptions()
