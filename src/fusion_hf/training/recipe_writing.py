"""Write a commented recipe for a user's records: the number of steps, the held-out part, and the paths."""

import os
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import torch
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fusion_hf.common.errors import InputError
from fusion_hf.common.outputs import write_atomically
from fusion_hf.data import RecordDataset, load_records
from fusion_hf.data.mixture import SUFFIXES, MixtureEntry, read_entries
from fusion_hf.training.exact_match import first_question
from fusion_hf.training.reporters import MODULES, NOWHERE, is_installed

TEMPLATE = Path(__file__).with_name("recipe.jinja")
FULL, LORA, QLORA = METHODS = ("full", "lora", "qlora")
TITLES = {FULL: "Full fine-tuning", LORA: "LoRA", QLORA: "QLoRA"}
HELD_OUT_SHARE, MOST_HELD_OUT = 10, 500  # every tenth record is held out, up to this number
BATCHES = (4, 8, 16, 32, 64, 128)  # the largest one with `LEAST_STEPS` per epoch is chosen
LEAST_STEPS = 50
WANTED_STEPS = 150  # a run of few records repeats them until it has so many steps, in at most `MOST_EPOCHS` epochs
EPOCHS, MOST_EPOCHS, ONE_EPOCH_FROM = 3, 10, 100_000
EVALUATIONS, MOST_BETWEEN = 5, 1000  # evaluations per run, and the maximum number of steps between two
LOGS, LOG_STEPS = 20, 10
DEVICE_BATCHES = {FULL: 2, LORA: 4, QLORA: 4}
PROBED, SHORT_ANSWER, TOKENS_PER_WORD, MOST_ASKED = (
    50,
    8,
    4,
    100,
)  # held-out records to inspect, in words per answer; questions to ask
TENSORBOARD = "tensorboard"


@dataclass(frozen=True)
class RecipeRequest:
    """
    The settings of a new recipe.

    Attributes:
        source: a file or folder of records, a data set of the Hub, or a mixture.
        output: the file of the recipe. The mixtures of training and held-out records are written next to it.
        method: one of `METHODS`.
        model: the model to start from.
        data_root: the folder that relative image paths refer to.
        eval_data: the held-out records. None holds out the last records of `source`, unless it is a mixture.
    """

    source: str
    output: Path
    method: str
    model: str
    data_root: str | None = None
    eval_data: str | None = None


