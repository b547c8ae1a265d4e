"""Compare the values of two runs for a question stage by stage, and find the first stage that differs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TypeAlias

import torch

PROMPT, IDS, PIXELS, FEATURES, LOGITS, DECODING, SCORING = STAGES = (
    "prompt",
    "ids",
    "pixels",
    "features",
    "logits",
    "decoding",
    "scoring",
)
EXACT = 0.0
SHOWN = 20  # characters to show around the position where texts differ

# a text, ids, a number such as a score, a tensor, or tensors by name in the order of computation
Value: TypeAlias = str | Sequence[int] | float | torch.Tensor | Mapping[str, torch.Tensor] | None


@dataclass(frozen=True)
class StageComparison:
    """
    How the values of two runs compare at one stage.

    Attributes:
        stage: one of `STAGES`.
        differs: whether the difference exceeds the tolerance.
        detail: where and by how much the values differ. Empty if they are bitwise equal.
        part: the first part that differs by more than the tolerance, such as a layer. None without parts.
        largest: the largest absolute difference of tensor elements.
        relative: the norm of the difference divided by the norm of the first value, the largest over all parts.
        tolerance: the largest `relative` that counts as equal.
    """

    stage: str
    differs: bool
    detail: str = ""
    part: str | None = None
    largest: float | None = None
    relative: float | None = None
    tolerance: float = EXACT


def compare_stage(stage: str, first: Value, second: Value, tolerance: float = EXACT) -> StageComparison:
    """
    Compare the values of two runs at one stage.

    Args:
        stage: one of `STAGES`.
        first: the first value: a text, ids, a number, a tensor, or tensors by name.
        second: the second value, of the same kind.
        tolerance: the largest relative error of tensors that counts as equal. Everything else must be equal.

    Raises:
        ValueError: if the stage is unknown, or the values are of different kinds.
    """
    if stage not in STAGES:
        raise ValueError(f"`stage` must be one of {', '.join(STAGES)}, got {stage!r}.")
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return _compare_parts(stage, {"": first}, {"": second}, tolerance)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return _compare_parts(stage, first, second, tolerance)
    if isinstance(first, str) and isinstance(second, str):
        return _told(stage, first != second, lambda: _describe_texts(first, second))
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return _told(stage, list(first) != list(second), lambda: _describe_ids(first, second))
    if isinstance(first, float | int | None) and isinstance(second, float | int | None):
        return _told(stage, first != second, lambda: f"{first} and {second}")
    raise ValueError(
        f"The values of {stage} must be of the same kind, got {type(first).__name__} and {type(second).__name__}."
    )


def first_difference(comparisons: Sequence[StageComparison]) -> StageComparison | None:
    """
    Return the first comparison in the order of `STAGES` that differs, or None.

    Args:
        comparisons: the comparisons.
    """
    ordered = sorted(comparisons, key=lambda comparison: STAGES.index(comparison.stage))
    return next((comparison for comparison in ordered if comparison.differs), None)


def _told(stage: str, differs: bool, describe: Callable[[], str]) -> StageComparison:
    return StageComparison(stage, differs, describe() if differs else "")


def _describe_texts(first: str, second: str) -> str:
    place = next(i for i, pair in enumerate(zip_longest(first, second)) if pair[0] != pair[1])
    begin = max(place - SHOWN, 0)
    shown = [repr(text[begin : place + SHOWN]) for text in (first, second)]
    return f"from character {place} on: {shown[0]} and {shown[1]}"


def _describe_ids(first: Sequence[int], second: Sequence[int]) -> str:
    place = next(i for i, pair in enumerate(zip_longest(first, second)) if pair[0] != pair[1])
    shown = [str(ids[place]) if place < len(ids) else "the end" for ids in (first, second)]
    return f"from position {place} on: {shown[0]} and {shown[1]}; {len(first)} and {len(second)} ids"


@dataclass(frozen=True)
class _PartDifference:
    """The difference of one part. If `shapes` is set, the shapes differ and nothing else is known."""

    name: str
    shapes: str | None = None
    largest: float = 0.0
    relative: float = 0.0


def _compare_parts(
    stage: str, first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor], tolerance: float
) -> StageComparison:
    if list(first) != list(second):
        alone = sorted(set(first) ^ set(second))
        told = f"only one run has {', '.join(alone)}" if alone else "the order of the parts differs"
        return StageComparison(stage, True, told, tolerance=tolerance)
    parts = [_compare_tensors(name, first[name], second[name]) for name in first]
    differing = [part for part in parts if part.shapes is not None or part.relative > tolerance]
    begin = differing[0] if differing else None
    if begin is not None and begin.shapes is not None:
        return StageComparison(stage, True, f"{_place(begin)}{begin.shapes}", begin.name or None, tolerance=tolerance)
    measured = [part for part in parts if part.shapes is None]
    largest = max((part.largest for part in measured), default=0.0)
    relative = max((part.relative for part in measured), default=0.0)
    detail = f"largest difference {largest:.3g}, relative error {relative:.3g}" if relative else ""
    if begin is None:
        return StageComparison(stage, False, detail, None, largest, relative, tolerance)
    return StageComparison(stage, True, f"{_place(begin)}{detail}", begin.name or None, largest, relative, tolerance)


def _compare_tensors(name: str, first: torch.Tensor, second: torch.Tensor) -> _PartDifference:
    if first.shape != second.shape:
        return _PartDifference(name, f"shape {tuple(first.shape)} and {tuple(second.shape)}")
    a, b = (tensor.detach().cpu().double() for tensor in (first, second))
    if torch.equal(a, b):
        return _PartDifference(name)
    difference, norm = a - b, a.norm().item()
    largest = difference.abs().max().nan_to_num(torch.inf, torch.inf).item()
    relative = (difference.norm() / norm).nan_to_num(torch.inf, torch.inf).item() if norm else torch.inf
    return _PartDifference(name, None, largest, relative)


def _place(part: _PartDifference) -> str:
    return f"from {part.name} on: " if part.name else ""
