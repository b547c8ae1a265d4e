"""Write the model card of a run (`README.md`) from its recipe and its log."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fusion_hf.common.errors import InputError
from fusion_hf.common.outputs import write_atomically
from fusion_hf.common.yaml_config import read_yaml_keys
from fusion_hf.data.mixture import read_entries
from fusion_hf.hub.family import AUTHORS, PAPER, REPOSITORY, Licence, find_member
from fusion_hf.hub.folders import FINISHED_FILE, RECIPE_FILE, find_folder
from fusion_hf.hub.model_cards import CARD, HUB, card_metadata, licence_of_card, read_card_metadata, render_card
from fusion_hf.model.compatibility_fusion import TESTED
from fusion_hf.model.configuration_fusion import FusionConfig
from fusion_hf.training.callbacks import LOG_FILE
from fusion_hf.training.recipe import DECISIVE

TEMPLATE = Path(__file__).with_name("run_card.jinja")
# recipe keys that others need to reproduce a run, without folders, account names and tokens
SHOWN = (*DECISIVE, "eval_data", "eval_samples", "bf16", "fp16", "gradient_checkpointing", "save_dtype")
PLACES = ("model", "data", "data_root", "eval_data")  # a card shows only the last component of these paths
FINETUNED, ADAPTER = "finetune", "adapter"  # the Hub's names for the relation to a base model
EVALUATION = "eval_"
NO_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "answers")
MOST_EVALUATIONS = 12  # maximum number of rows in the table


def write_run_card(folder: Path, run: Path, base: str, name: str, is_adapter: bool = False) -> None:
    """
    Write the model card of a trained model.

    Args:
        folder: the folder of the model or its adapter.
        run: the `output_dir` of the run. Information that is missing there is left out of the card.
        base: the folder or Hub repository that the run started from.
        name: the name of the model, or the repository that it will be pushed to.
        is_adapter: whether `folder` holds only an adapter.

    Raises:
        InputError: if the base model cannot be found.
    """
    found = find_folder(base)
    config = FusionConfig.from_pretrained(found if is_adapter else folder)
    repository = None if Path(base).expanduser().is_dir() else base
    recipe = read_yaml_keys(run / RECIPE_FILE, "The recipe") if (run / RECIPE_FILE).is_file() else {}
    card = read_card_metadata(found)
    licence, base_models = _licence(card, repository, config), _base_models(card, repository)
    log = read_log(run / LOG_FILE)
    evaluations = find_evaluations(log)
    data, datasets = _data(recipe)
    text = render_card(
        TEMPLATE,
        title=name.rpartition("/")[2],
        model_id=name,
        has_tokenizer=True,
        query_lens=config.query_lens,
        side=config.vision_config.image_size,
        releases=TESTED,
        metadata=card_metadata(
            licence,
            base_models,
            datasets,
            ["lora"] if recipe.get("lora_rank") or is_adapter else [],
            base_model_relation=(ADAPTER if is_adapter else FINETUNED) if repository else None,
        ),
        config=config,
        base=f"[{repository}]({HUB}{repository})" if repository else f"`{Path(base).name}`",
        base_repository=repository,
        base_models=base_models,
        is_adapter=is_adapter,
        settings=_shown(recipe),
        data=data,
        held_out=_name(recipe["eval_data"]) if recipe.get("eval_data") else "",
        finished=_finished(run),
        train_loss=next((entry["train_loss"] for entry in reversed(log) if "train_loss" in entry), None),
        evaluations=_some(evaluations),
        metrics=list(dict.fromkeys(name for values in evaluations.values() for name in values)),
        answers=next((entry[f"{EVALUATION}answers"] for entry in log if f"{EVALUATION}answers" in entry), None),
        licence=licence,
        paper=PAPER,
        repository=REPOSITORY,
        hub=HUB,
    )
    write_atomically(folder / CARD, text.encode())


def read_log(path: Path) -> list[dict[str, Any]]:
    """
    Read the lines of a run's log. A line that is incomplete because the run was killed is skipped.

    Args:
        path: the log file.

    Returns:
        The logged values, empty if the file does not exist.
    """
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def find_evaluations(log: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """
    Collect the results of evaluations. One evaluation may write several lines.

    Args:
        log: the lines of the log.

    Returns:
        The values by name (without the prefix `eval_`), by step.
    """
    found: dict[int, dict[str, float]] = {}
    for entry in log:
        values = {
            key.removeprefix(EVALUATION): value
            for key, value in entry.items()
            if key.startswith(EVALUATION) and isinstance(value, int | float) and not key.endswith(NO_METRICS)
        }
        if values:
            found.setdefault(int(entry.get("step", 0)), {}).update(values)
    return found


def _some(evaluations: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    """Return the first evaluation and the last ones."""
    steps = list(evaluations)
    if len(steps) > MOST_EVALUATIONS:
        steps = [steps[0], *steps[-MOST_EVALUATIONS + 1 :]]
    return {step: evaluations[step] for step in steps}


def _licence(card: Mapping[str, Any], repository: str | None, config: FusionConfig) -> Licence | None:
    """Return the licence in the base model's card, or that of the language model for the authors' checkpoints."""
    member = find_member(config)
    if repository is not None and repository.startswith(f"{AUTHORS}/") and member is not None:
        return member.backbone.licence
    return licence_of_card(dict(card))


def _base_models(card: Mapping[str, Any], repository: str | None) -> list[str]:
    """Return the base model if it is on the Hub, else the base models in its card."""
    if repository is not None:
        return [repository]
    named = card.get("base_model") or []
    return [named] if isinstance(named, str) else [name for name in named if isinstance(name, str)]


def _data(recipe: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Describe what a run was trained on, and list the data sets that are on the Hub."""
    if not recipe.get("data"):
        return [], []
    try:
        entries = read_entries(recipe["data"], recipe.get("data_root"))
        hub = [found.hub[0] if (found := entry.locate()).hub is not None else None for entry in entries]
    except InputError:  # the data has been moved since
        return [f"`{_name(recipe['data'])}`"], []
    names = [
        f"`{_name(entry.json_path)}`" if repository is None else f"[{repository}]({HUB}datasets/{repository})"
        for entry, repository in zip(entries, hub, strict=True)
    ]
    return list(dict.fromkeys(names)), list(dict.fromkeys(name for name in hub if name is not None))


def _name(place: str) -> str:
    """Return the last component of a local path, to keep the rest private. Names on the Hub are returned in full."""
    path = Path(place).expanduser()
    return path.name if path.is_absolute() or path.exists() or len(path.parts) > len(("owner", "name")) else place


def _shown(recipe: Mapping[str, Any]) -> str:
    values = {
        key: _name(value) if key in PLACES and isinstance(value, str) else value
        for key, value in recipe.items()
        if key in SHOWN
    }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).strip() if values else ""


def _finished(run: Path) -> dict[str, Any]:
    """Read the facts that a run wrote when it finished. Older versions wrote fewer."""
    path = run / FINISHED_FILE
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {name: content.get(name) for name in ("steps", "records", "skipped", "best_step")}
