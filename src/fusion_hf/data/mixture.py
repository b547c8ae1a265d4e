"""Which records of which files: the authors' mixture files, `datasets: [{json_path, sampling_strategy}]` in YAML."""

import re
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from fusion_hf.common.errors import InputError
from fusion_hf.common.yaml_config import make_dataclass, read_yaml
from fusion_hf.data.data_locations import DataLocation, existing_folder, exists, locate

SUFFIXES = (".yaml", ".yml")
MAX_MIXTURE_BYTES = 2**24
ALLOWED = "all, first:N, end:N, random:N with a whole number N from 1 or a share up to 100%"
STRATEGY = re.compile(r"(?P<kind>first|end|random):(?P<amount>\d{1,12}|\d{1,3}(\.\d{1,6})?%)", re.ASCII)

Rows: TypeAlias = "range | np.ndarray"  # without a step, or in increasing order


@dataclass(frozen=True)
class Strategy:
    """How many records of a file are taken, and from where; `amount` None is all, a fraction is a share."""

    text: str = "all"
    kind: str = "first"
    amount: int | Fraction | None = None

    @classmethod
    def from_yaml(cls, text: Any) -> "Strategy":
        """
        Make one of its text.

        Raises:
            ValueError: with what is allowed.
        """
        if text == "all":
            return cls()
        match = STRATEGY.fullmatch(text) if isinstance(text, str) else None
        if match is not None:
            written = match["amount"]
            amount = Fraction(written[:-1]) / 100 if written.endswith("%") else int(written)
            if amount > 0 and not (isinstance(amount, Fraction) and amount > 1):
                return cls(text, match["kind"], amount)
        raise ValueError(ALLOWED)

    def count(self, total: int, where: str) -> int:
        """
        Count how many of `total` records are taken; a share is rounded up.

        Raises:
            InputError: if there are not as many.
        """
        if self.amount is None:
            return total
        count = ceil(self.amount * total) if isinstance(self.amount, Fraction) else self.amount
        if count > total:
            raise InputError(f"{where}: sampling_strategy {self.text!r}, but there are {total} records; take fewer.")
        return count

    def rows(self, total: int, seed: tuple[int, ...], where: str) -> Rows:
        """Choose the records that are taken, in the order of the file."""
        count = self.count(total, where)
        if self.kind == "first" or count == total:
            return range(count)
        if self.kind == "end":
            return range(total - count, total)
        drawn = np.random.default_rng(seed).choice(total, count, replace=False, shuffle=False)
        return np.sort(drawn.astype(np.uint32 if total <= np.iinfo(np.uint32).max else np.uint64))


@dataclass(frozen=True)
class MixtureEntry:
    """
    One file, folder or Hub data set of a mixture.

    Attributes:
        json_path, sampling_strategy, image_root: the keys of an entry in a mixture file.
        folder: that paths are relative to.
        name: where the entry stands, for errors.
    """

    json_path: str
    folder: Path
    sampling_strategy: Strategy = Strategy()
    image_root: str | None = None
    name: str = "data"

    def locate(self) -> DataLocation:
        """
        Raises:
            InputError: if it does not exist.
        """
        image_root = None if self.image_root is None else self.folder / self.image_root
        try:
            return locate(self.json_path, self.folder, image_root)
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from error


def read_entries(source: str | Path, root: str | Path | None = None, key: str = "data") -> list[MixtureEntry]:
    """
    Args:
        source: a mixture file (.yaml), or what can stand in one.
        root: that relative paths and images are under; default: the folder of the mixture or data file.
        key: of the recipe that names the source, for errors.

    Raises:
        InputError: naming the file, the entry and what is wrong with it.
    """
    path = Path(source).expanduser()
    data_root = None if root is None else existing_folder(Path(root).expanduser())
    if path.suffix in SUFFIXES:
        content = read_yaml(path, f"{key}:", MAX_MIXTURE_BYTES)
        return _mixture(content, path, data_root if data_root is not None else path.parent.resolve(), key)
    if exists(path):
        return [MixtureEntry(str(path.absolute()), data_root if data_root is not None else path.parent, name=key)]
    return [MixtureEntry(str(source), data_root if data_root is not None else Path(), name=key)]


def _mixture(content: Any, path: Path, root: Path, key: str) -> list[MixtureEntry]:
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries or set(content) != {"datasets"}:
        raise InputError(f"{key}: {path} must hold `datasets: [...]` with at least one entry, and nothing else.")
    names = [f"{path}, entry {number}" for number in range(1, len(entries) + 1)]
    return [
        make_dataclass(MixtureEntry, values, name, folder=root, name=name)
        for values, name in zip(entries, names, strict=True)
    ]
