"""Let a trainer reduce the batch size when memory runs out, without changing what a step computes."""

import logging
from typing import Any

from accelerate.utils.memory import should_reduce_batch_size
from transformers import Trainer

from fusion_hf.common.errors import InputError

logger = logging.getLogger(__name__)


class MemoryFitting(Trainer):
    """The part of the trainer that implements `auto_find_batch_size`: a step takes more, smaller micro-batches."""

    attempts = 0  # of the current run
    first_step: int | None = None  # where the run starts or resumes

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does."""
        self.attempts, self.first_step = 0, None
        return super().train(*args, **kwargs)

    def forget_step(self) -> None:
        """Discard the measurements of an interrupted step."""

    def _inner_training_loop(self, batch_size: int | None = None, args: Any = None, **kwargs: Any) -> Any:
        """Train, and split each step into more micro-batches whenever memory runs out."""
        if not self.args.auto_find_batch_size:
            return super()._inner_training_loop(batch_size=batch_size, args=args, **kwargs)
        taken = self.args.per_device_train_batch_size
        first = min(batch_size or taken, taken)  # a checkpoint may have stored a smaller one
        size = self._split_step(first if self.attempts == 0 else taken - 1)
        self.attempts += 1
        try:
            return super()._inner_training_loop(batch_size=size, args=args, **kwargs)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if self.first_step is not None and self.state.global_step > self.first_step:
                raise InputError(
                    f"Memory ran out after step {self.state.global_step}, when the weights had already changed. Set "
                    f"`per_device_train_batch_size` to less than {size} and resume from the last checkpoint."
                ) from error
            if size == 1:
                raise InputError(
                    "There is not enough memory for one record at a time. Reduce `max_length`, or use LoRA."
                ) from error
            raise

    def _split_step(self, largest: int) -> int:
        """Split a step into micro-batches of equal size, at most `largest` records each, and return their size."""
        args = self.args
        share = args.per_device_train_batch_size * args.gradient_accumulation_steps
        size = next(size for size in range(largest, 0, -1) if share % size == 0)
        if size != args.per_device_train_batch_size:
            logger.warning("auto_find_batch_size: a step takes %d records at a time, %d times.", size, share // size)
        args.per_device_train_batch_size, args.gradient_accumulation_steps = size, share // size
        self.forget_step()
        return size

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """
        Run an epoch. Trainer's own method takes one step too many when it resumes from the checkpoint of its
        last step.
        """
        if self.first_step is None:
            self.first_step = self.state.global_step
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)
