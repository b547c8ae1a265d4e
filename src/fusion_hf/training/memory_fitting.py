"""How a trainer makes batches smaller when memory ends, without a change to what a step computes."""

import logging
from typing import Any

from accelerate.utils.memory import should_reduce_batch_size
from transformers import Trainer

from fusion_hf.common.errors import InputError

logger = logging.getLogger(__name__)


class MemoryFitting(Trainer):
    """The part of a trainer that `auto_find_batch_size` is about: a step takes more, smaller micro-batches."""

    attempts = 0  # of this run
    first_step: int | None = None  # where the run begins or goes on

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's."""
        self.attempts, self.first_step = 0, None
        return super().train(*args, **kwargs)

    def forget_step(self) -> None:
        """Forget what was measured of a step that was broken off."""

    def _inner_training_loop(self, batch_size: int | None = None, args: Any = None, **kwargs: Any) -> Any:
        """As Trainer's, which makes batches smaller when memory ends: here a step then takes more of them."""
        if not self.args.auto_find_batch_size:
            return super()._inner_training_loop(batch_size=batch_size, args=args, **kwargs)
        taken = self.args.per_device_train_batch_size
        first = min(batch_size or taken, taken)  # what a checkpoint remembers may be less
        size = self._split_step(first if self.attempts == 0 else taken - 1)
        self.attempts += 1
        try:
            return super()._inner_training_loop(batch_size=size, args=args, **kwargs)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if self.first_step is not None and self.state.global_step > self.first_step:
                raise InputError(
                    f"Memory ended after step {self.state.global_step}, when weights had changed already; set "
                    f"per_device_train_batch_size to less than {size}, and run again from the last checkpoint."
                ) from error
            if size == 1:
                raise InputError(
                    "Memory does not suffice for one record at a time; choose a shorter max_length, or LoRA."
                ) from error
            raise

    def _split_step(self, largest: int) -> int:
        """Take at most so many of a step's records at a time, as many each time. Returns how many."""
        args = self.args
        share = args.per_device_train_batch_size * args.gradient_accumulation_steps
        size = next(size for size in range(largest, 0, -1) if share % size == 0)
        if size != args.per_device_train_batch_size:
            logger.warning("auto_find_batch_size: %d records at a time, %d times a step", size, share // size)
        args.per_device_train_batch_size, args.gradient_accumulation_steps = size, share // size
        self.forget_step()
        return size

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, which takes one step too many where a run goes on from the checkpoint of its last step."""
        if self.first_step is None:
            self.first_step = self.state.global_step
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)
