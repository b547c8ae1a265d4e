"""Read mixture files in the format of the authors: YAML with `datasets: [{json_path, sampling_strategy}]`."""

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
ALLOWED = "all, first:N, end:N or random:N, where N is an integer of at least 1 or a share up to 100%"
STRATEGY = re.compile(r"(?P<kind>first|end|random):(?P<amount>\d{1,12}|\d{1,3}(\.\d{1,6})?%)", re.ASCII)

Rows: TypeAlias = "range | np.ndarray"  # a range without a step, or indices in increasing order


@dataclass(frozen=True)
class Strategy:
    """
    How many records of a file are taken, and from where.

    Attributes:
        text: the strategy as it was written.
        kind: `first`, `end` or `random`.
        amount: the number of records. A fraction is a share of all records, and None takes all.
    """

    text: str = "all"
    kind: str = "first"
    amount: int | Fraction | None = None

    @classmethod
    def from_yaml(cls, text: Any) -> "Strategy":
        """
        Parse a strategy.

        Args:
            text: the text, such as `first:100` or `random:10%`.

        Raises:
            ValueError: if the text is invalid. The message lists what is allowed.
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
        Return how many of `total` records are taken. Shares are rounded up.

        Args:
            total: the number of records of the file.
            where: the name of the entry, for errors.

        Raises:
            InputError: if there are fewer records than requested.
        """
        if self.amount is None:
            return total
        count = ceil(self.amount * total) if isinstance(self.amount, Fraction) else self.amount
        if count > total:
            raise InputError(
                f"{where}: `sampling_strategy` must take at most {total} records, all that there are, got "
                f"{self.text!r}."
            )
        return count

    def rows(self, total: int, seed: tuple[int, ...], where: str) -> Rows:
        """
        Choose the records to take, in the order of the file.

        Args:
            total: the number of records of the file.
            seed: the seed for `random`.
            where: the name of the entry, for errors.
        """
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
        json_path: the path or the Hub id.
        folder: the folder that relative paths refer to.
        sampling_strategy: which records to take.
        image_root: the folder of the images.
        name: the name of the entry, for errors.
    """

    json_path: str
    folder: Path
    sampling_strategy: Strategy = Strategy()
    image_root: str | None = None
    name: str = "data"

    def locate(self) -> DataLocation:
        """
        Find the files of this entry.

        Raises:
            InputError: if they do not exist.
        """
        image_root = None if self.image_root is None else self.folder / self.image_root
        try:
            return locate(self.json_path, self.folder, image_root)
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from error


def read_entries(source: str | Path, root: str | Path | None = None, key: str = "data") -> list[MixtureEntry]:
    """
    Read the entries of a mixture.

    Args:
        source: a mixture file (.yaml), or a single file, folder or Hub id.
        root: the folder that relative paths and images are in. Defaults to the folder of the mixture or data file.
        key: the recipe key of the source, for errors.

    Raises:
        InputError: if the mixture is invalid. The message names the file and the entry.
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
        raise InputError(f"{key}: {path} must contain `datasets: [...]` with at least one entry, and nothing else.")
    names = [f"{path}, entry {number}" for number in range(1, len(entries) + 1)]
    return [
        make_dataclass(MixtureEntry, values, name, folder=root, name=name)
        for values, name in zip(entries, names, strict=True)
    ]
