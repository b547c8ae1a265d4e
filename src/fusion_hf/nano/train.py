"""Trains `fusion-nano` from scratch on a CPU: words of patches first, then FUSION's three stages.

Tested command: `make nano`, that is `torchrun --nproc-per-node 2 -m fusion_hf.nano.train --output runs/nano`.
"""

import argparse
import json
import logging
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from fusion_hf.conversion.folder import make_generation_config
from fusion_hf.modeling_fusion import FusionForConditionalGeneration
from fusion_hf.nano.build import build_config, build_model, build_processor
from fusion_hf.nano.evaluate import accuracies, generate_answers
from fusion_hf.nano.grounding import PatchDataset, WordGrounding
from fusion_hf.nano.pictures import PictureSpec
from fusion_hf.nano.records import (
    Mixture,
    Record,
    Stage,
    drawn_pictures,
    evaluation_records,
    stage_records,
    training_texts,
)
from fusion_hf.nano.tokenizer import build_tokenizer
from fusion_hf.processing_fusion import FusionProcessor
from fusion_hf.training import FusionDataCollator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StagePlan:
    """One schedule: FUSION's stage whose records it uses, optimizer steps, mixture, peak learning rate.

    `stage` is None where no question is read yet (see `fusion_hf.nano.grounding`). The rate stays at its peak,
    where plateaus are left soonest, but for the last `decay` of the steps.
    """

    name: str
    stage: Stage | None
    steps: int
    mixture: Mixture
    learning_rate: float = 5e-4
    decay: float = 0.0


GROUNDING = StagePlan(
    "grounding", None, 2500, Mixture(single=8000, count=8000, spatial=12000, text=20000), 2.5e-3, decay=0.3
)
# To count one kind or colour among others takes longest.
PLAN = (
    StagePlan("stage1", "1", 800, Mixture(single=3000, count=5000, spatial=8000, text=6000)),
    StagePlan("stage1.5", "1.5", 1200, Mixture(single=2000, count=8000, spatial=8000, text=4000)),
    StagePlan(
        "stage2", "2", 7000, Mixture(single=1000, count=18000, spatial=7000, text=6000, easy_vqa=0.7), decay=0.3
    ),
)
GLOBAL_BATCH_SIZE = 16
VALIDATION_SAMPLE = 300  # questions of each category, asked after each schedule


class RecordDataset(Dataset):
    """Records, rendered when they are asked for."""

    def __init__(self, records: Sequence[Record]):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.records[index].to_llava()


def train_grounding(
    model: FusionForConditionalGeneration, processor: FusionProcessor, plan: StagePlan, output: Path, seed: int
) -> None:
    """Teach tower and projector the words of patches; the model is changed in place."""
    pictures = drawn_pictures("train", plan.mixture, f"{plan.name}/{seed}")
    specs = [picture.image for picture in pictures if isinstance(picture.image, PictureSpec)]
    dataset = PatchDataset(specs, processor.image_processor, model.config.num_patches_per_side)
    Trainer(
        model=WordGrounding(model, processor.tokenizer),
        args=_arguments(plan, output, seed),
        train_dataset=dataset,
    ).train()


def train_stage(
    model: FusionForConditionalGeneration, processor: FusionProcessor, plan: StagePlan, output: Path, seed: int
) -> None:
    """Run one of FUSION's stages; the model is changed in place."""
    assert plan.stage is not None
    records = stage_records(plan.stage, "train", f"{plan.name}/{seed}", plan.mixture)
    logger.info("%s: %d records, %d steps", plan.name, len(records), plan.steps)
    Trainer(
        model=model,
        args=_arguments(plan, output, seed),
        train_dataset=RecordDataset(records),
        data_collator=FusionDataCollator(processor, query_lens=model.config.query_lens, seed=seed),
    ).train()


def _arguments(plan: StagePlan, output: Path, seed: int) -> TrainingArguments:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return TrainingArguments(
        output_dir=str(output / plan.name),
        max_steps=plan.steps,
        per_device_train_batch_size=GLOBAL_BATCH_SIZE // processes,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": round(plan.decay * plan.steps)},
        warmup_steps=round(0.03 * plan.steps),
        adam_beta2=0.98,
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        use_cache=True,  # it is written into the model's configuration, where it would turn the cache off
        remove_unused_columns=False,
        use_cpu=True,
        ddp_find_unused_parameters=False,
        seed=seed,
    )


def validation_sample(seed: int) -> list[Record]:
    """VALIDATION_SAMPLE questions of each category, the same ones every time."""
    records = evaluation_records("validation", seed, drawn=VALIDATION_SAMPLE)
    easy_vqa = [record for record in records if record.category == "easy-vqa"]
    drawn = [record for record in records if record.category != "easy-vqa"]
    return random.Random(0).sample(easy_vqa, VALIDATION_SAMPLE) + drawn


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the trained model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps-scale", type=float, default=1.0, help="multiplies every stage's steps, for a trial")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    begin = time.monotonic()

    tokenizer = build_tokenizer(training_texts(arguments.seed))
    config = build_config(tokenizer)
    processor = build_processor(tokenizer, config)
    model = build_model(config, arguments.seed)
    logger.info("%d parameters", model.num_parameters())
    is_main = int(os.environ.get("RANK", "0")) == 0
    for plan in (GROUNDING, *PLAN):
        folder = arguments.output / plan.name
        if (folder / SAFE_WEIGHTS_NAME).is_file():
            logger.info("%s is finished: loaded from %s", plan.name, folder)
            model = FusionForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
            continue
        train = train_grounding if plan.stage is None else train_stage
        train(
            model,
            processor,
            replace(plan, steps=max(1, round(plan.steps * arguments.steps_scale))),
            arguments.output,
            arguments.seed,
        )
        logger.info("%s done after %.0f s", plan.name, time.monotonic() - begin)
        if is_main:
            model.save_pretrained(folder)
        if is_main and plan.stage is not None:
            records = validation_sample(arguments.seed)
            scores = accuracies(records, generate_answers(model, processor, records))
            logger.info("validation after %s: %s", plan.name, json.dumps(scores))
    if is_main:
        model.generation_config = make_generation_config(config, tokenizer, {})
        model.to(torch.bfloat16).save_pretrained(arguments.output)
        processor.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
