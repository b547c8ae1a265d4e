"""Devices and dtypes by the names that users pass."""

import torch

from fusion_hf.common.errors import InputError
from fusion_hf.common.user_values import DTYPE_NAMES, torch_dtype
from fusion_hf.inference.cpu_speed import is_bfloat16_faster
from fusion_hf.model.configuration_fusion import FusionConfig

AUTO = "auto"
DTYPES = {name: torch_dtype(name) for name in DTYPE_NAMES}


def choose_device(name: str = AUTO) -> torch.device:
    """
    Choose a device by its name.

    Args:
        name: A device of torch, or `"auto"`: an NVIDIA or AMD GPU, else an Apple GPU, else the CPU.

    Returns:
        The device.

    Raises:
        InputError: If the device is not available.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == AUTO:
        return torch.device(next(kind for kind, there in available.items() if there))
    try:
        device = torch.device(name)
        count = torch.cuda.device_count() if device.type == "cuda" else 1
        if available.get(device.type, False) and (device.index or 0) < count:
            return device
    except RuntimeError:  # torch does not know the device
        pass
    allowed = ", ".join([AUTO, *(kind for kind, there in available.items() if there)])
    raise InputError(f"`device` must be one of {allowed} on this machine, got {name!r}.")


def choose_dtype(name: str, device: torch.device, saved: torch.dtype | None = None) -> torch.dtype:
    """
    Choose a dtype by its name.

    Args:
        name: A key of `DTYPES`, or `"auto"`. `"auto"` is bfloat16 on CUDA, bfloat16 on a CPU that computes faster in
            it if the model was saved in bfloat16, and float32 otherwise.
        device: Device on which the model will run.
        saved: Dtype of the model's files.

    Returns:
        The dtype.

    Raises:
        InputError: If there is no such dtype.
    """
    if name == AUTO:
        fast_cpu = device.type == "cpu" and saved == torch.bfloat16 and is_bfloat16_faster()
        return torch.bfloat16 if device.type == "cuda" or fast_cpu else torch.float32
    if name not in DTYPES:
        raise InputError(f"`dtype` must be one of {', '.join([AUTO, *DTYPES])}, got {name!r}.")
    return DTYPES[name]


def check_quantized_dtype(config: FusionConfig, name: str) -> torch.dtype:
    """
    Return the saved dtype of a quantized model. In another dtype, only a part of the model would be cast.

    Args:
        config: Configuration of the model.
        name: Name of the dtype that the user asks for.

    Raises:
        InputError: If `name` is another dtype.
    """
    if name != AUTO and DTYPES[name] != config.dtype:
        saved = next(known for known, dtype in DTYPES.items() if dtype == config.dtype)
        raise InputError(f"`dtype` must be one of {AUTO}, {saved} for this quantized model, got {name!r}.")
    return config.dtype
