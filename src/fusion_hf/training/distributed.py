"""What training in several processes needs beside accelerate: CPU processes, FSDP2 on them, sums over ranks."""

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
    Where there is no accelerator, let `arguments` say so: the processes of `accelerate launch` would else not find
    each other, and each would train alone. To be called before Trainer's arguments look for a device.
    """
    if torch.accelerator.is_available():
        return
    if _asked_for("ACCELERATE_USE_DEEPSPEED"):  # which accelerate forgets with `use_cpu`
        arguments.ddp_backend = "gloo"
        _spare_deepspeed_build()
    else:
        arguments.use_cpu = True


def spare_tf32(arguments: TrainingArguments) -> None:
    """Let a recipe allow TF32 where no device has it: all digits are computed there, and Trainer would refuse it."""
    if arguments.tf32 and not is_torch_tf32_available():
        arguments.tf32 = None


def enable_cpu_fsdp(accelerator: Accelerator) -> bool:
    """
    Shard over CPU processes too, if `accelerate launch` was told to: accelerate shards over accelerators only. To be
    called before anything is prepared.

    Returns:
        Whether it did so; Trainer's `is_fsdp_enabled` must become true then.

    Raises:
        InputError: for the old FSDP, which has no CPU version.
    """
    if accelerator.distributed_type != DistributedType.MULTI_CPU or not _asked_for("ACCELERATE_USE_FSDP"):
        return False
    plugin = FullyShardedDataParallelPlugin()  # reads what `accelerate launch` put into the environment
    if plugin.fsdp_version != 2:
        raise InputError(f"fsdp_version is {plugin.fsdp_version}; allowed on CPU: 2 (configs/accelerate/fsdp2.yaml).")
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    return True


def _spare_deepspeed_build() -> None:
    """
    On CPU, DeepSpeed compiles an all-reduce for inference at each first start, and waits for ever if a start before
    was killed meanwhile. Training does not use it.
    """
    try:
        from deepspeed import ops
    except ImportError:  # accelerate says so
        return
    ops.__compatible_ops__[DEEPSPEED_SHARED_MEMORY] = False


def keep_names(model: PreTrainedModel) -> None:
    """
    Under ZeRO-3, save the weights of `model`, just loaded, by the names they have: transformers would give them those
    of older models, by renamings that it looked through but did not need when it loaded them.
    """
    if is_deepspeed_zero3_enabled():
        model._weight_conversions = []


def _asked_for(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


@contextmanager
def whole_weights(accelerator: Accelerator) -> Iterator[None]:
    """Trainer's `save_model` writes a model that `from_pretrained` reads, also where checkpoints are sharded."""
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
    Take back FSDP2's class of `model`, by which saving would find FSDP's code files in place of the model's. Its
    tensors stay sharded: give `save_pretrained` a state dict.
    """
    sharded = type(model)
    if isinstance(model, FSDPModule):
        model.__class__ = sharded.__mro__[sharded.__mro__.index(FSDPModule) + 1]
    try:
        yield
    finally:
        model.__class__ = sharded


def sum_over_ranks(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`values` of any shape, added over all processes, on `device`; as they are, where there is one process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    reduced = values.to(device, copy=True)
    dist.all_reduce(reduced)
    return reduced


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether `flag` is true in at least one process. All processes must ask."""
    return bool(sum_over_ranks(torch.tensor(int(flag)), device))
