"""Turn a trainer's records into batches: their order, the latent tokens of each step, and workers that survive a
signal.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from accelerate.data_loader import DataLoaderAdapter
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fusion_hf.data import StreamedRecords
from fusion_hf.model.configuration_fusion import FusionConfig
from fusion_hf.training.arguments import FusionTrainingArguments
from fusion_hf.training.checkpoints import shield_data_worker
from fusion_hf.training.query_len_records import QueryLenIterable, QueryLenStream, with_query_lens
from fusion_hf.training.recipe_keys import LENGTH, MICRO_BATCH, MODALITY_LENGTH
from fusion_hf.training.sampler import StepLayout, StepSampler, estimate_tokens


class RecordLoading(Trainer):
    """The part of the trainer that makes data loaders from records."""

    args: FusionTrainingArguments
    fusion_config: FusionConfig
    train_sampler: StepSampler | None = None
    resume_step = 0  # the step at which a stream starts, since it cannot be rewound

    @property
    def query_lens(self) -> list[int]:
        """Numbers of latent tokens to draw from."""
        return self.args.query_lens if self.args.query_lens is not None else self.fusion_config.query_lens

    @property
    def draws_per_micro_batch(self) -> bool:
        """Whether a number of latent tokens is drawn for each micro-batch instead of each step."""
        return self.args.query_len_draw == MICRO_BATCH

    @property
    def seed(self) -> int:
        """Seed of the order of records."""
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> StepSampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, IterableDataset):
            return None
        args = self.args
        grouped = args.group_by in (MODALITY_LENGTH, LENGTH)
        sizes = None
        if args.group_by == LENGTH:
            sizes = estimate_tokens(dataset.lengths, dataset.turns, self.query_lens)  # type: ignore[union-attr]
        self.train_sampler = StepSampler(
            len(dataset),  # type: ignore[arg-type]
            StepLayout(args.per_device_train_batch_size, args.world_size, args.gradient_accumulation_steps),
            self.query_lens,
            self.seed,
            lengths=dataset.lengths if grouped else None,  # type: ignore[union-attr]
            sizes=sizes,
            per_micro_batch=self.draws_per_micro_batch,
            drop_last=args.dataloader_drop_last,
        )
        return self.train_sampler

    def get_train_dataloader(self) -> DataLoader:
        """
        Make the data loader for training. A stream distributes its records itself, and starts at the current
        step.
        """
        records, args = self.train_dataset, self.args
        if not isinstance(records, IterableDataset):
            return _shielded(super().get_train_dataloader())
        if not isinstance(records, StreamedRecords):
            layout = StepLayout(args.per_device_train_batch_size, accumulation=args.gradient_accumulation_steps)
            iterable = QueryLenIterable(records, layout, self.query_lens, self.seed, self.draws_per_micro_batch)
            loader = self._get_dataloader(iterable, "Training", layout.batch_size, is_training=True)
            return _shielded(loader)
        stream = QueryLenStream(
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
        """
        Make the data loader for evaluation.

        Args:
            eval_dataset: records, or the name of records in a dictionary of evaluation data.
        """
        if not isinstance(eval_dataset, str):
            eval_dataset = with_query_lens(eval_dataset, self.fusion_config.query_len)
        return _shielded(super().get_eval_dataloader(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """
        Make the data loader for prediction.

        Args:
            test_dataset: the records.
        """
        return _shielded(super().get_test_dataloader(with_query_lens(test_dataset, self.fusion_config.query_len)))


class EpochCallback(TrainerCallback):
    """Tell the sampler of a trainer which epoch begins. Accelerate does so in one process only."""

    def __init__(self, trainer: RecordLoading):
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch."""
        sampler = self.trainer.train_sampler
        if sampler is not None:
            sampler.set_epoch(state.global_step // sampler.steps_per_epoch)


def _shielded(loader: DataLoader) -> DataLoader:
    inner = (
        loader.base_dataloader if isinstance(loader, DataLoaderAdapter) else loader
    )  # accelerate wraps the data loader
    inner.worker_init_fn = partial(_start_worker, inner.worker_init_fn)
    return loader


def _start_worker(seed: Callable[[int], None] | None, worker: int) -> None:
    shield_data_worker()
    if seed is not None:
        seed(worker)
