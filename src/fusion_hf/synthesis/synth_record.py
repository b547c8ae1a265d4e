"""What goes through the steps of the data engine: one caption on its way to a training record."""

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
    """What made a part of a record: the model, the SHA-256 of its prompt, and its seed."""

    model: str
    prompt_hash: str
    seed: int


@dataclass(frozen=True)
class Rejection:
    """The step that took a record out, and why."""

    step: str
    reason: str


@dataclass(frozen=True)
class SynthRecord:
    """
    One record of the data engine.

    Attributes:
        id: unique in a run, and the same in each run with its settings.
        category: name of a file in `synthesis/categories`.
        caption: from the caption pool.
        descriptions, images: one for each image; file names are relative to the output's folder of images.
        facts: exact annotations of a drawn image; empty for others. JSON values only.
        origins: by step.
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
        """Write JSON values, from which `from_dict` makes an equal record."""
        values = asdict(self)
        return values | {name: list(values[name]) for name in ("descriptions", "images", "turns")}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SynthRecord":
        """
        Read what `to_dict` gave.

        Raises:
            ValueError: for a field that is unknown or missing, or has another type.
        """
        try:
            return make_dataclass(cls, values, "a record")
        except InputError as error:  # what a run has written itself is no input
            raise ValueError(str(error)) from error

    def rejected(self, step: str, reason: str) -> "SynthRecord":
        """Take this record out by a step."""
        return replace(self, rejection=Rejection(step, reason))

    def training_record(self) -> dict[str, Any]:
        """
        Write `{"id", "image", "conversations"}`, the format of the training data, which holds one image.

        Raises:
            ValueError: if the record was rejected, has no turn, or has not exactly one image: those of a pair are
                composed into one before (`image_generation.compose_pair`).
        """
        if self.rejection is not None:
            raise ValueError(f"record {self.id} was rejected by {self.rejection.step}: {self.rejection.reason}")
        if not self.turns or len(self.images) != 1:
            amounts = f"{len(self.turns)} turns and {len(self.images)} images"
            raise ValueError(f"record {self.id} has {amounts}; allowed: one image, and one turn or more")
        return llava_record(self.id, self.images[0], ((turn.question, turn.answer) for turn in self.turns))
