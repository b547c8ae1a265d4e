"""Devices and number types by the names that users give them."""

import torch

from fusion_hf.common.errors import InputError
from fusion_hf.common.user_values import DTYPE_NAMES, torch_dtype
from fusion_hf.inference.cpu_speed import is_bfloat16_faster
from fusion_hf.model.configuration_fusion import FusionConfig

AUTO = "auto"
DTYPES = {name: torch_dtype(name) for name in DTYPE_NAMES}


def choose_device(name: str = AUTO) -> torch.device:
    """Choose the device called `name`; for `"auto"` a GPU of Nvidia's or AMD's, else Apple's, else the CPU."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == AUTO:
        return torch.device(next(kind for kind, there in available.items() if there))
    try:
        device = torch.device(name)
        count = torch.cuda.device_count() if device.type == "cuda" else 1
        if available.get(device.type, False) and (device.index or 0) < count:
            return device
    except RuntimeError:  # torch has no such device
        pass
    allowed = ", ".join([AUTO, *(kind for kind, there in available.items() if there)])
    raise InputError(f"device is {name!r}; allowed here: {allowed}.")


def choose_dtype(name: str, device: torch.device, saved: torch.dtype | None = None) -> torch.dtype:
    """
    Choose the type called `name`.

    Args:
        name: A key of `DTYPES`, or `"auto"`: bfloat16 on CUDA, and on a CPU that computes faster in it where the model
            was saved in it; else float32.
        device: What the model is to run on.
        saved: The type of the model's files.

    Raises:
        InputError: If there is no such type.
    """
    if name == AUTO:
        fast_cpu = device.type == "cpu" and saved == torch.bfloat16 and is_bfloat16_faster()
        return torch.bfloat16 if device.type == "cuda" or fast_cpu else torch.float32
    if name not in DTYPES:
        raise InputError(f"dtype is {name!r}; allowed: {', '.join([AUTO, *DTYPES])}.")
    return DTYPES[name]


def check_quantized_dtype(config: FusionConfig, name: str) -> torch.dtype:
    """The type of a quantized model: loaded in another one, only a part of it would be cast."""
    if name != AUTO and DTYPES[name] != config.dtype:
        saved = next(known for known, dtype in DTYPES.items() if dtype == config.dtype)
        raise InputError(f"dtype is {name!r}; allowed for this quantized model: {AUTO}, {saved}.")
    return config.dtype
