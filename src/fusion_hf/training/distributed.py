"""Training in several processes beyond what accelerate does: CPU processes, FSDP2 on CPU, and sums over ranks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_torch_tf32_available

from fusion_hf.common.errors import InputError

FULL_STATE_DICT = "FULL_STATE_DICT"
DEEPSPEED_SHARED_MEMORY = "deepspeed_shm_comm"  # DeepSpeed's name of its operator


def choose_cpu(arguments: TrainingArguments) -> None:
    """
    Set `use_cpu` if there is no accelerator. Call this before the arguments of Trainer choose a device.

    Otherwise the processes of `accelerate launch` do not find each other, and each one trains alone.

    Args:
        arguments: the arguments, changed in place.
    """
    if torch.accelerator.is_available():
        return
    if _asked_for("ACCELERATE_USE_DEEPSPEED"):  # accelerate ignores this variable if `use_cpu` is set
        arguments.ddp_backend = "gloo"
        _spare_deepspeed_build()
    else:
        arguments.use_cpu = True


def spare_tf32(arguments: TrainingArguments) -> None:
    """
    Turn `tf32` off where no device supports it. Trainer would raise an error, although float32 is more exact.

    Args:
        arguments: the arguments, changed in place.
    """
    if arguments.tf32 and not is_torch_tf32_available():
        arguments.tf32 = None


def enable_cpu_fsdp(accelerator: Accelerator) -> bool:
    """
    Enable FSDP on CPU processes if `accelerate launch` was told to use it. Accelerate itself shards over
    accelerators only.

    Call this before anything is prepared.

    Args:
        accelerator: the accelerator, changed in place.

    Returns:
        Whether FSDP was enabled. If so, Trainer's `is_fsdp_enabled` must be set to true.

    Raises:
        InputError: if FSDP version 1 is requested, which does not support CPUs.
    """
    if accelerator.distributed_type != DistributedType.MULTI_CPU or not _asked_for("ACCELERATE_USE_FSDP"):
        return False
    plugin = FullyShardedDataParallelPlugin()  # reads the environment variables of `accelerate launch`
    if plugin.fsdp_version != 2:
        raise InputError(
            f"`fsdp_version` must be 2 on CPU (as in configs/accelerate/fsdp2.yaml), got {plugin.fsdp_version}."
        )
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    return True


def _spare_deepspeed_build() -> None:
    """
    Prevent DeepSpeed from compiling an operator on CPU that training does not use.

    DeepSpeed compiles this all-reduce for inference on the first start, and hangs forever if an earlier start was
    killed during the build.
    """
    try:
        from deepspeed import ops
    except ImportError:  # accelerate reports this
        return
    ops.__compatible_ops__[DEEPSPEED_SHARED_MEMORY] = False


def keep_names(model: PreTrainedModel) -> None:
    """
    Let ZeRO-3 save the weights of a model under their current names.

    transformers would otherwise rename them to the names of older models.

    Args:
        model: a model that has just been loaded.
    """
    if is_deepspeed_zero3_enabled():
        model._weight_conversions = []


def _asked_for(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


@contextmanager
def whole_weights(accelerator: Accelerator) -> Iterator[None]:
    """
    Let Trainer's `save_model` write full weights that `from_pretrained` can read, even where checkpoints are
    sharded.

    Args:
        accelerator: the accelerator of the trainer.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        yield
        return
    plugin = accelerator.state.fsdp_plugin
    usual = plugin.state_dict_type
    plugin.set_state_dict_type(FULL_STATE_DICT)
    try:
        yield
    finally:
        plugin.set_state_dict_type(usual)


@contextmanager
def plain_class(model: nn.Module) -> Iterator[None]:
    """
    Give a model its own class back while FSDP2 has replaced it, so that saving finds the code files of the model.

    The tensors stay sharded, so pass a state dict to `save_pretrained`.

    Args:
        model: a model that FSDP2 has wrapped.
    """
    sharded = type(model)
    if isinstance(model, FSDPModule):
        model.__class__ = sharded.__mro__[sharded.__mro__.index(FSDPModule) + 1]
    try:
        yield
    finally:
        model.__class__ = sharded


def sum_over_ranks(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """
    Sum a tensor over all processes.

    Args:
        values: a tensor of any shape.
        device: the device that the processes communicate on.

    Returns:
        The sum, of the same shape, or `values` itself if there is only one process.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    reduced = values.to(device, copy=True)
    dist.all_reduce(reduced)
    return reduced


def any_rank(flag: bool, device: torch.device) -> bool:
    """
    Return whether `flag` is true in at least one process. All processes must call this.

    Args:
        flag: the value of this process.
        device: the device that the processes communicate on.

    Returns:
        The same value in all processes.
    """
    return bool(sum_over_ranks(torch.tensor(int(flag)), device))
