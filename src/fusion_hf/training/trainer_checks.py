"""What a trainer cannot do right is refused in words, before a step is taken."""

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
    Refuse what would not train, or not as it says.

    Args:
        arguments: of the run; they need FUSION's own.
        collator: must make what the model takes.
        train_dataset: the records.
        settings: further arguments of Trainer.

    Raises:
        InputError: for the first one; names it and what is allowed.
    """
    if not isinstance(arguments, FusionTrainingArguments):
        raise InputError(
            f"args is {_name(arguments)}; allowed: FusionTrainingArguments, which has all fields of TrainingArguments."
        )
    if not isinstance(collator, FusionDataCollator):
        raise InputError(f"data_collator is {_name(collator)}; allowed: FusionDataCollator(processor).")
    if settings.get("compute_loss_func") is not None:
        raise InputError(
            "compute_loss_func is given; allowed: None. It would see the logits before labelled tokens only, and no "
            "mapping loss: override FusionTrainer.compute_loss instead."
        )
    if arguments.n_gpu > 1:
        raise InputError(
            f"One process sees {arguments.n_gpu} GPUs; allowed: 1. Start one for each, as torchrun --nproc-per-node "
            f"{arguments.n_gpu} does, or set CUDA_VISIBLE_DEVICES."
        )
    if arguments.world_size == 1:
        return
    if arguments.auto_find_batch_size:
        raise InputError(
            f"auto_find_batch_size is true in {arguments.world_size} processes; allowed: in one. Where memory ends in "
            "one of them, the others would wait for ever: set per_device_train_batch_size."
        )
    if isinstance(train_dataset, IterableDataset) and not isinstance(train_dataset, StreamedRecords):
        raise InputError(
            f"train_dataset is {_name(train_dataset)} in {arguments.world_size} processes; allowed: a sequence of "
            "records, or load_records(..., streaming=True), which deals its records to processes."
        )


def warn_of_half_weights(model: nn.Module, keeps_float32: bool) -> None:
    """
    Warn where an optimizer would change weights of 16 bits, which are too coarse for most of its steps.

    Args:
        model: with the weights that are trained.
        keeps_float32: whether the optimizer has exact copies of them, as DeepSpeed's has.
    """
    half = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.dtype in HALF_TYPES]
    if half and not keeps_float32:
        dtype = model.get_parameter(half[0]).dtype
        logger.warning(
            "%d trained tensors, such as %s, are %s: most steps of an optimizer are smaller than their last digit and "
            "are lost. Load the model with dtype=torch.float32, and set bf16=True for fast steps.",
            len(half),
            half[0],
            dtype,
        )


def _name(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
