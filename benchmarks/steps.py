"""Measure training steps of a model with random weights: FUSION's with and without gradient checkpointing, and
other ways.
"""

import gc
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any, TypeVar

import torch
from measure import matmul_rate, paired_ratios, seconds, summarize, turned
from memory import peak_allocated, peak_resident
from reference import build_reference
from workload import TrainingSize, build_eager, make_batch, make_shallow, make_weights, sharing_copy

from fusion_hf import FusionForConditionalGeneration
from fusion_hf.training.collator import find_loss_positions
from fusion_hf.training.flops import BatchShape, step_flops
from fusion_hf.training.gradient_checkpointing import enable_checkpointing

TOLERANCE = 1e-4  # relative tolerance of loss and gradient in float32, since all variants are the same function
GRADIENT_DTYPES = (torch.float32, torch.bfloat16)
LEARNING_RATE = 1e-5
FLOPS_OF_TRAINED_PRODUCT = 6  # products per weight and row: forward, and the gradients of weight and input
OURS, CHECKPOINTED, EAGER = "ours", "ours_checkpointed", "eager"
REFERENCE, REFERENCE_CHECKPOINTED = "reference", "reference_checkpointed"
# numerators and denominators of ratios
PAIRS = (
    (OURS, REFERENCE),
    (CHECKPOINTED, REFERENCE),
    (CHECKPOINTED, REFERENCE_CHECKPOINTED),
    (OURS, EAGER),
    (CHECKPOINTED, OURS),
)

T = TypeVar("T")
Gradient = dict[str, torch.Tensor]


