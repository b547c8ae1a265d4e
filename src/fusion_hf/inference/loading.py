"""Loading a model with its processor from a folder, and a refusal of one that is not complete.

Whose model it is does not matter: the classes are this package's own, and no code of a model folder is ever run.
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
    """A model and its processor, as they are in their folder."""

    model: FusionForConditionalGeneration
    processor: FusionProcessor


def load_config(folder: Path) -> FusionConfig:
    """
    Load the configuration in a model folder.

    Raises:
        InputError: If it cannot be read.
    """
    with _name_folder(folder):
        return FusionConfig.from_pretrained(folder)


def load_model(folder: Path, dtype: torch.dtype, **options: Any) -> LoadedModel:
    """
    Load the model and the processor in a folder.

    Args:
        folder: The model folder.
        dtype: Of the weights.
        options: Further arguments of `from_pretrained` of the model, such as `config` and `quantization_config`.

    Raises:
        InputError: If they cannot be read, or if weights are missing: those would be random numbers, and so would
            the answers.
    """
    if not (folder / TOKENIZER_FILE).is_file():
        raise InputError(
            f"The model {folder} has no {TOKENIZER_FILE} and cannot read questions. Copy it there, or convert the "
            "checkpoint with fusion-hf convert --tokenizer DIR_OR_REPO."
        )
    with _name_folder(folder):
        processor = FusionProcessor.from_pretrained(folder, trust_remote_code=False)
        model, info = FusionForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, **options
        )
    absent = sorted(info["missing_keys"])
    if absent:
        raise InputError(f"The weights in {folder} lack {len(absent)} tensors, such as {absent[0]}; copy them again.")
    return LoadedModel(model, processor)


@contextmanager
def _name_folder(folder: Path) -> Iterator[None]:
    """Make an `InputError` of what the folder's files make the libraries raise."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"The model {folder} cannot be loaded: {type(error).__name__}: {error}") from error