@dataclass(frozen=True)
class Steps:
    """
    How a number of records is divided into the steps of a run.

    Attributes:
        records: the number of records.
        batch: the number of records per step.
        per_epoch: the number of steps per epoch.
        epochs: the number of epochs.
    """

    records: int
    batch: int
    per_epoch: int
    epochs: int

    @classmethod
    def of(cls, records: int) -> "Steps":
        """
        Choose the steps for a number of records, with the largest batch that leaves enough steps per epoch.

        Args:
            records: the number of records.
        """
        fitting = [batch for batch in BATCHES if records >= batch * LEAST_STEPS]
        batch = max(fitting, default=min(BATCHES[0], records))
        per_epoch = ceil(records / batch)
        few = min(MOST_EPOCHS, ceil(WANTED_STEPS / per_epoch))
        return cls(records, batch, per_epoch, 1 if records >= ONE_EPOCH_FROM else max(EPOCHS, few))

    @property
    def total(self) -> int:
        """Number of steps of the run."""
        return self.per_epoch * self.epochs

    @property
    def between_evaluations(self) -> int:
        """Number of steps between two evaluations."""
        return min(MOST_BETWEEN, max(1, self.total // EVALUATIONS))


@dataclass(frozen=True)
class Written:
    """
    The files that were written, and the numbers in them.

    Attributes:
        files: the paths of the files.
        steps: the steps of the run.
        held_out: the number of held-out records.
    """

    files: tuple[Path, ...]
    steps: Steps
    held_out: int


def write_recipe(request: RecipeRequest) -> Written:
    """
    Write a recipe and, if records are held out, a mixture for training and one for evaluation.

    Args:
        request: the settings of the recipe.

    Returns:
        The files and the numbers in them.

    Raises:
        InputError: if the records cannot be read, or a file exists already.
    """
    entries = read_entries(request.source, request.data_root)
    records = load_records(request.source, root=request.data_root, on_broken="skip", max_skipped=2**63)
    if not isinstance(records, RecordDataset):
        raise TypeError(f"{type(records).__name__} has no length")
    is_mixture = Path(request.source).suffix in SUFFIXES
    total = len(records) if is_mixture else sum(len(part.index) for part in records.parts)
    divided = 0 if is_mixture or request.eval_data is not None else min(MOST_HELD_OUT, total // HELD_OUT_SHARE)
    folder, files = request.output.absolute().parent, [request.output]
    data, eval_data = _from(folder, request.source), None
    if request.eval_data is not None:
        eval_data, held = _from(folder, request.eval_data), load_records(request.eval_data, on_broken="skip")
        probed = held if isinstance(held, RecordDataset) else None
    else:
        probed = records if divided else None
    if divided:
        parts = {"train": f"first:{total - divided}", "eval": f"end:{divided}"}
        names = {part: request.output.with_name(f"{request.output.stem}.{part}.yaml") for part in parts}
        files += names.values()
        data, eval_data = names["train"].name, names["eval"].name
    for file in files:
        if file.exists():
            raise InputError(f"{file} exists already. Give another --output, or remove the file.")
    held_out = divided if request.eval_data is None else 0 if probed is None else len(probed)
    steps = Steps.of(len(records) - divided)
    if divided:
        for part, strategy in parts.items():
            write_atomically(names[part], _mixture(entries[0], folder, strategy, request.data_root).encode())
    text = _render(request, steps, held_out, data, eval_data, _answer_words(probed, held_out))
    write_atomically(request.output, text.encode())
    return Written(tuple(files), steps, held_out)


def _from(folder: Path, name: str) -> str:
    """Return a path relative to `folder`. The id of a data set on the Hub is returned unchanged."""
    path = Path(name).expanduser()
    return os.path.relpath(path.absolute(), folder) if path.exists() else name


def _mixture(entry: MixtureEntry, folder: Path, strategy: str, data_root: str | None) -> str:
    """Write a mixture that selects a part of one source and keeps the folder of its images."""
    path = Path(entry.json_path)
    values = {"json_path": _from(folder, entry.json_path), "sampling_strategy": strategy}
    if data_root is not None:
        values["image_root"] = _from(folder, data_root)
    elif path.is_file():
        values["image_root"] = _from(folder, str(path.parent))
    return yaml.safe_dump({"datasets": [values]}, sort_keys=False, allow_unicode=True)


def _answer_words(records: RecordDataset | None, held_out: int) -> int | None:
    """Return the number of words of the longest first answer among some held-out records, or None if there is none."""
    if records is None:
        return None
    some = (records[index] for index in range(max(0, len(records) - min(PROBED, held_out)), len(records)))
    answers = [pair[1] for record in some if "skipped" not in record and (pair := first_question(record)) is not None]
    return max((len(answer.split()) for answer in answers), default=None)


def _render(
    request: RecipeRequest, steps: Steps, held_out: int, data: str, eval_data: str | None, words: int | None
) -> str:
    name = f"{Path(request.source).stem}-{request.method}"
    is_short = words is not None and words <= SHORT_ANSWER
    # the recipe is YAML, so nothing needs escaping for HTML
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return environment.get_template(TEMPLATE.name).render(
        title=TITLES[request.method],
        recipe=request.output,
        model=_scalar(request.model),
        output_dir=_scalar(f"runs/{name}"),
        run_name=_scalar(name),
        records=steps.records,
        held_out=held_out,
        data=_scalar(data),
        data_root=None if request.data_root is None or data.endswith(".train.yaml") else _scalar(request.data_root),
        eval_data=None if eval_data is None else _scalar(eval_data),
        is_lora=request.method != FULL,
        is_quantized=request.method == QLORA,
        steps_per_epoch=steps.per_epoch,
        steps=steps.total,
        global_batch_size=steps.batch,
        device_batch_size=min(DEVICE_BATCHES[request.method], steps.batch),
        epochs=steps.epochs,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        eval_steps=steps.between_evaluations,
        eval_samples=min(held_out, MOST_ASKED) if is_short else 0,
        eval_max_new_tokens=TOKENS_PER_WORD * max(1, words or 0),
        logging_steps=min(LOG_STEPS, max(1, steps.total // LOGS)),
        report_to=TENSORBOARD if any(map(is_installed, MODULES[TENSORBOARD])) else NOWHERE,
    )


def _scalar(text: str) -> str:
    """Write a text as a YAML scalar, with quotation marks where needed."""
    return yaml.safe_dump(text, allow_unicode=True, width=2**16).removesuffix("\n...\n").strip()
