"""One training run from start to end, as `fusion-hf train` does it. Started again, a run resumes."""

import json
import logging
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from fusion_hf.common.errors import InputError
from fusion_hf.common.outputs import write_atomically
from fusion_hf.common.yaml_config import read_yaml_keys
from fusion_hf.data import load_records
from fusion_hf.hub.folders import FINISHED_FILE, RECIPE_FILE, find_folder
from fusion_hf.hub.model_cards import CARD
from fusion_hf.inference.loading import load_model
from fusion_hf.model.processing_fusion import FusionProcessor
from fusion_hf.training.arguments import FusionTrainingArguments
from fusion_hf.training.cast_dtype import cast_weights
from fusion_hf.training.checkpoints import StopSignal, find_last, problem, set_aside, supersede, writing
from fusion_hf.training.collator import FusionDataCollator
from fusion_hf.training.distributed import keep_names
from fusion_hf.training.parameter_groups import freeze_except
from fusion_hf.training.recipe import changed_keys, make_arguments
from fusion_hf.training.run_card import write_run_card
from fusion_hf.training.run_report import count_records, count_skipped
from fusion_hf.training.trainer import FusionTrainer

logger = logging.getLogger(__name__)

SKIPPED_FILE = "skipped.jsonl"
AUTO, NONE = "auto", "none"  # of `resume_from_checkpoint`
SECRET = "hub_token"  # must not be written into a folder that may be published


def run(values: Mapping[str, Any]) -> bool:
    """
    Train a model as a recipe says.

    Checkpoints are written to `output_dir/checkpoint-N`, and the finished model to `output_dir`. If there are
    checkpoints, the run resumes from the last complete one, unless `resume_from_checkpoint` is `none`.

    Args:
        values: the keys and values of the recipe.

    Returns:
        Whether the run has finished. False means that a signal stopped it after a checkpoint.

    Raises:
        InputError: if the recipe, its files or the environment must be corrected.
    """
    arguments = make_arguments(values, int(os.environ.get("WORLD_SIZE", "1")))
    output = Path(arguments.output_dir)
    if (output / FINISHED_FILE).is_file():
        if (
            arguments.process_index == 0 and not (output / CARD).is_file()
        ):  # the run was killed, or used a version that wrote no card
            _write_card(arguments, output)
        logger.warning("%s holds a finished model already. Give another output_dir to train again.", output)
        return True
    if not sys.stderr.isatty():
        _hide_bars(arguments)
    with arguments.main_process_first(desc="look for checkpoints"):
        if arguments.process_index == 0:
            _begin(output, values, arguments)
    set_seed(arguments.seed)
    processor, model = load_start(arguments)
    with StopSignal() as stop:
        trainer = make_trainer(model, processor, arguments, stop)
        last = None if arguments.resume_from_checkpoint == NONE else _checkpoint(arguments)
        if last is not None and arguments.lora_rank:
            from fusion_hf.training.adapters import check_adapter

            check_adapter(model, last)  # type: ignore[arg-type]
        trainer.train(resume_from_checkpoint=last)
        if trainer.stopped:
            return False
        _finish(trainer, output)
    return True


def _hide_bars(arguments: FusionTrainingArguments) -> None:
    """Disable progress bars where the output is not a terminal."""
    arguments.disable_tqdm = True
    transformers_logging.disable_progress_bar()


def _begin(output: Path, values: Mapping[str, Any], arguments: FusionTrainingArguments) -> None:
    """
    Create the folder, set incomplete checkpoints aside, and check that the run was started with the same
    settings.
    """
    with writing(output, RECIPE_FILE):
        output.mkdir(parents=True, exist_ok=True)
    set_aside(output)
    recipe = output / RECIPE_FILE
    goes_on = find_last(output) is not None and arguments.resume_from_checkpoint != NONE
    if goes_on and recipe.is_file():
        began = read_yaml_keys(recipe, "The recipe")
        if changed := changed_keys(began, values):
            found = ", and ".join(
                f"`{key}` must be {before!r}, with which the run in {output} was started, got {now!r}"
                for key, (before, now) in changed.items()
            )
            same = " ".join(f"{key}={_in_yaml(before)}" for key, (before, _) in changed.items())
            raise InputError(
                f"{found}. Give the same value ({same}), another output_dir, or resume_from_checkpoint=none to start "
                "again."
            )
    with writing(output, RECIPE_FILE):
        written = {key: value for key, value in values.items() if key != SECRET}
        write_atomically(recipe, yaml.safe_dump(written, sort_keys=False, allow_unicode=True).encode())
    given = arguments.resume_from_checkpoint
    if given not in (None, AUTO):
        supersede(output, _step_in(output, given))


def _in_yaml(value: Any) -> str:
    """Write a value as an override on the command line."""
    return shlex.quote(yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip())


