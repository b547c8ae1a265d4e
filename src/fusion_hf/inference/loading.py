"""Loading a complete model with its processor from a folder.

The classes are always those of this package. No code in a model folder is ever run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from fusion_hf.common.errors import InputError
from fusion_hf.model.configuration_fusion import FusionConfig
from fusion_hf.model.modeling_fusion import FusionForConditionalGeneration
from fusion_hf.model.processing_fusion import FusionProcessor

TOKENIZER_FILE = "tokenizer.json"


class LoadedModel(NamedTuple):
    """A model and its processor as stored in their folder."""

    model: FusionForConditionalGeneration
    processor: FusionProcessor


def load_config(folder: Path) -> FusionConfig:
    """
    Load the configuration in a model folder.

    Args:
        folder: Model folder.

    Raises:
        InputError: If the configuration cannot be read.
    """
    with _name_folder(folder):
        return FusionConfig.from_pretrained(folder)


def load_model(folder: Path, dtype: torch.dtype, **options: Any) -> LoadedModel:
    """
    Load the model and the processor in a folder.

    Args:
        folder: Model folder.
        dtype: Dtype of the weights.
        options: Further arguments of the model's `from_pretrained`, such as `config` and `quantization_config`.

    Returns:
        The model and its processor.

    Raises:
        InputError: If the files cannot be read, or if weights are missing. Missing weights would be random.
    """
    if not (folder / TOKENIZER_FILE).is_file():
        raise InputError(
            f"The model {folder} has no {TOKENIZER_FILE}, so it cannot read questions. Copy that file there, or "
            "convert the checkpoint with `fusion-hf convert --tokenizer DIR_OR_REPO`."
        )
    with _name_folder(folder):
        processor = FusionProcessor.from_pretrained(folder, trust_remote_code=False)
        model, info = FusionForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, **options
        )
    absent = sorted(info["missing_keys"])
    if absent:
        raise InputError(f"The weights in {folder} lack {len(absent)} tensors, such as {absent[0]}. Copy them again.")
    return LoadedModel(model, processor)


@contextmanager
def _name_folder(folder: Path) -> Iterator[None]:
    """Convert the errors that the files of a folder cause in the libraries to an [`InputError`]."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"The model {folder} cannot be loaded: {type(error).__name__}: {error}") from error
