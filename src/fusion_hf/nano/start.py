"""Create the `fusion-nano` from which stage 1 starts: tokenizer, weights, and a tower that relates images to words.

Tested command: `torchrun --nproc-per-node 2 -m fusion_hf.nano.start runs/fusion-nano` (second step of `make nano`).
"""

import argparse
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from fusion_hf.conversion.model_folder import make_generation_config
from fusion_hf.drawing.drawn_images import DrawnImage
from fusion_hf.model.modeling_fusion import FusionForConditionalGeneration
from fusion_hf.model.processing_fusion import FusionProcessor
from fusion_hf.nano.build import build_config, build_model, build_processor
from fusion_hf.nano.grounding import PatchDataset, WordGrounding
from fusion_hf.nano.training_records import DrawnMixture, draw_images, training_texts
from fusion_hf.nano.word_tokenizer import build_tokenizer

logger = logging.getLogger(__name__)

START, FINISHED = "start", "finished.json"
MIXTURE = DrawnMixture(single=8000, count=8000, spatial=12000, text=20000)
STEPS = 2500
BATCH_SIZE = 16
LEARNING_RATE = 2.5e-3
WARMUP, DECAY = 0.03, 0.3  # shares of the steps
ADAM_BETA2 = 0.98


def train_grounding(
    model: FusionForConditionalGeneration, processor: FusionProcessor, output: Path, steps: int, seed: int
) -> None:
    """
    Teach the tower and the projector the words of patches. The model is changed in place.

    Args:
        model: The model.
        processor: Its processor.
        output: Folder for the trainer's files.
        steps: Number of optimizer steps.
        seed: Seed of the images and of the trainer.
    """
    specs = [image.image for image in draw_images("train", MIXTURE, f"grounding/{seed}")]
    dataset = PatchDataset(
        [spec for spec in specs if isinstance(spec, DrawnImage)],
        processor.image_processor,
        model.config.num_patches_per_side,
    )
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE // int(os.environ.get("WORLD_SIZE", "1")),
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": round(DECAY * steps)},
        warmup_steps=round(WARMUP * steps),
        adam_beta2=ADAM_BETA2,
        weight_decay=0.0,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=True,
        ddp_find_unused_parameters=False,
        seed=seed,
    )
    Trainer(model=WordGrounding(model, processor.tokenizer), args=arguments, train_dataset=dataset).train()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder of the run, whose subfolder `start` gets the model")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="number of optimizer steps (default: %(default)s)")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    folder = arguments.output / START
    if (folder / FINISHED).is_file():
        logger.info("%s is already finished.", folder)
        return
    torch.set_num_threads(1)
    tokenizer = build_tokenizer(training_texts(arguments.seed))
    config = build_config(tokenizer)
    processor = build_processor(tokenizer, config)
    model = build_model(config, arguments.seed)
    logger.info("The model has %d parameters.", model.num_parameters())
    train_grounding(model, processor, folder, arguments.steps, arguments.seed)
    if int(os.environ.get("RANK", "0")) == 0:
        model.generation_config = make_generation_config(config, tokenizer, {})
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / FINISHED).write_text(json.dumps({"steps": arguments.steps}) + "\n")


if __name__ == "__main__":
    main()
