"""transformers' Trainer for FUSION: exact losses over split batches, learning rates by part, checkpoints that hold."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderAdapter
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fusion_hf.common.errors import InputError
from fusion_hf.common.outputs import write_atomically
from fusion_hf.data import StreamedRecords
from fusion_hf.model.configuration_fusion import FusionConfig
from fusion_hf.model.modeling_fusion_base import FusionCausalLMOutputWithPast, LossCounts
from fusion_hf.training.answers import exact_matches
from fusion_hf.training.arguments import FusionTrainingArguments
from fusion_hf.training.checkpoints import StopSignal, rotate, saving, seal, shield_data_worker, writing
from fusion_hf.training.checks import check_parts, warn_of_half_weights
from fusion_hf.training.collator import IGNORE_INDEX, FusionDataCollator
from fusion_hf.training.distributed import any_rank, enable_cpu_fsdp, plain_class, sum_over_ranks, whole_weights
from fusion_hf.training.flops import Shape, training_flops
from fusion_hf.training.keyed import KeyedIterable, KeyedStream, keyed
from fusion_hf.training.keys import MICRO_BATCH, MICRO_BATCHES
from fusion_hf.training.meters import StepMeter, matrix_rate
from fusion_hf.training.parts import (
    LANGUAGE_MODEL,
    PROJECTORS,
    SAMPLERS,
    VISION_TOWER,
    count_by_part,
    parameter_groups,
)
from fusion_hf.training.sampler import Layout, StepSampler

logger = logging.getLogger(__name__)

LOG_FILE = "log.jsonl"
PREDICTION = "Prediction"  # what Trainer calls it
COMPACT_LOGITS = ("logits_to_keep", "shift_labels")  # of a compact batch


class NonFiniteError(InputError):
    """The loss or the gradient is no number; the weights were not changed by it."""


class FusionTrainer(Trainer):
    """
    Trains a FUSION on records.

    The loss of a step is the whole step's: cross entropy over all its labelled tokens, mapping losses over all its
    question tokens and pictures, however the step is split over processes and accumulation. So accumulation equals
    one batch, and one process equals many. With `loss_average="micro_batches"` it is the mean of the losses of the
    step's micro-batches, as in the authors' training.

    Args:
        model ([`FusionForConditionalGeneration`], or its PEFT model).
        args ([`FusionTrainingArguments`]).
        data_collator ([`FusionDataCollator`]).
        train_dataset, eval_dataset ([`RecordDataset`] or [`StreamedRecords`], *optional*): a sequence of records, as
            the collator takes them, will do, and so will another iterable data set. Several ones to evaluate on are a
            dictionary.
        stop ([`StopSignal`], *optional*): asks for a checkpoint and the end of the run.
        **kwargs: of Trainer. No `processing_class` is needed: the collator's processor is saved with the model, and
            Trainer would write the tokenizer's special tokens into the model's configuration.

    Raises:
        InputError: for what would not train, or not as it says, see [`check_parts`].
    """

    args: FusionTrainingArguments
    optimizer: Any
    loss_is_scaled_for_ga = True  # transformers 5.20 and newer

    def __init__(
        self,
        model: nn.Module,
        args: FusionTrainingArguments,
        data_collator: FusionDataCollator,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        stop: StopSignal | None = None,
        **kwargs: Any,
    ):
        check_parts(args, data_collator, train_dataset, kwargs)
        self.fusion_config: FusionConfig = model.config  # type: ignore[assignment]
        if isinstance(train_dataset, StreamedRecords) and args.max_steps <= 0:
            raise InputError("max_steps is not given; streaming needs it, since a stream does not tell its length.")
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=keyed(train_dataset),
            # an evaluation compares models, so it draws no number of latent tokens
            eval_dataset=keyed(eval_dataset, self.fusion_config.query_len),
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True  # transformers 5.17: the loss is scaled already
        self.stop = stop
        self.stopped = False
        self.meter = StepMeter()
        self.grad_norm: torch.Tensor | float | None = None
        self.step_loss = torch.zeros((), device=args.device)
        self.peak_flops = 0.0
        self.train_sampler: StepSampler | None = None
        self.resume_step = 0  # of a stream, which does not go back
        self.attempts = 0  # of `auto_find_batch_size`
        self.first_step: int | None = None  # where the run begins or goes on
        self.add_callback(_StepCallback(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As Trainer's."""
        if isinstance(self.train_dataset, StreamedRecords) and isinstance(resume_from_checkpoint, str):
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
            self.resume_step, self.args.ignore_data_skip = state.global_step, True
        self.attempts, self.first_step = 0, None
        warn_of_half_weights(self.model, keeps_float32=self.is_deepspeed_enabled)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

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
        self.meter, self.step_loss = StepMeter(), torch.zeros_like(self.step_loss)  # of a step that was broken off
        return size

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, which takes one step too many where a run goes on from the checkpoint of its last step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if enable_cpu_fsdp(self.accelerator):
            self.is_fsdp_enabled = True

    # ---- records ----

    @property
    def query_lens(self) -> list[int]:
        """What the number of latent tokens is drawn from."""
        return self.args.query_lens if self.args.query_lens is not None else self.fusion_config.query_lens

    @property
    def draws_per_micro_batch(self) -> bool:
        """Whether a number of latent tokens holds for one micro-batch, not for a step."""
        return self.args.query_len_draw == MICRO_BATCH

    @property
    def trained_parts(self) -> list[str]:
        """Parts whose own weights get gradients; adapters take the language model's place."""
        return [part for part in self.args.train if part != LANGUAGE_MODEL or not self.args.lora_rank]

    @property
    def seed(self) -> int:
        """Of the order of records."""
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> StepSampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, IterableDataset):
            return None
        args = self.args
        grouped = args.group_by == "modality_length"
        self.train_sampler = StepSampler(
            len(dataset),  # type: ignore[arg-type]
            Layout(args.per_device_train_batch_size, args.world_size, args.gradient_accumulation_steps),
            self.query_lens,
            self.seed,
            lengths=dataset.lengths if grouped else None,  # type: ignore[union-attr]
            per_micro_batch=self.draws_per_micro_batch,
            drop_last=args.dataloader_drop_last,
        )
        return self.train_sampler

    def get_train_dataloader(self) -> DataLoader:
        """As Trainer's; a stream deals its records to processes and workers itself, and begins where the run is."""
        records, args = self.train_dataset, self.args
        if not isinstance(records, IterableDataset):
            return _shielded(super().get_train_dataloader())
        if not isinstance(records, StreamedRecords):
            layout = Layout(args.per_device_train_batch_size, accumulation=args.gradient_accumulation_steps)
            iterable = KeyedIterable(records, layout, self.query_lens, self.seed, self.draws_per_micro_batch)
            loader = self._get_dataloader(iterable, "Training", layout.batch_size, is_training=True)
            return _shielded(loader)
        stream = KeyedStream(
            records.split(
                rank=args.process_index,
                world_size=args.world_size,
                batch_size=args.per_device_train_batch_size,
                start=self.resume_step * args.gradient_accumulation_steps,
            ),
            args.gradient_accumulation_steps,
            self.query_lens,
            self.seed,
            self.draws_per_micro_batch,
        )
        loader = DataLoader(
            stream,
            batch_size=args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return _shielded(loader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As Trainer's, of named records of `eval_dataset` or of others."""
        given = eval_dataset if isinstance(eval_dataset, str) else keyed(eval_dataset, self.fusion_config.query_len)
        return _shielded(super().get_eval_dataloader(given))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As Trainer's, of records."""
        return _shielded(super().get_test_dataloader(keyed(test_dataset, self.fusion_config.query_len)))

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, "LossCounts | None"]:
        """The batches of a step, and what its losses are means over, in all of them and all processes."""
        self.meter.begin_step()
        batches = []
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            batches.append(batch)
        self.meter.batches_arrived()
        counts = torch.stack([self._count(batch) for batch in batches]).sum(0) if batches else torch.zeros(3)
        totals = LossCounts(*sum_over_ranks(counts.to(torch.float64), device).float().to(device))
        if batches and not totals.labels:
            logger.warning("step %d: no answer is left to learn; is max_length too short?", self.state.global_step + 1)
        return batches, totals

    def _count(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        asked = batch["instruct_input_ids"] != self.fusion_config.instruct_pad_token_id
        asked = asked & batch["instruct_attention_mask"].bool()
        labels = batch["labels"][:, 1:] != IGNORE_INDEX  # the first token is never predicted
        return torch.stack([labels.sum(), asked.sum(), torch.tensor(len(labels), device=labels.device)])

    # ---- losses ----

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As Trainer's; what the collator left compact becomes the model's inputs on the device."""
        unpacked = self.data_collator.unpack(super()._prepare_inputs(inputs))
        return super()._prepare_inputs(unpacked)  # DeepSpeed's way has a type for the pictures as well

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: LossCounts | None = None,
    ) -> Any:
        """This part's share of the step's loss `()`. Without `num_items_in_batch` (evaluation): the batch's own."""
        share = 1.0
        if num_items_in_batch is not None and self.args.loss_average == MICRO_BATCHES:
            # its own counts, since without a label the mean over none would be no number
            num_items_in_batch = LossCounts(*self._count(inputs).float())
            share = 1 / (self.current_gradient_accumulation_steps * self.args.world_size)
        outputs = model(**inputs, loss_counts=num_items_in_batch)
        loss = outputs.loss
        if num_items_in_batch is not None:
            loss = loss * share
            self._measure(inputs, outputs, share)
            loss = loss * self.args.world_size  # gradients are averaged over processes, the shares are to be added
        return (loss, outputs) if return_outputs else loss

    def _measure(self, inputs: Mapping[str, Any], outputs: Any, share: float) -> None:
        ids = inputs["input_ids"]
        self.step_loss = self.step_loss + outputs.loss.detach() * share
        self.meter.add(
            language_loss=outputs.language_loss.detach() * share,
            mapping_loss=outputs.mapping_loss.detach() * share,
            tokens=inputs["attention_mask"].sum(),
            pictures=(ids == self.fusion_config.image_token_id).any(1).sum(),
            flops=training_flops(
                self.fusion_config,
                Shape(
                    batch=ids.shape[0],
                    sequence=ids.shape[1],
                    instruct_tokens=inputs["instruct_input_ids"].shape[1],
                    turns=inputs["prompt_end_positions"].shape[1],
                    query_len=inputs["query_len"],
                ),
                self.trained_parts,
                lora=self.args.lora_rank > 0,
            ),
        )

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
        """An evaluation's batches stand for themselves; those of a step are counted in `get_batch_samples`."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self.grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.grad_norm

    def check_finite(self) -> None:
        """
        Before the optimizer changes the weights.

        Raises:
            NonFiniteError: in every process, if the step's loss or gradient is no number in one of them.
        """
        loss, self.step_loss = self.step_loss, torch.zeros_like(self.step_loss)
        finite = torch.isfinite(loss)
        norm = self.grad_norm
        if norm is not None and not self.args.fp16:  # with float16's loss scaling, infinite gradients are skipped
            finite = finite & torch.isfinite(torch.as_tensor(norm, device=finite.device))
        if any_rank(not bool(finite), self.args.device):
            raise NonFiniteError(
                f"step {self.state.global_step + 1}: the loss is {float(loss):g} and the gradient's norm "
                f"{float(norm) if norm is not None else float('nan'):g}; nothing was saved after step "
                f"{self.state.global_step}. Lower the learning rate, or look at the records of this step."
            )

    # ---- optimizer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW or another optimizer of Trainer's, with a learning rate for each part."""
        if self.optimizer is not None:
            return self.optimizer
        trained = self.model if model is None else model
        optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, trained)
        if {"params", "optimizer_dict", "model"} & settings.keys():
            raise InputError(f"optim is {self.args.optim!r}, which makes its own groups; allowed: AdamW and its like.")
        self.optimizer = optimizer_class(
            parameter_groups(
                trained.named_parameters(),
                self.learning_rates(),
                self.args.weight_decay,
                set(self.get_decay_parameter_names(trained)),
            ),
            **settings,
        )
        return self.optimizer

    def learning_rates(self) -> dict[str, float]:
        """The peak learning rate of each part."""
        args = self.args
        given = {
            VISION_TOWER: args.vision_tower_learning_rate,
            PROJECTORS: args.projector_learning_rate,
            SAMPLERS: args.sampler_learning_rate,
            LANGUAGE_MODEL: None,
        }
        return {part: args.learning_rate if rate is None else rate for part, rate in given.items()}

    # ---- logs, evaluation, checkpoints ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.meter.steps:
            logs |= self.meter.report(self.peak_flops, self.args.device)
            self.meter = StepMeter()
        super().log(logs, start_time)
        if self.args.should_save:
            line = {"step": self.state.global_step, **logs}
            with (
                writing(Path(self.args.output_dir), LOG_FILE),
                (Path(self.args.output_dir) / LOG_FILE).open("a", encoding="utf-8") as file,
            ):
                file.write(json.dumps(line, default=float) + "\n")

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Trainer's loss and, for `eval_samples` of the records, the share of exact answers."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        records = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(records, str):
            records = self.eval_dataset[records]
        # of a dictionary, each has been evaluated on its own by now
        if not self.args.eval_samples or records is None or isinstance(records, dict):
            return metrics
        scores = exact_matches(
            self.accelerator.unwrap_model(self.model),
            self.data_collator.processor,
            records,
            samples=self.args.eval_samples,
            batch_size=self.args.per_device_eval_batch_size,
            max_new_tokens=self.args.eval_max_new_tokens,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            image_settings=self.data_collator.image_settings,
        )
        extra = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(extra)
        return metrics | extra

    def evaluation_loop(
        self, dataloader: DataLoader, description: str, prediction_loss_only: bool | None = None, **kwargs: Any
    ) -> Any:
        """As Trainer's; logits are gathered where they are asked for: by `predict`, and for `compute_metrics`."""
        if prediction_loss_only is None and (description == PREDICTION or self.compute_metrics is not None):
            prediction_loss_only = False
        return super().evaluation_loop(dataloader, description, prediction_loss_only, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """As Trainer's; logits are those of all positions, as the labels are, and come alone."""
        if not prediction_loss_only:
            inputs = {name: value for name, value in inputs.items() if name not in COMPACT_LOGITS}
            if ignore_keys is None:
                ignore_keys = [field.name for field in fields(FusionCausalLMOutputWithPast) if field.name != "logits"]
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A checkpoint in the way that the launch configuration says; a finished model as a whole, in any case."""
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        with whole_weights(self.accelerator):
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with plain_class(self.model):
            super()._save(output_dir, state_dict)
        self.data_collator.processor.save_pretrained(output_dir or self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer's, but a checkpoint counts only when all of it is there, and none is deleted before."""
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with saving(folder, remove=self.args.should_save):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    seal(folder)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate(run_dir, limit, keep=[] if best is None else [Path(best)])


class _StepCallback(TrainerCallback):
    """Calls of the trainer at the right moments of a step."""

    def __init__(self, trainer: FusionTrainer):
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        trainer.first_step = state.global_step
        own = trainer.args.peak_tflops
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        trainer.peak_flops = matrix_rate(args.device, dtype) if own is None else own * 1e12
        if args.should_save:
            _forget_after(Path(args.output_dir) / LOG_FILE, state.global_step)
            counts = count_by_part(trainer.accelerator.unwrap_model(trainer.model), trained_only=True)
            logger.info("trained parameters: %s", ", ".join(f"{part} {count:,}" for part, count in counts.items()))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        sampler = self.trainer.train_sampler
        if sampler is not None:  # accelerate tells a sampler its epoch in one process only
            sampler.set_epoch(state.global_step // sampler.steps_per_epoch)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.check_finite()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        trainer.meter.end_step()
        if trainer.stop is not None and any_rank(trainer.stop.requested, args.device):
            control.should_save = control.should_training_stop = True
            trainer.stopped = state.global_step < state.max_steps
        if control.should_save:  # or the first mean after a resume would lack the steps before the checkpoint
            control.should_log = True


def _forget_after(log: Path, step: int) -> None:
    """Take out what a run logged after the checkpoint from which it now goes on: it is going to be logged again."""
    if not log.is_file():
        return
    lines = log.read_text(encoding="utf-8").splitlines()
    kept = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # the last one, cut by a kill
            continue
        if isinstance(entry, dict) and entry.get("step", 0) <= step:
            kept.append(line)
    write_atomically(log, "".join(f"{line}\n" for line in kept).encode())


def _shielded(loader: DataLoader) -> DataLoader:
    inner = loader.base_dataloader if isinstance(loader, DataLoaderAdapter) else loader  # accelerate's wraps the one
    inner.worker_init_fn = partial(_start_worker, inner.worker_init_fn)
    return loader


def _start_worker(seed: Callable[[int], None] | None, worker: int) -> None:
    shield_data_worker()
    if seed is not None:
        seed(worker)
