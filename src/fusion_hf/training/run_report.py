"""Log what a run will do at its start, and what was left out at its end."""

import logging
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fusion_hf.data import RecordDataset, StreamedRecords
from fusion_hf.training.arguments import FusionTrainingArguments
from fusion_hf.training.parameter_groups import count_by_part
from fusion_hf.training.record_loading import RecordLoading

logger = logging.getLogger(__name__)


class RunReportCallback(TrainerCallback):
    """Log what a run will do, and which of its records it skipped."""

    def __init__(self, trainer: RecordLoading):
        self.trainer = trainer

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Log the records, the model and the output folder, in the main process only."""
        if args.should_save and model is not None:
            for line in (*describe_records(self.trainer, state), *describe_model(model, self.trainer.args)):
                logger.info("%s", line)
            logger.info("%s", describe_output(self.trainer.args))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log how many records were skipped."""
        if not args.should_save:
            return
        skipped = count_skipped(self.trainer.train_dataset)
        if skipped:
            logger.warning(
                "%d broken records were skipped. They are listed with the reasons in %s.",
                skipped,
                skipped_file(self.trainer.train_dataset),
            )
        else:
            logger.info("No record was skipped.")


def count_records(records: Any) -> int | None:
    """
    Return the number of records of a data set, or None if it has no length.

    Args:
        records: the data set.
    """
    if not isinstance(records, Sized) or isinstance(records, StreamedRecords):
        return None
    try:
        return len(records)
    except TypeError:  # a wrapper around a data set without a length
        return None


def count_skipped(records: Any) -> int:
    """
    Return how many broken records of a data set were skipped so far.

    Args:
        records: the data set.
    """
    return records.num_skipped if isinstance(records, RecordDataset | StreamedRecords) else 0


def skipped_file(records: RecordDataset | StreamedRecords) -> Path:
    """
    Return the file that lists skipped records.

    Args:
        records: the data set.
    """
    return records.reader.broken.file


def describe_records(trainer: RecordLoading, state: TrainerState) -> Iterator[str]:
    """
    Yield lines about the records, how they are divided into steps, and what is held out.

    Args:
        trainer: the trainer.
        state: the state of the trainer.
    """
    args, count = trainer.args, count_records(trainer.train_dataset)
    passes, processes = args.gradient_accumulation_steps, args.world_size
    batch = args.per_device_train_batch_size * passes * processes
    split = f"{args.per_device_train_batch_size} at a time, {passes} times, in {processes} processes"
    yield f"Records: {'a stream of unknown length' if count is None else f'{count:,}'}, {batch} per step ({split})"
    epoch = "" if trainer.train_sampler is None else f"{trainer.train_sampler.steps_per_epoch:,} per epoch, "
    yield f"Steps: {epoch}{state.max_steps:,} in total"
    held_out = trainer.eval_dataset
    named = held_out if isinstance(held_out, dict) else {} if held_out is None else {"records": held_out}
    for name, records in named.items():
        number = count_records(records)
        size = "a stream" if number is None else f"{number:,}"
        yield f"Held-out records in {name}: {size}, evaluation strategy: {args.eval_strategy.value}"


def describe_model(model: nn.Module, args: FusionTrainingArguments) -> Iterator[str]:
    """
    Yield lines about the trained parameters of a model.

    Args:
        model: the model.
        args: the training arguments.
    """
    counts, total = count_by_part(model, trained_only=True), sum(count_by_part(model).values())
    parts = ", ".join(f"{part} {count:,}" for part, count in counts.items() if count)
    yield f"Trained parameters: {parts or 'none'} of {total:,}"


def describe_output(args: FusionTrainingArguments) -> str:
    """
    Describe where a run writes its files.

    Args:
        args: the training arguments.
    """
    to = ", ".join(args.report_to or ())
    figures = f", metrics in log.jsonl{f' and sent to {to}' if to else ''}"
    every = {"steps": f"every {args.save_steps:g} steps", "epoch": "every epoch"}.get(args.save_strategy.value)
    checkpoints = f"checkpoints {every}" if every else f"save strategy {args.save_strategy.value}"
    return f"Output in {args.output_dir}: {checkpoints}{figures}"
