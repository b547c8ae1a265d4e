"""Measure what a training run spends outside the model's passes and the optimizer: collation, logging and the rest."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from loading import MAX_LENGTH, make_processor, write_records
from measure import summarize, synchronize
from transformers import PrinterCallback, TrainerCallback
from workload import TrainingSize, make_weights

from fusion_hf.training import FusionDataCollator, FusionTrainingArguments
from fusion_hf.training.run import make_trainer

COLLATION, COMPUTATION = "collation", "computation"
UNCOUNTED = 2  # steps
ANY_PEAK = 1.0  # a given value in TFLOP/s saves the time of measuring it


class StepClock:
    """The seconds of the current step by activity, and the shares of earlier steps."""

    def __init__(self, device: torch.device):
        self.device = device
        self.spent: Counter[str] = Counter()
        self.shares: dict[str, list[float]] = {"collation": [], "rest": []}
        self.began = 0.0

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        synchronize(self.device)
        begin = time.perf_counter()
        yield
        synchronize(self.device)
        self.spent[name] += time.perf_counter() - begin

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.on(name):
                return function(*args, **kwargs)

        return timed

    def end_step(self) -> None:
        """End a step. Steps are measured from end to end, so that logging and loading are between them."""
        synchronize(self.device)
        now = time.perf_counter()
        if self.began:  # the first step warms up
            elapsed = now - self.began
            self.shares["collation"].append(self.spent[COLLATION] / elapsed)
            self.shares["rest"].append((elapsed - self.spent[COMPUTATION]) / elapsed)
        self.began = now
        self.spent.clear()


class ClockedCollator(FusionDataCollator):
    """A collator with a clock."""

    def __init__(self, collator: FusionDataCollator, clock: StepClock):
        self.__dict__.update(vars(collator))
        self.clock = clock

    def __call__(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        with self.clock.on(COLLATION):
            return super().__call__(records)


class ClockCallback(TrainerCallback):
    """Notify the clock of steps, and time the optimizer."""

    def __init__(self, clock: StepClock):
        self.clock = clock
        self.update = ExitStack()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.update.enter_context(self.clock.on(COMPUTATION))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.update.close()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.end_step()


def measure_overhead(
    size: TrainingSize, folder: Path, device: torch.device, steps: int, autocast: bool
) -> dict[str, Any]:
    """
    Measure the shares of a step in a run that collates in the main process and logs each step.

    `collation` is the share of the collator, and `rest` that of everything except forward, backward, clipping and
    optimizer. Of `steps` steps, the first one is a warm-up, and the last one does not count, since no next batch is
    made during it.
    """
    clock = StepClock(device)
    config = size.config()
    processor = make_processor(config)
    config.text_config.vocab_size = max(config.text_config.vocab_size, len(processor.tokenizer))
    records = write_records(folder, size, size.batch * (steps + UNCOUNTED))
    arguments = FusionTrainingArguments(
        data=str(records),
        data_cache=str(folder / "cache"),
        output_dir=str(folder / "run"),
        use_cpu=device.type == "cpu",
        per_device_train_batch_size=size.batch,
        max_steps=steps + UNCOUNTED,
        max_length=MAX_LENGTH,
        query_lens=[size.query_len],
        bf16=autocast,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        peak_tflops=ANY_PEAK,
        **({"gradient_checkpointing": True} if device.type == "cuda" else {}),  # large models do not fit otherwise
    )
    trainer = make_trainer(make_weights(config, torch.float32, device), processor, arguments)
    trainer.data_collator = ClockedCollator(trainer.data_collator, clock)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ClockCallback(clock))
    model, accelerator = trainer.model, trainer.accelerator
    model.forward = clock.wrap(COMPUTATION, model.forward)
    accelerator.backward = clock.wrap(COMPUTATION, accelerator.backward)
    accelerator.clip_grad_norm_ = clock.wrap(COMPUTATION, accelerator.clip_grad_norm_)
    trainer.train()
    shares = {name: values[:steps] for name, values in clock.shares.items()}
    return {"shares": {name: summarize(values) for name, values in shares.items()}, "rounds": shares}
