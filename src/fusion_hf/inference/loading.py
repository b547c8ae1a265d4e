"""Loading a complete model with its processor from a folder.

The classes are always those of this package. No code in a model folder is ever run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig

from fusion_hf.common.errors import InputError
from fusion_hf.common.extras import require
from fusion_hf.model.configuration_fusion import FusionConfig
from fusion_hf.model.modeling_fusion import FusionForConditionalGeneration
from fusion_hf.model.processing_fusion import FusionProcessor

TOKENIZER_FILE = "tokenizer.json"
BITS = (8, 4)  # that bitsandbytes quantizes to


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


def quantization_config(
    config: FusionConfig, bits: int, device: torch.device, dtype: torch.dtype
) -> BitsAndBytesConfig:
    """
    Make the configuration that quantizes the language model's layers with bitsandbytes while they are loaded.

    Args:
        config: Configuration of the model, which must not be quantized already.
        bits: 8 or 4 (nf4).
        device: Device on which the model will run.
        dtype: Dtype in which 4-bit layers compute.

    Raises:
        InputError: If bitsandbytes is missing or does not support the device, or if the model is quantized already.
    """
    name = f"load_in_{bits}bit"
    require(("bitsandbytes",), f"`{name}`", "quant")
    if "quantization_config" in vars(config):
        raise InputError(f"`{name}` must not be given for a model that is quantized already; leave it out.")
    from bitsandbytes import supported_torch_devices

    if device.type not in supported_torch_devices:
        allowed = ", ".join(sorted(supported_torch_devices))
        raise InputError(f"`{name}` requires a device of bitsandbytes ({allowed}), got {device.type}.")
    if bits == BITS[0]:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


@contextmanager
def _name_folder(folder: Path) -> Iterator[None]:
    """Convert the errors that the files of a folder cause in the libraries to an [`InputError`]."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"The model {folder} cannot be loaded: {type(error).__name__}: {error}") from error
