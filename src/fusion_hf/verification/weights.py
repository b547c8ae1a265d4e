"""Comparison of a folder's weights with those of the authors' checkpoint, and digests of both."""

from dataclasses import dataclass
from pathlib import Path

import torch

from fusion_hf.conversion.from_authors import Conversion
from fusion_hf.conversion.model_files import find_weight_files
from fusion_hf.conversion.stored_tensors import TensorReader, read_folder
from fusion_hf.conversion.weight_plan import WeightReader
from fusion_hf.hub.parity import digest_file


@dataclass(frozen=True)
class WeightsComparison:
    """
    Result of comparing weights, with the names of this package.

    Attributes:
        compared: Number of compared tensors.
        different: Names of tensors that are not exactly equal, missing or unknown, in the order of the checkpoint.
        folder, checkpoint: SHA-256 digests of all weight files, by name.
    """

    compared: int
    different: list[str]
    folder: dict[str, str]
    checkpoint: dict[str, str]


def compare_weights(conversion: Conversion, folder: Path, dtype: torch.dtype) -> WeightsComparison:
    """
    Compare every weight that conversion creates from a checkpoint with the content of a folder.

    At most one shard of each is in memory.

    Args:
        conversion: Conversion of the checkpoint.
        folder: Model folder.
        dtype: Dtype of the folder's weights, to which the checkpoint's are cast.

    Returns:
        The comparison.

    Raises:
        InputError: If a file cannot be read.
    """
    stored = read_folder(folder)
    different = []
    theirs, ours = WeightReader(), TensorReader()
    for name, recipe in conversion.plan.recipes.items():
        is_known = name in stored and stored[name].shape == recipe.shape
        if not is_known or not torch.equal(theirs.load(recipe, dtype), ours.load(stored[name]).to(dtype)):
            different.append(name)
    theirs.close()
    ours.close()
    different += sorted(set(stored) - set(conversion.plan.recipes))
    checkpoint = conversion.locations["checkpoint"].path
    return WeightsComparison(len(conversion.plan.recipes), different, _digests(folder), _digests(checkpoint))


def _digests(folder: Path) -> dict[str, str]:
    return {file.name: digest_file(file) for file in find_weight_files(folder)}
