"""What happens at moments of a step: the loss is checked, the speed is measured, a signal ends the run."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fusion_hf.common.errors import InputError
from fusion_hf.common.outputs import write_atomically
from fusion_hf.training.checkpoints import StopSignal, writing
from fusion_hf.training.distributed import any_rank
from fusion_hf.training.throughput import ThroughputMeter, matrix_rate

LOG_FILE = "log.jsonl"  # what each log of the trainer says, a line each
FLOPS_PER_TERAFLOP = 1e12


class NonFiniteError(InputError):
    """The loss or the gradient is no number; the weights were not changed by it."""


class FiniteLossCallback(TrainerCallback):
    """
    Ends a run whose loss or gradient is no number, before the optimizer changes the weights.

    The trainer adds the losses of a step's micro-batches, and says what the norm of its gradient is.
    """

    def __init__(self) -> None:
        self.loss: torch.Tensor | float = 0.0
        self.grad_norm: torch.Tensor | float | None = None

    def add(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's share `()` of the step's loss; it stays on its device, since reading it would wait."""
        self.loss = self.loss + loss.float()

    def reset(self) -> None:
        """Forget a step that was broken off."""
        self.loss = 0.0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """
        Check the step.

        Raises:
            NonFiniteError: in every process, if the step's loss or gradient is no number in one of them.
        """
        loss, norm = torch.as_tensor(self.loss, device=args.device), self.grad_norm
        self.reset()
        finite = torch.isfinite(loss)
        if norm is not None and not args.fp16:  # with float16's loss scaling, infinite gradients are skipped
            finite = finite & torch.isfinite(torch.as_tensor(norm, device=finite.device))
        if any_rank(not bool(finite), args.device):
            raise NonFiniteError(
                f"step {state.global_step + 1}: the loss is {float(loss):g} and the gradient's norm "
                f"{float(norm) if norm is not None else float('nan'):g}; nothing was saved after step "
                f"{state.global_step}. Lower the learning rate, or look at the records of this step."
            )


class ThroughputCallback(TrainerCallback):
    """
    Measures speed and utilisation.

    Args:
        peak_tflops: of one device; None: a matrix product's are measured.
    """

    def __init__(self, peak_tflops: float | None):
        self.peak_tflops = peak_tflops
        self.peak_flops = 0.0
        self.meter = ThroughputMeter()

    def reset(self) -> None:
        """Begin to measure anew."""
        self.meter = ThroughputMeter()

    def report(self, device: torch.device) -> dict[str, float]:
        """Take what was measured since the last report; see [`ThroughputMeter.report`]."""
        meter = self.meter
        self.reset()
        return meter.report(self.peak_flops, device)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Measure what a device can do, and forget what was logged after the checkpoint that the run goes on from."""
        if self.peak_tflops is not None:
            self.peak_flops = self.peak_tflops * FLOPS_PER_TERAFLOP
        else:
            dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
            self.peak_flops = matrix_rate(args.device, dtype)
        if args.should_save:
            forget_after(Path(args.output_dir) / LOG_FILE, state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the step."""
        self.meter.end_step()


class StopCallback(TrainerCallback):
    """
    Has a checkpoint written and the run ended, when the signal to do so came to one of the processes.

    Args:
        signal: that is listened to; None: nothing stops the run.
    """

    def __init__(self, signal: StopSignal | None):
        self.signal = signal
        self.stopped = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look for the signal."""
        if self.signal is not None and any_rank(self.signal.requested, args.device):
            control.should_save = control.should_training_stop = True
            self.stopped = state.global_step < state.max_steps
        if control.should_save:  # or the first mean after a resume would lack the steps before the checkpoint
            control.should_log = True


def append_log(run_dir: Path, values: dict[str, Any]) -> None:
    """
    Add a line to the log in a run's folder.

    Raises:
        CheckpointError: if it cannot be written.
    """
    with writing(run_dir, LOG_FILE), (run_dir / LOG_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(values, default=float) + "\n")


def forget_after(log: Path, step: int) -> None:
    """Take out what a run logged after the checkpoint from which it now goes on: it is going to be logged again."""
    if not log.is_file():
        return
    kept = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # the last one, cut by a kill
            continue
        if isinstance(entry, dict) and entry.get("step", 0) <= step:
            kept.append(line)
    write_atomically(log, "".join(f"{line}\n" for line in kept).encode())
