"""What a run says of itself: at its beginning what it will do, at its end what was left out."""

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
    """Logs what a run is going to do, and what of its records it has left out."""

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
        """Say it, in one of the processes."""
        if args.should_save and model is not None:
            for line in (*describe_records(self.trainer, state), *describe_model(model, self.trainer.args)):
                logger.info("%s", line)
            logger.info("%s", describe_output(self.trainer.args))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count what was skipped."""
        if not args.should_save:
            return
        skipped = count_skipped(self.trainer.train_dataset)
        if skipped:
            logger.warning(
                "%d broken records were skipped; %s says which and why.",
                skipped,
                skipped_file(self.trainer.train_dataset),
            )
        else:
            logger.info("no record was skipped.")


def count_records(records: Any) -> int | None:
    """How many records a data set has; None if it does not know."""
    if not isinstance(records, Sized) or isinstance(records, StreamedRecords):
        return None
    try:
        return len(records)
    except TypeError:  # of a data set around one without a length
        return None


def count_skipped(records: Any) -> int:
    """How many broken records were left out of a data set so far."""
    return records.num_skipped if isinstance(records, RecordDataset | StreamedRecords) else 0


def skipped_file(records: RecordDataset | StreamedRecords) -> Path:
    """Where they are written down."""
    return records.reader.broken.file


def describe_records(trainer: RecordLoading, state: TrainerState) -> Iterator[str]:
    """The records, how they are divided into steps, and what is held out."""
    args, count = trainer.args, count_records(trainer.train_dataset)
    passes, processes = args.gradient_accumulation_steps, args.world_size
    batch = args.per_device_train_batch_size * passes * processes
    split = f"{args.per_device_train_batch_size} at a time, {passes} times, in {processes} processes"
    yield f"records: {'a stream of unknown length' if count is None else f'{count:,}'}; {batch} per step ({split})"
    epoch = "" if trainer.train_sampler is None else f"{trainer.train_sampler.steps_per_epoch:,} per epoch, "
    yield f"steps: {epoch}{state.max_steps:,} in all"
    held_out = trainer.eval_dataset
    named = held_out if isinstance(held_out, dict) else {} if held_out is None else {"records": held_out}
    for name, records in named.items():
        number = count_records(records)
        size = "a stream" if number is None else f"{number:,}"
        yield f"held out, {name}: {size}; evaluation by {args.eval_strategy.value}"


def describe_model(model: nn.Module, args: FusionTrainingArguments) -> Iterator[str]:
    """What is trained of a model."""
    counts, total = count_by_part(model, trained_only=True), sum(count_by_part(model).values())
    parts = ", ".join(f"{part} {count:,}" for part, count in counts.items() if count)
    yield f"trained parameters: {parts or 'none'} of {total:,}"


def describe_output(args: FusionTrainingArguments) -> str:
    """Where a run writes."""
    to = ", ".join(args.report_to or ())
    figures = f"; figures in log.jsonl{f' and to {to}' if to else ''}"
    every = {"steps": f"every {args.save_steps:g} steps", "epoch": "every epoch"}.get(args.save_strategy.value)
    checkpoints = f"checkpoints {every}" if every else f"save_strategy {args.save_strategy.value}"
    return f"writes to {args.output_dir}: {checkpoints}{figures}"
