"""Plan what a recipe needs on given GPUs, before anything is allocated: memory by kind, steps, tokens and FLOPs.

Weights are counted on the meta device, activations by a simulated step (`simulation.py`), and states by what
transformers' Trainer, accelerate and DeepSpeed keep for each weight. P is the number of weights, and W the number of
processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

import torch

from fusion_hf.model.configuration_fusion import NUM_TILES, FusionConfig
from fusion_hf.training.flops import BatchShape, StepFlops, step_flops
from fusion_hf.training.parameter_groups import count_by_part
from fusion_hf.training.recipe import split_batch
from fusion_hf.training.recipe_keys import (
    FULL,
    LANGUAGE_MODEL,
    OPTIMIZER_BYTES,
    OwnArguments,
    check_optimizer,
    keys_of,
)
from fusion_hf.training.simulation import (
    ACCUMULATED,
    KEPT,
    REDUCED,
    StepPeak,
    StepSetting,
    fake_model,
    quantized_layers,
    simulate,
)

NONE, DDP, ZERO2, ZERO3, FSDP2 = "none", "ddp", "zero2", "zero3", "fsdp2"
AUTO = "auto"  # the first of `SHARDINGS` that fits
SHARDINGS = (DDP, ZERO2, FSDP2, ZERO3)
OPTIMIZER_STEP = "optimizer step"

GIB = 2**30
HALF = 2  # bytes of bfloat16 and float16
UNFUSED = "adamw_torch"  # allocates a float32 copy of all trained weights during its step
# NF4 with one 8-bit scale per 64 weights, and one float32 scale per 256 of these scales
FOUR_BIT_BYTES = 0.5 + 1 / 64 + FULL / (64 * 256)
EIGHT_BIT_BYTES = 1.0  # the scale of each row is not counted
LIVE_WEIGHTS = 10**9  # ZeRO-3 gathers at most so many at a time (`stage3_max_live_parameters`)
BUCKETS = 2  # ZeRO fills one while it sends the other; each holds `hidden_size ** 2` gradients
# FSDP2 holds the current layer, the prefetched layer, the gradients of one layer, and a buffer to send them
FSDP_LAYERS = 4
RESERVED = 2 * GIB  # CUDA context, and the buffers of NCCL and cuBLAS
USABLE = 0.95  # share of the rest; the allocator loses some to fragmentation

LORA_DROPOUT = 0.05  # the recipe's default
DEFAULT_MAX_LENGTH = 4096  # for tokenizers without a maximum
TURNS = 2  # of the simulated batch
INSTRUCT_TOKENS = 256
AVERAGE_INSTRUCT_TOKENS = 128
TEXT_TOKENS = 256  # text of an average record if its length is not given, without image and latent tokens


@dataclass(frozen=True)
class Machine:
    """
    The GPUs of a run.

    Args:
        gpus: the number of GPUs over all nodes.
        memory: the memory of each GPU in bytes.
        sharding: one of `SHARDINGS`, `NONE` or `AUTO`.
    """

    gpus: int
    memory: int
    sharding: str = AUTO

    @property
    def usable(self) -> int:
        """The bytes of a GPU that tensors may fill."""
        return int((self.memory - RESERVED) * USABLE)


@dataclass(frozen=True)
class WeightCounts:
    """
    Numbers of weights, adapters included.

    Args:
        by_part: the number of weights of each part.
        trained: the number of trained weights of each part.
        quantized: the number of frozen weights in 4 or 8 bits.
        largest_quantized: the number of weights of the largest quantized layer.
        largest_layer: the number of weights of the largest layer that FSDP gathers as a whole.
        outside: the number of weights outside these layers.
        originals: the number of frozen copies that PEFT keeps of parts trained in full next to adapters.
        quantized_bytes: the bytes of a quantized weight.
    """

    by_part: dict[str, int]
    trained: dict[str, int]
    quantized: int
    largest_quantized: int
    largest_layer: int
    outside: int
    originals: int = 0
    quantized_bytes: float = FOUR_BIT_BYTES

    @property
    def total(self) -> int:
        """Number of all weights."""
        return sum(self.by_part.values())

    @property
    def total_trained(self) -> int:
        """Number of all trained weights."""
        return sum(self.trained.values())


@dataclass(frozen=True)
class GpuMemory:
    """
    The bytes that one GPU holds when its memory use peaks.

    Args:
        sharding: how the states are divided.
        batch: the number of records per pass.
        accumulation: the number of passes per step.
        parameters: the bytes of the weights.
        gradients: the bytes of their gradients.
        optimizer: the bytes of the optimizer's state.
        communication: the bytes of buckets, and of weights gathered from other GPUs.
        activations: the bytes of activations and inputs.
        moment: the phase of the step in which the peak occurs.
    """

    sharding: str
    batch: int
    accumulation: int
    parameters: int
    gradients: int
    optimizer: int
    communication: int
    activations: int
    moment: str

    @property
    def total(self) -> int:
        """Bytes in total."""
        return self.parameters + self.gradients + self.optimizer + self.communication + self.activations


@dataclass(frozen=True)
class StateBytes:
    """The bytes per GPU of everything except activations. `step` is added while the optimizer steps."""

    parameters: int
    gradients: int
    optimizer: int
    communication: int
    step: int

    @property
    def lasting(self) -> int:
        """The bytes that are needed throughout a step."""
        return self.parameters + self.optimizer + self.communication


@dataclass
class PlannedRun:
    """The values of a recipe that determine memory and work."""

    trained: tuple[str, ...]
    checkpointing: bool
    half: torch.dtype | None  # None: float32 throughout
    optimizer: str
    max_length: int
    query_lens: tuple[int, ...]
    lora_rank: int
    lora_parts: tuple[str, ...]
    lora_dropout: float
    lora_targets: tuple[str, ...] | None
    quantized: bool
    quantized_bytes: float
    on_cpu: bool
    epochs: float
    max_steps: int

    @classmethod
    def of(cls, values: Mapping[str, Any], config: FusionConfig) -> "PlannedRun":
        """
        Read the values from a recipe.

        Args:
            values: the keys and values of the recipe.
            config: the configuration of the model.

        Returns:
            The values, with defaults filled in.

        Raises:
            InputError: if the memory use of the optimizer is unknown.
        """
        optimizer = check_optimizer(values)
        rank, targets = values.get("lora_rank") or 0, values.get("lora_targets")
        own = OwnArguments(**{key: values[key] for key in keys_of(OwnArguments) if key in values})
        trained = own.train or own.default_train
        half = torch.bfloat16 if values.get("bf16") else torch.float16 if values.get("fp16") else None
        return cls(
            trained=tuple(part for part in trained if part not in own.adapted_parts),
            checkpointing=bool(values.get("gradient_checkpointing")),
            half=half,
            optimizer=optimizer,
            max_length=values.get("max_length") or DEFAULT_MAX_LENGTH,
            query_lens=tuple(values.get("query_lens") or config.query_lens),
            lora_rank=rank,
            lora_parts=own.adapted_parts,
            lora_dropout=values.get("lora_dropout", LORA_DROPOUT),
            lora_targets=None if targets is None else tuple(targets),
            quantized=own.load_in_4bit or own.load_in_8bit,
            quantized_bytes=EIGHT_BIT_BYTES if own.load_in_8bit else FOUR_BIT_BYTES,
            on_cpu=bool(values.get("use_cpu")),
            epochs=values.get("num_train_epochs") or 3.0,  # transformers' default
            max_steps=values.get("max_steps") or -1,
        )


@dataclass(frozen=True)
class Work:
    """
    The work of the whole run. Each FLOP belongs to a matrix product.

    Args:
        records: the number of records in an epoch.
        steps: the number of optimizer steps.
        tokens: the number of tokens that the language model reads.
        model_flops: the FLOPs without recomputation.
        hardware_flops: the FLOPs including what gradient checkpointing recomputes.
    """

    records: int
    steps: int
    tokens: int
    model_flops: int
    hardware_flops: int


@dataclass
class TrainingPlan:
    """
    The plan of a recipe on a machine.

    Args:
        machine: the machine, with the sharding that was chosen.
        weights: the weights of the model.
        memory: the memory of a GPU at the batch size of the recipe.
        fits: whether that is at most `machine.usable`.
        largest_batch: the largest number of records per pass that fits and divides the step. None if not even one
            fits.
        record_tokens: the number of tokens of an average record.
        record_flops: the FLOPs of an average record.
        work: the work of the whole run. None if the number of records is unknown.
        help: if the plan does not fit, changes to try and the bytes that a GPU would need after each.
    """

    machine: Machine
    weights: WeightCounts
    memory: GpuMemory
    fits: bool
    largest_batch: int | None
    record_tokens: int
    record_flops: StepFlops
    work: Work | None = None
    help: dict[str, int] = field(default_factory=dict)


class Planner:
    """
    Plan one recipe for one model. Simulations are cached, since several shardings share them.

    Args:
        config: the configuration of the model.
        values: the keys and values of the recipe.
    """

    def __init__(self, config: FusionConfig, values: Mapping[str, Any]):
        self.config, self.values = config, dict(values)
        self.run = PlannedRun.of(values, config)
        self._weights: dict[StepSetting, WeightCounts] = {}
        self._peaks: dict[tuple[StepSetting, BatchShape], StepPeak] = {}

    # ---- memory ----

    def weights(self, run: PlannedRun | None = None) -> WeightCounts:
        """Count the weights of the model under the recipe, or under the values in `run`."""
        run = self.run if run is None else run
        setting = self.setting(run, DDP, KEPT)
        if setting not in self._weights:
            counts = count_weights(self.config, setting)
            self._weights[setting] = replace(counts, quantized_bytes=run.quantized_bytes)
        return self._weights[setting]

    def setting(self, run: PlannedRun, sharding: str, gradients: str) -> StepSetting:
        """
        Return how a step runs: ZeRO and FSDP compute with 16-bit weights, a single process and DDP under
        autocast.
        """
        casts = sharding in (NONE, DDP)
        full = casts or run.half is None
        return StepSetting(
            trained=run.trained,
            weights=torch.float32 if full or run.half is None else run.half,
            autocast=run.half if casts else None,
            checkpointing=run.checkpointing,
            gradients=gradients,
            lora_rank=run.lora_rank,
            lora_parts=run.lora_parts,
            lora_dropout=run.lora_dropout,
            lora_targets=run.lora_targets,
            quantized=run.quantized,
            on_cpu=run.on_cpu,
        )

    def memory(
        self,
        sharding: str,
        gpus: int,
        batch: int,
        accumulation: int,
        run: PlannedRun | None = None,
        shape: BatchShape | None = None,
    ) -> GpuMemory:
        """
        Compute the peak memory of one GPU.

        Args:
            sharding: how the states are divided.
            gpus: the number of GPUs.
            batch: the number of records per pass.
            accumulation: the number of passes per step.
            run: the values of the recipe. Defaults to those of this planner.
            shape: the shape of a micro-batch. Defaults to the maximum length with the most latent tokens.

        Returns:
            The memory by kind, in bytes.
        """
        run = self.run if run is None else run
        sharded = sharding not in (NONE, DDP)
        gradients = REDUCED if sharded else KEPT if accumulation == 1 else ACCUMULATED
        if shape is None:
            shape = BatchShape(batch, run.max_length, INSTRUCT_TOKENS, TURNS, max(run.query_lens))
        setting = self.setting(run, sharding, gradients)
        peak = self._peaks.get((setting, shape))
        if peak is None:
            peak = self._peaks[setting, shape] = simulate(self.config, shape, setting)
        states = self.states(sharding, gpus, run)
        waiting = (accumulation - 1) * batch * self.image_bytes  # all batches of a step are fetched at once
        held = states.gradients if sharded else peak.gradients
        worst = (held, peak.activations + waiting, peak.phase)
        if sum(worst[:2]) < states.gradients + states.step:
            worst = (states.gradients, states.step, OPTIMIZER_STEP)
        gradients_held, activations, moment = worst
        return GpuMemory(
            sharding=sharding,
            batch=batch,
            accumulation=accumulation,
            parameters=states.parameters,
            gradients=gradients_held,
            optimizer=states.optimizer,
            communication=states.communication,
            activations=activations,
            moment=moment,
        )

    def states(self, sharding: str, gpus: int, run: PlannedRun | None = None) -> StateBytes:
        """Count the bytes of everything except activations, without a simulation."""
        run = self.run if run is None else run
        bucket = self.config.text_config.hidden_size**2  # what `auto` means in transformers' DeepSpeed integration
        return count_states(self.weights(run), sharding, gpus, run.half is not None, run.optimizer, bucket)

    @property
    def image_bytes(self) -> int:
        """Bytes of the pixels of one image in a batch."""
        vision = self.config.vision_config
        return FULL * (NUM_TILES + 1) * vision.num_channels * vision.image_size**2

    def choose(self, machine: Machine, batch: int, accumulation: int) -> GpuMemory:
        """
        Compute the memory under the sharding of the machine. `AUTO` selects the first one that fits, or the
        smallest.

        Args:
            machine: the GPUs.
            batch: the number of records per pass.
            accumulation: the number of passes per step.
        """
        gpus = machine.gpus
        if machine.sharding != AUTO:
            return self.memory(machine.sharding, gpus, batch, accumulation)
        shardings = SHARDINGS if gpus > 1 else (NONE,)
        found = []
        for sharding in shardings:
            if self.states(sharding, gpus).lasting > machine.usable:
                continue  # a simulation takes seconds
            found.append(self.memory(sharding, gpus, batch, accumulation))
            if found[-1].total <= machine.usable:
                return found[-1]
        if not found:
            least = min(shardings, key=lambda sharding: self.states(sharding, gpus).lasting)
            found.append(self.memory(least, gpus, batch, accumulation))
        return min(found, key=lambda memory: memory.total)

    # ---- the whole plan ----

    def plan(self, machine: Machine, records: int | None = None, record_tokens: int | None = None) -> TrainingPlan:
        """
        Make the plan for a machine.

        Args:
            machine: the GPUs.
            records: the number of records in an epoch. None leaves the total work out.
            record_tokens: the number of tokens of an average record in the language model. None uses an estimate.

        Returns:
            The plan.

        Raises:
            InputError: if the global batch size cannot be divided among the GPUs.
        """
        batch, accumulation = split_batch(self.values, machine.gpus)
        memory = self.choose(machine, batch, accumulation)
        fits = memory.total <= machine.usable
        latents = round(sum(self.run.query_lens) / len(self.run.query_lens))
        if record_tokens is None:
            record_tokens = min(self.run.max_length, self.config.num_image_tokens + latents + TEXT_TOKENS)
        shape = BatchShape(1, record_tokens, AVERAGE_INSTRUCT_TOKENS, 1, latents)
        flops = step_flops(self.config, shape, self.run.trained, self.run.lora_parts)
        return TrainingPlan(
            machine=replace(machine, sharding=memory.sharding),
            weights=self.weights(),
            memory=memory,
            fits=fits,
            largest_batch=self.largest_batch(replace(machine, sharding=memory.sharding), batch * accumulation),
            record_tokens=record_tokens,
            record_flops=flops,
            work=None if records is None else self.work(records, record_tokens, flops, batch, accumulation, machine),
            help={} if fits else self.what_helps(machine, memory),
        )

    def largest_batch(self, machine: Machine, share: int) -> int | None:
        """
        Find the largest number of records per pass that fits into memory.

        Args:
            machine: the GPUs.
            share: the number of records of a step on each GPU. Only its divisors are tried.

        Returns:
            The number, or None if not even one record fits.
        """
        largest = None
        if self.states(machine.sharding, machine.gpus).lasting > machine.usable:
            return None
        for batch in (number for number in range(1, share + 1) if share % number == 0):
            if self.memory(machine.sharding, machine.gpus, batch, share // batch).total > machine.usable:
                break
            largest = batch
        return largest

    def work(
        self, records: int, tokens: int, flops: StepFlops, batch: int, accumulation: int, machine: Machine
    ) -> Work:
        """
        Sum up the work of all steps, for average records without padding.

        Args:
            records: the number of records in an epoch.
            tokens: the number of tokens of an average record.
            flops: the FLOPs of an average record.
            batch: the number of records per pass.
            accumulation: the number of passes per step.
            machine: the GPUs.
        """
        per_step = batch * accumulation * machine.gpus
        steps = self.run.max_steps if self.run.max_steps > 0 else ceil(ceil(records / per_step) * self.run.epochs)
        seen = round(records * self.run.epochs) if self.run.max_steps <= 0 else steps * per_step
        hardware = flops.training + (flops.recomputed if self.run.checkpointing else 0)
        return Work(records, steps, seen * tokens, seen * flops.training, seen * hardware)

    def what_helps(self, machine: Machine, memory: GpuMemory) -> dict[str, int]:
        """
        Compute the memory that a GPU would need after each of a few changes to the recipe, applied one at a time.

        Args:
            machine: the GPUs.
            memory: the memory without changes.

        Returns:
            The bytes by change.
        """
        run, share = self.run, memory.batch * memory.accumulation
        changes = {}

        def tried(name: str, changed: PlannedRun, sharding: str = memory.sharding, batch: int = memory.batch) -> None:
            changes[name] = self.memory(sharding, machine.gpus, batch, share // batch, changed).total

        if not run.checkpointing:
            tried("gradient_checkpointing=true", replace(run, checkpointing=True))
        for sharding in SHARDINGS if machine.gpus > 1 else ():
            if sharding != memory.sharding:
                tried(f"--sharding {sharding}", run, sharding=sharding)
        if memory.batch > 1:
            tried("per_device_train_batch_size=1", run, batch=1)
        tried(f"max_length={run.max_length // 2}", replace(run, max_length=run.max_length // 2))
        if not run.lora_rank:
            frozen = tuple(part for part in run.trained if part != LANGUAGE_MODEL)
            tried("lora_rank=16", replace(run, trained=frozen, lora_rank=16, lora_parts=(LANGUAGE_MODEL,)))
        return changes


def count_weights(config: FusionConfig, setting: StepSetting) -> WeightCounts:
    """Count the weights of a model on the meta device."""
    with fake_model(config, setting) as model:
        layers = [
            sum(parameter.numel() for parameter in module.parameters())
            for module in model.modules()
            if type(module).__name__ in model._no_split_modules
        ]
        quantized = [layer.weight.numel() for layer in quantized_layers(model)] if setting.quantized else []
        by_part, trained = count_by_part(model), count_by_part(model, trained_only=True)
    return WeightCounts(
        by_part=by_part,
        trained=trained,
        quantized=sum(quantized),
        largest_quantized=max(quantized, default=0),
        largest_layer=max(layers),
        outside=sum(by_part.values()) - sum(layers),
        originals=sum(by_part[part] for part in setting.trained) if setting.lora_rank else 0,
    )


def count_states(
    weights: WeightCounts, sharding: str, gpus: int, half: bool, optimizer: str, bucket: int
) -> StateBytes:
    """
    Count the bytes per GPU that are needed throughout a step.

    - `none`, `ddp`: each GPU holds float32 weights, gradients and moments. The buckets of DDP are a second set of
      gradients.
    - `zero2`: each GPU holds 16-bit weights. 16-bit gradients and float32 weights and moments are divided by W, and so
      are the float32 gradients during the optimizer's step. `zero3` also divides the 16-bit weights, and gathers up to
      a billion of them.
    - `fsdp2`: float32 weights, gradients and moments are divided by W, and a few layers are gathered in 16 bits.

    Args:
        weights: the numbers of weights.
        sharding: how the states are divided.
        gpus: the number of GPUs (W).
        half: whether the run computes in 16 bits.
        optimizer: a key of `OPTIMIZER_BYTES`.
        bucket: the number of gradients that ZeRO sends at a time.
    """
    trained = weights.total_trained
    computed = HALF if half else FULL
    quantized = int(weights.quantized * weights.quantized_bytes)
    plain = weights.total + weights.originals - weights.quantized
    moments = trained * OPTIMIZER_BYTES[optimizer]
    copies = trained * FULL if optimizer == UNFUSED else 0
    dequantized = weights.largest_quantized * computed
    if sharding in (NONE, DDP):
        buckets = trained * FULL if sharding == DDP and gpus > 1 else 0
        return StateBytes(plain * FULL + quantized, trained * FULL, moments, buckets + dequantized, copies)
    if sharding == FSDP2:
        gathered = computed * (weights.outside + FSDP_LAYERS * weights.largest_layer)
        return StateBytes(
            _share(plain * FULL, gpus) + quantized,
            _share(trained * FULL, gpus),
            _share(moments, gpus),
            gathered + dequantized,
            _share(copies, gpus),
        )
    masters = trained * FULL
    gathered = 0 if sharding == ZERO2 else min(weights.total, LIVE_WEIGHTS) * computed
    return StateBytes(
        (plain * computed if sharding == ZERO2 else _share(plain * computed, gpus)) + quantized,
        _share(trained * computed, gpus),
        _share(masters + moments, gpus),
        gathered + BUCKETS * bucket * computed + dequantized,
        _share(trained * FULL + copies, gpus),
    )


def _share(size: int, gpus: int) -> int:
    return ceil(size / gpus)