def _step_in(output: Path, given: str) -> int:
    """Return the step of a checkpoint of this run, or 0 if the run starts from another checkpoint or none."""
    folder = Path(given)
    if not folder.is_dir() or folder.resolve().parent != output.resolve():
        return 0
    return int(folder.name.rpartition("-")[2])


def _checkpoint(arguments: FusionTrainingArguments) -> str | None:
    given = arguments.resume_from_checkpoint
    if given not in (None, AUTO):
        if not Path(str(given)).is_dir():
            raise InputError(
                f"`resume_from_checkpoint` must be auto, none, or the folder of a checkpoint, got {given!r}."
            )
        if (reason := problem(Path(str(given)))) is not None:
            raise InputError(f"`resume_from_checkpoint` must be a complete checkpoint, got {given!r}: {reason}.")
        return str(given)
    last = find_last(Path(arguments.output_dir))
    return None if last is None else str(last)


def load_start(arguments: FusionTrainingArguments) -> tuple[FusionProcessor, torch.nn.Module]:
    """
    Load the processor and the model that a run starts from.

    The weights are float32 (unless quantized), untrained parts are frozen, and LoRA is added.

    Args:
        arguments: the training arguments.

    Returns:
        The processor and the model.

    Raises:
        InputError: if the folder or repository does not hold a complete FUSION model.
    """
    folder = find_folder(str(arguments.model))
    options: dict[str, Any] = {}
    if arguments.load_in_4bit or arguments.load_in_8bit:
        from fusion_hf.training.adapters import quantization_config

        options["quantization_config"] = quantization_config(arguments)
    model, processor = load_model(folder, torch.float32, **options)
    keep_names(model)
    if arguments.lora_rank:
        from fusion_hf.training.adapters import add_lora, keep_gradients

        keep_gradients(model)
        return processor, add_lora(model, arguments)
    freeze_except(model, arguments.train)
    return processor, model


def make_trainer(
    model: torch.nn.Module,
    processor: FusionProcessor,
    arguments: FusionTrainingArguments,
    stop: StopSignal | None = None,
) -> FusionTrainer:
    """
    Make the trainer of a run and read its records.

    Args:
        model: the model to train.
        processor: the processor of the model.
        arguments: the training arguments.
        stop: the signal that stops the run.

    Returns:
        The trainer.
    """
    collator = FusionDataCollator(
        processor,
        query_lens=arguments.query_lens,
        max_length=arguments.max_length,
        compact=True,
        max_image_pixels=arguments.max_image_pixels,
    )
    records = _records(arguments, str(arguments.data), processor)
    held_out = None if arguments.eval_data is None else _records(arguments, arguments.eval_data, processor)
    return FusionTrainer(
        model=model, args=arguments, data_collator=collator, train_dataset=records, eval_dataset=held_out, stop=stop
    )


def _records(arguments: FusionTrainingArguments, source: str, processor: FusionProcessor) -> Any:
    is_training, images, most_pixels = source == arguments.data, processor.image_processor, arguments.max_image_pixels
    with arguments.main_process_first(desc="index of the records"):  # the other processes read the finished index
        return load_records(
            source,
            root=arguments.data_root if is_training else None,
            on_broken=arguments.on_broken,  # type: ignore[arg-type]
            max_skipped=arguments.max_skipped,
            skipped_file=Path(arguments.output_dir) / SKIPPED_FILE,
            cache=arguments.data_cache,
            streaming=arguments.streaming and is_training,
            seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
            max_image_pixels=images.max_image_pixels if most_pixels is None else most_pixels,
            exif_transpose=images.exif_transpose,
            on_truncated=arguments.on_truncated,  # type: ignore[arg-type]
            image_roots=arguments.image_roots,
            image_hosts=arguments.image_hosts,
            private_image_hosts=arguments.private_image_hosts,
        )


def _finish(trainer: FusionTrainer, output: Path) -> None:
    """Write the finished model and then the file that marks it as finished."""
    arguments = trainer.args
    with writing(output, "The finished model"):
        trainer.save_model(str(output))
        trainer.save_state()
        trainer.accelerator.wait_for_everyone()
        if not arguments.should_save:
            return
        if not arguments.lora_rank:  # an adapter keeps the precision that it was trained in
            cast_weights(output, arguments.save_dtype)
        facts = {
            "steps": trainer.state.global_step,
            "records": count_records(trainer.train_dataset),
            "skipped": count_skipped(trainer.train_dataset),
            "best_step": trainer.state.best_global_step if arguments.load_best_model_at_end else None,
        }
        write_atomically(output / FINISHED_FILE, f"{json.dumps(facts)}\n".encode())
        _write_card(arguments, output)


def _write_card(arguments: FusionTrainingArguments, output: Path) -> None:
    name = arguments.hub_model_id or output.resolve().name
    write_run_card(output, output, str(arguments.model), name, is_adapter=arguments.lora_rank > 0)
