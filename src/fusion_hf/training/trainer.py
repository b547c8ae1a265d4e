"""transformers' Trainer for FUSION: exact losses over split batches, learning rates by part, checkpoints that hold."""

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

PREDICTION = "Prediction"  # what Trainer calls it
LOSS_POSITIONS = "loss_positions"  # of a batch whose loss is computed without logits


class FusionTrainer(RecordLoading, MemoryFitting, SealedCheckpoints):
    """
    Train a FUSION on records.

    The loss of a step is the whole step's: cross entropy over all its labelled tokens, mapping losses over all its
    question tokens and images, however the step is split over processes and accumulation. So accumulation equals
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
            raise InputError("max_steps is not given; streaming needs it, since a stream does not tell its length.")
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=with_query_lens(
                train_dataset, show_progress=args.process_index == 0 and not args.disable_tqdm
            ),
            # an evaluation compares models, so it draws no number of latent tokens
            eval_dataset=with_query_lens(eval_dataset, self.fusion_config.query_len),
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True  # transformers 5.17: the loss is scaled already
        self.finite_loss = FiniteLossCallback()
        self.throughput = ThroughputCallback(args.peak_tflops)
        self.stop = StopCallback(stop)
        for callback in (EpochCallback(self), self.finite_loss, self.throughput, self.stop, RunReportCallback(self)):
            self.add_callback(callback)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As Trainer's."""
        if isinstance(self.train_dataset, StreamedRecords) and isinstance(resume_from_checkpoint, str):
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
            self.resume_step, self.args.ignore_data_skip = state.global_step, True
        if isinstance(resume_from_checkpoint, str) and self.args.should_save:
            logger.info("goes on from %s", resume_from_checkpoint)
        warn_of_half_weights(self.model, keeps_float32=self.is_deepspeed_enabled)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    @property
    def stopped(self) -> bool:
        """Whether a signal ended the run before its last step."""
        return self.stop.stopped

    @property
    def trained_parts(self) -> list[str]:
        """Parts whose own weights get gradients; adapters take the place of the others'."""
        return [part for part in self.args.train if part not in self.args.adapted_parts]

    def forget_step(self) -> None:
        """Forget what was measured of a step that was broken off."""
        self.finite_loss.reset()
        self.throughput.reset()

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if enable_cpu_fsdp(self.accelerator):
            self.is_fsdp_enabled = True

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, "LossCounts | None"]:
        """Get the batches of a step, and what its losses are means over, in all of them and all processes."""
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
        return super()._prepare_inputs(unpacked)  # DeepSpeed's way has a type for the images as well

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: LossCounts | None = None,
    ) -> Any:
        """
        This part's share of the step's loss `()`. Without `num_items_in_batch` (evaluation): the batch's own.

        There are logits only with `return_outputs`, and not of a batch that brings `loss_positions`.
        """
        share = 1.0
        if not return_outputs and LOSS_POSITIONS not in inputs:
            inputs = {**inputs, LOSS_POSITIONS: find_loss_positions(inputs["labels"])}
        if num_items_in_batch is not None and self.args.loss_average == MICRO_BATCHES:
            # its own counts, since without a label the mean over none would be no number
            num_items_in_batch = LossCounts(*self._count(inputs).float())
            share = 1 / (self.current_gradient_accumulation_steps * self.args.world_size)
        is_checked = num_items_in_batch is not None and self.data_collator.checks_for(self.fusion_config)
        taken = inputs
        if is_checked and self.data_collator.compact:
            # padding is on the right, where no token before it looks; attention without a mask is faster
            taken = {**inputs, "attention_mask": None}
        outputs = model(**taken, loss_counts=num_items_in_batch, check_inputs=not is_checked)
        loss = outputs.loss
        if num_items_in_batch is not None:
            loss = loss * share
            self._measure(inputs, outputs, share)
            loss = loss * self.args.world_size  # gradients are averaged over processes, the shares are to be added
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
        """An evaluation's batches stand for themselves; those of a step are counted in `get_batch_samples`."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self.finite_loss.grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.finite_loss.grad_norm

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
        """Choose the peak learning rate of each part."""
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
        positions = {LOSS_POSITIONS: find_loss_positions(inputs["labels"])} if prediction_loss_only else {}
        inputs = {name: value for name, value in inputs.items() if name != LOSS_POSITIONS} | positions
        if not prediction_loss_only and ignore_keys is None:
            ignore_keys = [field.name for field in fields(FusionCausalLMOutputWithPast) if field.name != "logits"]
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