class StepBenchmark:
    """
    All variants over one set of weights, gradients and optimizer state, and all measurements so far.

    Variants that do not fit into an accelerator's memory are left out, and listed in `out_of_memory`.
    """

    def __init__(self, size: TrainingSize, dtype: torch.dtype, device: torch.device, autocast: bool):
        self.size, self.dtype, self.device, self.autocast = size, dtype, device, autocast
        self.config = size.config()
        self.models = self.build_models()
        self.weights = dict(self.models[OURS].named_parameters())
        batch = make_batch(self.config, size, device)
        self.tokens = batch["input_ids"].shape
        positions = {"loss_positions": find_loss_positions(batch["labels"])}  # as in FusionTrainer's batches
        self.num_logits = positions["loss_positions"].numel()
        # the authors compute all logits
        self.batches = {name: batch if "reference" in name else {**batch, **positions} for name in self.models}
        self.out_of_memory: list[str] = []
        self.errors = self.check_equality() if dtype == torch.float32 else shallow_errors(size, device)
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        for name in list(self.models):  # the first step creates AdamW's moments; all steps are a warm-up
            self.attempt(name, self.step_seconds)
        if not self.models:
            raise RuntimeError(f"No variant with {size.batch} samples fits into the memory of {device}.")
        self.measured: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def build_models(self) -> dict[str, FusionForConditionalGeneration]:
        ours = make_weights(self.config, self.dtype, self.device).train()
        reference = build_reference(ours)
        models = {OURS: ours, CHECKPOINTED: sharing_copy(ours), EAGER: build_eager(ours), REFERENCE: reference}
        models[REFERENCE_CHECKPOINTED] = sharing_copy(reference)
        for name in (CHECKPOINTED, REFERENCE_CHECKPOINTED):
            enable_checkpointing(models[name])
        return models

    def passes(self, name: str) -> torch.Tensor:
        """Run forward and backward, and return the loss `()`."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.models[name](**self.batches[name], use_cache=False).loss
        loss.backward()
        return loss.detach()

    def clear(self) -> None:
        """Delete the gradients."""
        for weight in self.weights.values():
            weight.grad = None

    def attempt(self, name: str, function: Callable[[str], T]) -> T | None:
        """Return the result of a function for a variant. If memory runs out, leave the variant out and return None."""
        try:
            return function(name)
        except torch.OutOfMemoryError:
            self.out_of_memory.append(name)
        del self.models[name]
        self.clear()
        gc.collect()
        torch.cuda.empty_cache()
        return None

    def check_equality(self) -> dict[str, float]:
        """
        Return the errors of loss and gradient compared with the first variant. A variant with other results is
        an error.
        """
        expected, errors = None, {}
        for name in list(self.models):
            result = self.attempt(name, self.differentiate)
            if result is not None and expected is not None:
                errors[name] = relative_error(result, expected)
            expected = result if expected is None else expected
        for name, error in errors.items():
            if not error <= TOLERANCE:
                raise RuntimeError(
                    f"The gradient of {name!r} may differ from ours by at most {TOLERANCE}, got {error:.1e}."
                )
        return errors

    def differentiate(self, name: str) -> tuple[torch.Tensor, Gradient]:
        """Return the loss and gradient of a variant without autocast, on the CPU."""
        autocast, self.autocast = self.autocast, False
        loss = self.passes(name).cpu()
        gradient = {key: weight.grad.cpu() for key, weight in self.weights.items() if weight.grad is not None}
        self.autocast = autocast
        self.clear()
        return loss, gradient

    def step_seconds(self, name: str) -> tuple[float, float]:
        """Return the time of forward and backward, and of the whole step."""
        passes = seconds(partial(self.passes, name), self.device)
        update = seconds(self.optimizer.step, self.device)
        self.clear()
        return passes, passes + update

    def time_round(self, index: int) -> None:
        """Measure every time once. The order of the variants rotates with the number of the round."""
        for name in turned(list(self.models), index):
            passes, step = self.step_seconds(name)
            self.measured["passes_seconds"][name].append(passes)
            self.measured["step_seconds"][name].append(step)
        dtype = torch.bfloat16 if self.autocast else self.dtype
        rate = matmul_rate(self.size.matrix_side, dtype, self.device)
        self.measured["machine"]["matmul_flops_per_second"].append(rate)

    def measure_memory(self) -> None:
        """
        Measure the peak that forward and backward add to weights and optimizer state, gradients included.

        There are two figures: the bytes of tensors, which are the same in every run, and the growth of the process's
        resident memory.
        """
        for name in self.models:
            function = partial(self.passes, name)
            self.measured["allocated_bytes"][name].append(peak_allocated(function, self.device))
            self.clear()
            grown = peak_resident(function, self.device)
            self.clear()
            if grown is not None:
                self.measured["resident_bytes"][name].append(grown)

    def work(self, name: str) -> int:
        """Return the FLOPs of a step's matrix products, without those that checkpointing repeats."""
        batch, sequence = self.tokens
        instruct_tokens = self.batches[name]["instruct_input_ids"].shape[1]
        shape = BatchShape(batch, sequence, instruct_tokens, self.size.turns, self.size.query_len)
        flops = step_flops(self.config, shape).training
        text = self.config.text_config
        spared = 0 if "reference" in name else batch * sequence - self.num_logits
        return flops - FLOPS_OF_TRAINED_PRODUCT * spared * text.hidden_size * text.vocab_size

    def result(self) -> dict[str, Any]:
        """Return ratios and fractions, paired by round, and what they were computed from."""
        machine = self.measured["machine"]["matmul_flops_per_second"]
        figures = {figure: dict(values) for figure, values in self.measured.items() if figure != "machine"}
        work = {name: self.work(name) for name in self.models}
        return {
            "tokens": list(self.tokens),
            "weights": sum(weight.numel() for weight in self.weights.values()),
            "weight_bytes": sum(weight.nbytes for weight in self.weights.values()),
            "out_of_memory": self.out_of_memory,
            "relative_errors": self.errors,
            "work_flops": work,
            "ratios": {figure: compare(values) for figure, values in figures.items()},
            "machine_fractions": {
                name: summarize([work[name] / time / rate for time, rate in zip(times, machine, strict=True)])
                for name, times in figures["passes_seconds"].items()
            },
            "medians": {
                figure: {name: median(values) for name, values in variants.items()}
                for figure, variants in figures.items()
            },
            "rounds": {**figures, "machine": dict(self.measured["machine"])},
        }


def shallow_errors(size: TrainingSize, device: torch.device) -> dict[str, float]:
    """
    Return the errors of a model with the same widths and a few layers in float32.

    With many layers of random weights, each of which amplifies rounding errors, gradients in bfloat16 have nothing in
    common.
    """
    return StepBenchmark(replace(size, config=partial(make_shallow, size.config)), torch.float32, device, False).errors


def relative_error(result: tuple[torch.Tensor, Gradient], expected: tuple[torch.Tensor, Gradient]) -> float:
    """Return the relative error of the loss or the whole gradient, whichever is larger."""
    (loss, gradient), (expected_loss, expected_gradient) = result, expected
    if gradient.keys() != expected_gradient.keys():
        return float("inf")
    difference = sum((gradient[key] - value).double().square().sum() for key, value in expected_gradient.items())
    norm = sum(value.double().square().sum() for value in expected_gradient.values())
    error = torch.as_tensor(difference / norm).sqrt().item()
    return max(error, (loss / expected_loss - 1).abs().item())


def compare(variants: dict[str, list[float]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the ratios of `PAIRS`: variant -> other variant -> spread over the rounds."""
    ratios: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for name, other in PAIRS:
        if name in variants and other in variants:
            ratios[name][other] = paired_ratios(variants[name], variants[other])
    return dict(ratios)
