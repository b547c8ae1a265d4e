"""Checks of a trainer's arguments before the first step."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset

from fusion_hf.common.errors import InputError
from fusion_hf.data import StreamedRecords
from fusion_hf.training.arguments import FusionTrainingArguments
from fusion_hf.training.collator import FusionDataCollator

logger = logging.getLogger(__name__)

HALF_TYPES = (torch.bfloat16, torch.float16)


def check_parts(arguments: Any, collator: Any, train_dataset: Any, settings: Mapping[str, Any]) -> None:
    """
    Raise an error if the arguments of a trainer are not supported.

    Args:
        arguments: the training arguments, which must be `FusionTrainingArguments`.
        collator: the collator, which must be a `FusionDataCollator`.
        train_dataset: the records.
        settings: further arguments of `Trainer`.

    Raises:
        InputError: for the first unsupported argument. The message names it and what is allowed.
    """
    if not isinstance(arguments, FusionTrainingArguments):
        raise InputError(
            f"`args` must be FusionTrainingArguments, which has all fields of TrainingArguments, got "
            f"{_name(arguments)}."
        )
    if not isinstance(collator, FusionDataCollator):
        raise InputError(f"`data_collator` must be a FusionDataCollator(processor), got {_name(collator)}.")
    if settings.get("compute_loss_func") is not None:
        raise InputError(
            "`compute_loss_func` must be None, since it would get neither all logits nor the mapping loss. Override "
            "FusionTrainer.compute_loss instead."
        )
    if arguments.n_gpu > 1:
        raise InputError(
            f"A process must use one GPU, got {arguments.n_gpu}. Start one process per GPU with torchrun "
            f"--nproc-per-node {arguments.n_gpu}, or set CUDA_VISIBLE_DEVICES."
        )
    if arguments.world_size == 1:
        return
    if arguments.auto_find_batch_size:
        raise InputError(
            f"`auto_find_batch_size` must be false with several processes, got True with {arguments.world_size}. If "
            "one ran out of memory, the others would wait forever. Set `per_device_train_batch_size` instead."
        )
    if isinstance(train_dataset, IterableDataset) and not isinstance(train_dataset, StreamedRecords):
        raise InputError(
            f"`train_dataset` must be a sequence of records or load_records(..., streaming=True) with "
            f"{arguments.world_size} processes, got {_name(train_dataset)}."
        )


def warn_of_half_weights(model: nn.Module, keeps_float32: bool) -> None:
    """
    Warn if 16-bit weights are trained, since they are too coarse for most optimizer steps.

    Args:
        model: the model with the trained weights.
        keeps_float32: whether the optimizer keeps float32 copies of them, as DeepSpeed does.
    """
    half = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.dtype in HALF_TYPES]
    if half and not keeps_float32:
        dtype = model.get_parameter(half[0]).dtype
        logger.warning(
            "%d trained tensors, such as %s, are %s. Most optimizer steps are smaller than the precision of this "
            "dtype and are lost. Load the model with dtype=torch.float32, and set bf16=True for fast steps.",
            len(half),
            half[0],
            dtype,
        )


def _name(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
