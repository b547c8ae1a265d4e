"""The record that passes through the steps of the data engine, from a caption to a training record."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fusion_hf.common.errors import InputError
from fusion_hf.common.yaml_config import make_dataclass
from fusion_hf.data.record_parsing import llava_record


@dataclass(frozen=True)
class RecordTurn:
    """A question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class StepOrigin:
    """The model that made a part of a record, the SHA-256 of its prompt, and its seed."""

    model: str
    prompt_hash: str
    seed: int


@dataclass(frozen=True)
class Rejection:
    """The step that rejected a record, and the reason."""

    step: str
    reason: str


@dataclass(frozen=True)
class SynthRecord:
    """
    One record of the data engine.

    Attributes:
        id: an id that is unique in a run, and the same in every run with the same settings.
        category: the name of a file in `synthesis/categories`.
        caption: the caption from the pool.
        seed: the seed of the record.
        descriptions: one description per image.
        images: one file name per image, relative to the folder of images.
        turns: the questions and answers.
        facts: exact annotations of a drawn image as JSON values. Empty for other images.
        origins: what made the parts of the record, by step.
        rejection: why the record is not written, or None.
    """

    id: str
    category: str
    caption: str
    seed: int
    descriptions: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    turns: tuple[RecordTurn, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, StepOrigin] = field(default_factory=dict)
    rejection: Rejection | None = None

    def to_dict(self) -> dict[str, Any]:
        """Convert the record to JSON values, from which `from_dict` makes an equal record."""
        values = asdict(self)
        return values | {name: list(values[name]) for name in ("descriptions", "images", "turns")}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SynthRecord":
        """
        Read what `to_dict` returned.

        Args:
            values: the JSON values.

        Raises:
            ValueError: if a field is unknown or missing, or has the wrong type.
        """
        try:
            return make_dataclass(cls, values, "a record")
        except InputError as error:  # files that a run wrote are not user input
            raise ValueError(str(error)) from error

    def rejected(self, step: str, reason: str) -> "SynthRecord":
        """
        Return this record, rejected by a step.

        Args:
            step: the name of the step.
            reason: the reason.
        """
        return replace(self, rejection=Rejection(step, reason))

    def training_record(self) -> dict[str, Any]:
        """
        Convert the record to `{"id", "image", "conversations"}`, the format of the training data, which holds one
        image.

        Raises:
            ValueError: if the record was rejected, or does not have exactly one image and at least one turn. Pairs
                must be composed into one image first (`image_generation.compose_pair`).
        """
        if self.rejection is not None:
            raise ValueError(f"Record {self.id} was rejected by {self.rejection.step}: {self.rejection.reason}.")
        if not self.turns or len(self.images) != 1:
            amounts = f"{len(self.turns)} turns and {len(self.images)} images"
            raise ValueError(f"Record {self.id} must have one image and at least one turn, got {amounts}.")
        return llava_record(self.id, self.images[0], ((turn.question, turn.answer) for turn in self.turns))
