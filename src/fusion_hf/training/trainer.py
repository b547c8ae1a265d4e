"""The trainer of FUSION: exact losses over split batches, learning rates by part, and complete checkpoints."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from fusion_hf.common.errors import InputError
from fusion_hf.data import StreamedRecords
from fusion_hf.model.configuration_fusion import FusionConfig
from fusion_hf.model.modeling_fusion_base import FusionCausalLMOutputWithPast, LossCounts
from fusion_hf.training.arguments import FusionTrainingArguments
from fusion_hf.training.callbacks import FiniteLossCallback, StopCallback, ThroughputCallback, append_log
from fusion_hf.training.checkpoints import StopSignal
from fusion_hf.training.collator import IGNORE_INDEX, FusionDataCollator, find_loss_positions
from fusion_hf.training.distributed import enable_cpu_fsdp, sum_over_ranks
from fusion_hf.training.exact_match import exact_matches
from fusion_hf.training.flops import BatchShape, step_flops
from fusion_hf.training.memory_fitting import MemoryFitting
from fusion_hf.training.parameter_groups import LANGUAGE_MODEL, PROJECTORS, SAMPLERS, VISION_TOWER, parameter_groups
from fusion_hf.training.query_len_records import with_query_lens
from fusion_hf.training.recipe_keys import MICRO_BATCHES
from fusion_hf.training.record_loading import EpochCallback, RecordLoading
from fusion_hf.training.run_report import RunReportCallback
from fusion_hf.training.sealed_checkpoints import SealedCheckpoints
from fusion_hf.training.trainer_checks import check_parts, warn_of_half_weights

logger = logging.getLogger(__name__)

PREDICTION = "Prediction"  # Trainer's description of a prediction loop
LOSS_POSITIONS = "loss_positions"  # key of a batch whose loss is computed without all logits


class FusionTrainer(RecordLoading, MemoryFitting, SealedCheckpoints):
    """
    Train a FUSION model on records with `transformers.Trainer`.

    The loss is that of the whole step: the cross entropy over all its labelled tokens, and the mapping losses over all
    its question tokens and images. It does not depend on how the step is split over processes and accumulation. With
    `loss_average="micro_batches"`, the loss is the mean of the losses of the step's micro-batches, as in the authors'
    training.

    Args:
        model ([`FusionForConditionalGeneration`], or its PEFT model): the model to train.
        args ([`FusionTrainingArguments`]): the training arguments.
        data_collator ([`FusionDataCollator`]): the collator. Its processor is saved with the model.
        train_dataset ([`RecordDataset`] or [`StreamedRecords`], *optional*): the training records. You can also pass a
            sequence of records in a form that the collator accepts, or another iterable data set.
        eval_dataset ([`RecordDataset`] or [`StreamedRecords`], *optional*): the held-out records in the same forms, or
            a dictionary of several.
        stop ([`StopSignal`], *optional*): a signal that asks for a checkpoint and the end of the run.
        **kwargs: further arguments of `Trainer`. Do not pass `processing_class`, since Trainer would write the
            tokenizer's special tokens into the model's configuration.

    Raises:
        InputError: if an argument is not supported, see [`check_parts`].

    Example:

    ```python
    >>> from fusion_hf import FusionForConditionalGeneration, FusionProcessor, nano_path
    >>> from fusion_hf.training import FusionDataCollator, FusionTrainer, FusionTrainingArguments
    >>> processor = FusionProcessor.from_pretrained(nano_path())
    >>> model = FusionForConditionalGeneration.from_pretrained(nano_path(), dtype="float32")
    >>> trainer = FusionTrainer(
    ...     model=model,
    ...     args=FusionTrainingArguments(output_dir="run", max_steps=1, save_strategy="no", report_to="none"),
    ...     data_collator=FusionDataCollator(processor),
    ...     train_dataset=[
    ...         {"conversations": [{"from": "human", "value": "what is 1 + 1?"}, {"from": "gpt", "value": "two"}]}
    ...     ],
    ... )
    >>> trainer.train().global_step
    1

    ```
    """

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
            raise InputError("`max_steps` must be 1 or more with streaming, since a stream has no length.")
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=with_query_lens(
                train_dataset, show_progress=args.process_index == 0 and not args.disable_tqdm
            ),
            # evaluations must be comparable, so their number of latent tokens is fixed
            eval_dataset=with_query_lens(eval_dataset, self.fusion_config.query_len),
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True  # transformers 5.17: tells Trainer that the loss is scaled already
        self.finite_loss = FiniteLossCallback()
        self.throughput = ThroughputCallback(args.peak_tflops)
        self.stop = StopCallback(stop)
        for callback in (EpochCallback(self), self.finite_loss, self.throughput, self.stop, RunReportCallback(self)):
            self.add_callback(callback)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """
        Train the model as `Trainer.train` does.

        Args:
            resume_from_checkpoint: the folder of a checkpoint, or True for the last one.
            **kwargs: further arguments of `Trainer.train`.

        Returns:
            The output of `Trainer.train`.
        """
        if isinstance(self.train_dataset, StreamedRecords) and isinstance(resume_from_checkpoint, str):
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
            self.resume_step, self.args.ignore_data_skip = state.global_step, True
        if isinstance(resume_from_checkpoint, str) and self.args.should_save:
            logger.info("Resuming from %s", resume_from_checkpoint)
        warn_of_half_weights(self.model, keeps_float32=self.is_deepspeed_enabled)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    @property
    def stopped(self) -> bool:
        """Whether a signal ended the run before its last step."""
        return self.stop.stopped

    @property
    def trained_parts(self) -> list[str]:
        """Parts whose own weights get gradients. Parts with adapters are not among them."""
        return [part for part in self.args.train if part not in self.args.adapted_parts]

    def forget_step(self) -> None:
        """Discard the measurements of an interrupted step."""
        self.finite_loss.reset()
        self.throughput.reset()

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if enable_cpu_fsdp(self.accelerator):
            self.is_fsdp_enabled = True

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, "LossCounts | None"]:
        """
        Get the batches of a step, and the counts over which its losses are averaged, summed over all processes.

        Args:
            epoch_iterator: the iterator over batches.
            num_batches: the number of batches per step.
            device: the device that the processes communicate on.

        Returns:
            The batches and the counts.
        """
        self.throughput.meter.begin_step()
        batches = []
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            batches.append(batch)
        self.throughput.meter.batches_arrived()
        counts = torch.stack([self._count(batch) for batch in batches]).sum(0) if batches else torch.zeros(3)
        totals = LossCounts(*sum_over_ranks(counts.to(torch.float64), device).float().to(device))
        if batches and not totals.labels:
            logger.warning("Step %d has no labelled tokens. Is `max_length` too short?", self.state.global_step + 1)
        return batches, totals

    def _count(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        asked = batch["instruct_input_ids"] != self.fusion_config.instruct_pad_token_id
        asked = asked & batch["instruct_attention_mask"].bool()
        labels = batch["labels"][:, 1:] != IGNORE_INDEX  # the first token is never predicted
        return torch.stack([labels.sum(), asked.sum(), torch.tensor(len(labels), device=labels.device)])

    # ---- losses ----

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Convert compact batches to model inputs on the device, and then do as Trainer does."""
        unpacked = self.data_collator.unpack(super()._prepare_inputs(inputs))
        return super()._prepare_inputs(unpacked)  # with DeepSpeed, Trainer also casts the images

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: LossCounts | None = None,
    ) -> Any:
        """
        Compute this micro-batch's share of the step's loss `()`.

        The outputs hold logits only with `return_outputs`, and not for a batch with `loss_positions`.

        Args:
            model: the model.
            inputs: the batch.
            return_outputs: whether to return the outputs of the model as well.
            num_items_in_batch: the counts over which the losses of the step are averaged. None uses those of the
                batch, as in evaluation.

        Returns:
            The loss, or a pair of loss and outputs.
        """
        share = 1.0
        if not return_outputs and LOSS_POSITIONS not in inputs:
            inputs = {**inputs, LOSS_POSITIONS: find_loss_positions(inputs["labels"])}
        if num_items_in_batch is not None and self.args.loss_average == MICRO_BATCHES:
            # passes counts, since the mean over zero labels would be NaN
            num_items_in_batch = LossCounts(*self._count(inputs).float())
            share = 1 / (self.current_gradient_accumulation_steps * self.args.world_size)
        is_checked = num_items_in_batch is not None and self.data_collator.checks_for(self.fusion_config)
        taken = inputs
        if is_checked and self.data_collator.compact:
            # with causal attention, padding on the right needs no mask, and attention without a mask is faster
            taken = {**inputs, "attention_mask": None}
        outputs = model(**taken, loss_counts=num_items_in_batch, check_inputs=not is_checked)
        loss = outputs.loss
        if num_items_in_batch is not None:
            loss = loss * share
            self._measure(inputs, outputs, share)
            loss = loss * self.args.world_size  # DDP averages gradients over processes, but the shares must be summed
        return (loss, outputs) if return_outputs else loss

    def _measure(self, inputs: Mapping[str, Any], outputs: Any, share: float) -> None:
        ids = inputs["input_ids"]
        self.finite_loss.add(outputs.loss.detach() * share)
        self.throughput.meter.add(
            language_loss=outputs.language_loss.detach() * share,
            mapping_loss=outputs.mapping_loss.detach() * share,
            tokens=inputs["attention_mask"].sum(),
            images=(ids == self.fusion_config.image_token_id).any(1).sum(),
            flops=step_flops(
                self.fusion_config,
                BatchShape(
                    batch=ids.shape[0],
                    sequence=ids.shape[1],
                    instruct_tokens=inputs["instruct_input_ids"].shape[1],
                    turns=inputs["prompt_end_positions"].shape[1],
                    query_len=inputs["query_len"],
                ),
                self.trained_parts,
                self.args.adapted_parts,
            ).training,
        )

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
        """Return None for evaluation batches. `get_batch_samples` counts the batches of a training step."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self.finite_loss.grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.finite_loss.grad_norm

    # ---- optimizer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """
        Create AdamW or another optimizer of Trainer, with a learning rate for each part.

        Raises:
            InputError: if the optimizer makes its own parameter groups.
        """
        if self.optimizer is not None:
            return self.optimizer
        trained = self.model if model is None else model
        optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, trained)
        if {"params", "optimizer_dict", "model"} & settings.keys():
            raise InputError(
                f"`optim` must be an optimizer that accepts parameter groups, such as adamw_torch, got "
                f"{self.args.optim!r}."
            )
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
        """Return the peak learning rate of each part."""
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
        if "loss" in logs and self.throughput.meter.steps:
            logs |= self.throughput.report(self.args.device)
        super().log(logs, start_time)
        if self.args.should_save:
            append_log(Path(self.args.output_dir), {"step": self.state.global_step, **logs})

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """
        Compute the evaluation loss and, if `eval_samples` is set, the share of exact answers.

        Args:
            eval_dataset: the records. Defaults to those of the trainer.
            ignore_keys: keys of the outputs to ignore.
            metric_key_prefix: the prefix of the metrics' names.

        Returns:
            The metrics by name.
        """
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        records = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(records, str):
            records = self.eval_dataset[records]
        # the entries of a dictionary were evaluated one by one above
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
        """Evaluate as Trainer does. Logits are gathered only by `predict` and for `compute_metrics`."""
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
        """Predict as Trainer does. The logits are those of all positions, like the labels."""
        positions = {LOSS_POSITIONS: find_loss_positions(inputs["labels"])} if prediction_loss_only else {}
        inputs = {name: value for name, value in inputs.items() if name != LOSS_POSITIONS} | positions
        if not prediction_loss_only and ignore_keys is None:
            ignore_keys = [field.name for field in fields(FusionCausalLMOutputWithPast) if field.name != "logits"]
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
