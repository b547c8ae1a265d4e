"""Trainer callbacks that check the loss, measure the speed, and stop a run when a signal arrives."""

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

LOG_FILE = "log.jsonl"  # one line of JSON for each log of the trainer
FLOPS_PER_TERAFLOP = 1e12


class NonFiniteError(InputError):
    """The loss or the gradient of a step is NaN or infinite. The weights are unchanged."""


class FiniteLossCallback(TrainerCallback):
    """
    End a run whose loss or gradient is NaN or infinite, before the optimizer changes the weights.

    The trainer calls `add` with the loss of each micro-batch and stores the norm of the step's gradient.
    """

    def __init__(self) -> None:
        self.loss: torch.Tensor | float = 0.0
        self.grad_norm: torch.Tensor | float | None = None

    def add(self, loss: torch.Tensor) -> None:
        """
        Add the share of one micro-batch to the loss of the step.

        Args:
            loss (`()`): stays on its device, since reading the value would wait for the device.
        """
        self.loss = self.loss + loss.float()

    def reset(self) -> None:
        """Discard the losses of an interrupted step."""
        self.loss = 0.0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """
        Check the loss and the gradient of the step.

        Raises:
            NonFiniteError: in every process, if the loss or gradient of the step is NaN or infinite in one of them.
        """
        loss, norm = torch.as_tensor(self.loss, device=args.device), self.grad_norm
        self.reset()
        finite = torch.isfinite(loss)
        if norm is not None and not args.fp16:  # float16's loss scaling skips steps with infinite gradients
            finite = finite & torch.isfinite(torch.as_tensor(norm, device=finite.device))
        if any_rank(not bool(finite), args.device):
            raise NonFiniteError(
                f"Step {state.global_step + 1}: the loss is {float(loss):g} and the norm of the gradient is "
                f"{float(norm) if norm is not None else float('nan'):g}. Nothing was saved after step "
                f"{state.global_step}. Lower the learning rate, or check the records of this step."
            )


class ThroughputCallback(TrainerCallback):
    """
    Measure the speed and the utilization of a run.

    Args:
        peak_tflops: the peak of one device in TFLOP/s. None measures the rate of a matrix product instead.
    """

    def __init__(self, peak_tflops: float | None):
        self.peak_tflops = peak_tflops
        self.peak_flops = 0.0
        self.meter = ThroughputMeter()

    def reset(self) -> None:
        """Discard all measurements and start again."""
        self.meter = ThroughputMeter()

    def report(self, device: torch.device) -> dict[str, float]:
        """
        Return what was measured since the last report; see [`ThroughputMeter.report`].

        Args:
            device: the device on which the processes add up their measurements.

        Returns:
            The measurements by log key.
        """
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
        """
        Measure the peak rate of the device, and remove log lines that are newer than the checkpoint that the run
        resumes from.
        """
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
        """End the measurement of a step."""
        self.meter.end_step()


class StopCallback(TrainerCallback):
    """
    Save a checkpoint and end the run when one of the processes has received the signal to stop.

    Args:
        signal: the signal to listen to. None never stops the run.
    """

    def __init__(self, signal: StopSignal | None):
        self.signal = signal
        self.stopped = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check whether a process has received the signal."""
        if self.signal is not None and any_rank(self.signal.requested, args.device):
            control.should_save = control.should_training_stop = True
            self.stopped = state.global_step < state.max_steps
        if control.should_save:  # otherwise the first mean after a resume would lack the steps before the checkpoint
            control.should_log = True


def append_log(run_dir: Path, values: dict[str, Any]) -> None:
    """
    Append a line to the log in the folder of a run.

    Args:
        run_dir: the `output_dir` of the run.
        values: the logged values, by name.

    Raises:
        CheckpointError: if the line cannot be written.
    """
    with writing(run_dir, LOG_FILE), (run_dir / LOG_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(values, default=float) + "\n")


def forget_after(log: Path, step: int) -> None:
    """
    Remove the log lines that are newer than the checkpoint that a run resumes from, since they will be logged
    again.

    Args:
        log: the log file.
        step: the step of the checkpoint.
    """
    if not log.is_file():
        return
    kept = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # the last line may be incomplete if the process was killed
            continue
        if isinstance(entry, dict) and entry.get("step", 0) <= step:
            kept.append(line)
    write_atomically(log, "".join(f"{line}\n" for line in kept).encode())
