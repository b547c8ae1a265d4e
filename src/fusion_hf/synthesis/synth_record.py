"""What goes through the steps of the data engine: one caption on its way to a training record."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from fusion_hf.common.errors import short_name
from fusion_hf.data.record_parsing import HUMAN, MODEL

IMAGE_MARK = "<image>"  # the processor's IMAGE_TOKEN, whose import takes seconds


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
    facts: Mapping[str, Any] = field(default_factory=dict)
    origins: Mapping[str, StepOrigin] = field(default_factory=dict)
    rejection: Rejection | None = None

    def to_dict(self) -> dict[str, Any]:
        """Write JSON values, from which `from_dict` makes an equal record."""
        values = asdict(self)
        return values | {name: list(values[name]) for name in ("descriptions", "images", "turns")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SynthRecord":
        """
        Read what `to_dict` gave.

        Raises:
            ValueError: for a field that is unknown or missing, or has another type.
        """
        known = {entry.name for entry in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"a record has the field {short_name(unknown[0])!r}; allowed: {', '.join(sorted(known))}")
        for name, kinds in _TYPES.items():
            if name in values and not isinstance(values[name], kinds):
                kind = type(values[name]).__name__
                raise ValueError(f"{name} of a record is {kind}; allowed: {', '.join(k.__name__ for k in kinds)}")
        for name in ("descriptions", "images"):
            kinds_found = {type(item).__name__ for item in values.get(name, ()) if not isinstance(item, str)}
            if kinds_found:
                raise ValueError(f"{name} of a record is a list with {', '.join(sorted(kinds_found))}; allowed: texts")
        try:
            made: dict[str, Any] = {
                "descriptions": tuple(values.get("descriptions", ())),
                "images": tuple(values.get("images", ())),
                "turns": tuple(RecordTurn(**turn) for turn in values.get("turns", ())),
                "facts": dict(values.get("facts", {})),
                "origins": {step: StepOrigin(**origin) for step, origin in values.get("origins", {}).items()},
                "rejection": Rejection(**values["rejection"]) if values.get("rejection") is not None else None,
            }
            return cls(**{**values, **made})
        except TypeError as error:
            raise ValueError(f"a record has another shape ({error}).") from error

    def rejected(self, step: str, reason: str) -> "SynthRecord":
        """Take this record out by a step."""
        return replace(self, rejection=Rejection(step, reason))

    def training_record(self) -> dict[str, Any]:
        """
        Write `{"id", "image", "conversations"}`, the format of the training data, which holds one image.

        Raises:
            ValueError: if the record was rejected, has no turn, or has not exactly one image: those of a pair are
                composed into one before (`png_files.compose_pair`).
        """
        if self.rejection is not None:
            raise ValueError(f"record {self.id} was rejected by {self.rejection.step}: {self.rejection.reason}")
        if not self.turns or len(self.images) != 1:
            amounts = f"{len(self.turns)} turns and {len(self.images)} pictures"
            raise ValueError(f"record {self.id} has {amounts}; allowed: one picture, and one turn or more")
        conversations = []
        for index, turn in enumerate(self.turns):
            mark = f"{IMAGE_MARK}\n" if index == 0 else ""
            conversations += [
                {"from": HUMAN, "value": mark + turn.question},
                {"from": MODEL, "value": turn.answer},
            ]
        return {"id": self.id, "image": self.images[0], "conversations": conversations}


_SEQUENCE = (list, tuple)
_TYPES: dict[str, tuple[type, ...]] = {
    "id": (str,),
    "category": (str,),
    "caption": (str,),
    "seed": (int,),
    "descriptions": _SEQUENCE,
    "images": _SEQUENCE,
    "turns": _SEQUENCE,
    "facts": (Mapping,),
    "origins": (Mapping,),
    "rejection": (Mapping, type(None)),
}
