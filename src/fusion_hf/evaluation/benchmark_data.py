"""Prepare lmms-eval's tasks for their data, and check data in local folders."""

import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import yaml

from fusion_hf.common.errors import InputError
from fusion_hf.evaluation.benchmarks import (
    AUTHORS,
    BENCHMARKS,
    EITHER,
    IMAGE,
    IMAGES,
    INTEGER,
    LMMS_EVAL,
    NUMBER,
    OPTIONAL,
    RECORD,
    TEXT,
    TEXTS,
    Benchmark,
    find_benchmark,
)
from fusion_hf.evaluation.tasks.easy_vqa import prepare_easy_vqa
from fusion_hf.evaluation.tasks.local_rows import is_image, is_list

OWN_TASKS = Path(__file__).parent / "tasks"
SUFFIX = ".parquet"
FILE_NAME = re.compile(r"[\w.-]+")
# `datasets` interprets paths as patterns and as chains of file systems
UNSAFE = re.compile(r"[*?\[\]]|::")

# tests whether an Arrow type is of a kind
_OF_KIND: dict[str, Callable[[pa.DataType], bool]] = {
    TEXT: lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind),
    TEXTS: lambda kind: is_list(kind) and _OF_KIND[TEXT](kind.value_type),
    INTEGER: pa.types.is_integer,
    NUMBER: lambda kind: pa.types.is_floating(kind) or pa.types.is_integer(kind),
    RECORD: lambda kind: pa.types.is_struct(kind) and not is_image(kind),
    IMAGE: is_image,
    IMAGES: lambda kind: is_list(kind) and is_image(kind.value_type),
}


@dataclass(frozen=True)
class PreparedTask:
    """A task that lmms-eval finds by name if `yaml`, or a folder around it, is its `include_path`."""

    benchmark: Benchmark
    task_name: str
    yaml: Path


@dataclass(frozen=True)
class DataProblem:
    """The reason why the data of a benchmark cannot be used, with the file and column that it concerns."""

    benchmark: str
    message: str
    file: str | None = None
    column: str | None = None

    def __str__(self) -> str:
        return f"{self.benchmark}: {self.message}"


class _Broken(Exception):
    """Carry a message about a file until it becomes a `DataProblem`."""

    def __init__(self, message: str, file: Path | None = None):
        super().__init__(message)
        self.file = None if file is None else str(file)


def prepare_tasks(names: Sequence[str], prompts: str, data_root: Path | None, folder: Path) -> list[PreparedTask]:
    """
    Write the files of tasks into a folder, which becomes the `include_path` of lmms-eval's TaskManager.

    Args:
        names: the names of benchmarks.
        prompts: `authors` or `lmms-eval`, whose prompt is used where they differ.
        data_root: a folder with a subfolder of Parquet files `SPLIT-*.parquet` for each benchmark. None uses the data
            on the Hub.
        folder: the folder to write to.

    Raises:
        InputError: if a name or `prompts` is unknown, lmms-eval is not installed, or data is missing or unsafe.
    """
    if prompts not in (AUTHORS, LMMS_EVAL):
        raise InputError(f"`prompts` must be {AUTHORS} or {LMMS_EVAL}, got {prompts!r}.")
    return [_prepare(find_benchmark(name), prompts, data_root, folder) for name in names]


@contextmanager
def silence() -> Iterator[None]:
    """Silence the output of lmms-eval and its tasks while the context is active."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def load_task(prepared: PreparedTask) -> Any:
    """
    Load a task as lmms-eval's object.

    Args:
        prepared: the task.
    """
    from lmms_eval.tasks import TaskManager, get_task_dict

    manager = TaskManager(include_path=str(prepared.yaml.parent), include_defaults=False, model_name="fusion")
    return get_task_dict([prepared.task_name], manager, "chat")[prepared.task_name]


def _prepare(benchmark: Benchmark, prompts: str, data_root: Path | None, folder: Path) -> PreparedTask:
    if benchmark.source is None:
        name = _task_name(benchmark, AUTHORS)
        return PreparedTask(benchmark, name, prepare_easy_vqa(folder, name))
    name = _task_name(benchmark, prompts)
    data = {} if data_root is None else _local_data(benchmark, data_root)
    content = {"task": name, "include": [str(path) for path in _layers(benchmark, prompts)], **data}
    target = folder / name / f"{name}.yaml"
    target.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
    if data_root is not None and not _changes(benchmark, "process_docs"):
        text += "process_docs: !function fusion_hf.evaluation.tasks.local_rows.local_images\n"
    target.write_text(text, encoding="utf-8")
    return PreparedTask(benchmark, name, target)


def _task_name(benchmark: Benchmark, prompts: str) -> str:
    """Return a name that no built-in task has, since lmms-eval prefers its own among equal names."""
    if prompts == LMMS_EVAL:
        return f"lmms_{benchmark.name}"
    # a submitted benchmark shares prompts with a scored one, and their names must differ
    if benchmark.authors_task is None or benchmark.is_submitted:
        return f"fusion_{benchmark.name}"
    return benchmark.authors_task


def _layers(benchmark: Benchmark, prompts: str) -> list[Path]:
    """Return the YAML files in order of precedence: the authors' prompt, other changes, and lmms-eval's task."""
    layers = [_change_file(benchmark)]
    if prompts == AUTHORS and benchmark.authors_task is not None:
        layers.insert(0, OWN_TASKS / "authors" / f"{benchmark.authors_task}.yaml")
    assert benchmark.source is not None
    return [*(layer for layer in layers if layer.exists()), lmms_tasks() / benchmark.source]


def _change_file(benchmark: Benchmark) -> Path:
    return OWN_TASKS / "changes" / f"{benchmark.name}.yaml"


def _changes(benchmark: Benchmark, key: str) -> bool:
    """Return whether the changes of this package to lmms-eval's task set a key."""
    file = _change_file(benchmark)
    return file.exists() and any(line.startswith(f"{key}:") for line in file.read_text("utf-8").splitlines())


def lmms_tasks() -> Path:
    """
    Find the task folder of lmms-eval without importing it.

    Raises:
        InputError: if lmms-eval is not installed.
    """
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or spec.origin is None:
        raise InputError("Evaluation requires lmms-eval. Run `pip install --no-deps lmms-eval==0.7.3`.")
    return Path(spec.origin).parent / "tasks"


def _local_data(benchmark: Benchmark, data_root: Path) -> dict[str, Any]:
    """
    Return the keys that point a task at local files, with named splits, since `datasets` reads `dev-*` as
    "validation".
    """
    try:
        files = {split: [str(file) for file in _files(benchmark, split, data_root)] for split in benchmark.splits}
    except _Broken as error:
        raise InputError(f"`data_root`, {benchmark.name}: {error}.") from error
    kwargs = {"data_files": files, "columns": list(benchmark.schema)}
    return {"dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": kwargs}


def _files(benchmark: Benchmark, split: str, data_root: Path) -> list[Path]:
    """
    Return the files of a split in order. Raise `_Broken` for none, an unsafe name, or a file outside the data
    root.
    """
    root = data_root.resolve()
    folder = root / folder_of(benchmark)
    if UNSAFE.search(str(root)):
        raise _Broken(f"the path must not contain * ? [ ] or ::, which `datasets` interprets, got {root}")
    if not folder.is_dir():
        raise _Broken(f"the folder {folder} does not exist")
    files = sorted(folder.glob(f"{split}-*{SUFFIX}"))
    if not files:
        raise _Broken(f"{folder} must contain files {split}-*{SUFFIX}, got none")
    for file in files:
        if not FILE_NAME.fullmatch(file.name):
            raise _Broken(f"file names may have letters, digits, '.', '_' and '-', got {file.name!r}", file)
        if not file.resolve().is_relative_to(root):
            raise _Broken(f"{file} points outside the data root", file)
        if not file.is_file():
            raise _Broken(f"{file} is not a file", file)
    return files


def folder_of(benchmark: Benchmark) -> str:
    """
    Return the name of a benchmark's folder in the data root. Variants share the folder of their benchmark.

    Args:
        benchmark: the benchmark.
    """
    return next(
        own.name for own in BENCHMARKS.values() if own.dataset == benchmark.dataset and own.config == benchmark.config
    )


def check_data(names: Sequence[str], data_root: Path | None) -> list[DataProblem]:
    """
    Find data that is missing or does not match the `schema` of its benchmark. Only the metadata of files is read.

    Args:
        names: the names of benchmarks.
        data_root: the folder of local data. None means the data on the Hub, which is not checked.

    Returns:
        The problems.

    Raises:
        InputError: if a name is unknown.
    """
    benchmarks = [find_benchmark(name) for name in names]
    if data_root is None:
        return []
    return [problem for one in benchmarks if one.source is not None for problem in _problems(one, data_root)]


def _problems(benchmark: Benchmark, data_root: Path) -> Iterator[DataProblem]:
    for split in benchmark.splits:
        try:
            files = _files(benchmark, split, data_root)
            heads = [(file, _head(file)) for file in files]
        except _Broken as error:
            yield DataProblem(benchmark.name, str(error), error.file)
            continue
        if not sum(head.num_rows for _, head in heads):
            yield DataProblem(benchmark.name, f"{files[0]} has no rows", str(files[0]))
        for file, head in heads:
            yield from _mismatches(benchmark, file, head.schema.to_arrow_schema())


def _head(file: Path) -> pyarrow.parquet.FileMetaData:
    """Read the metadata of a file. Raise `_Broken` if it is not a Parquet file."""
    try:
        return pyarrow.parquet.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise _Broken(f"{file} cannot be read as Parquet ({' '.join(str(error).split())})", file) from error


def _mismatches(benchmark: Benchmark, file: Path, schema: pa.Schema) -> Iterator[DataProblem]:
    for column, wanted in benchmark.schema.items():
        if column not in schema.names:
            yield DataProblem(benchmark.name, f"{file}: column {column!r} is missing", str(file), column)
        elif not fits(schema.field(column).type, wanted):
            message = f"{file}: column {column!r} must be {wanted}, got {schema.field(column).type}"
            yield DataProblem(benchmark.name, message, str(file), column)


def fits(found: pa.DataType, wanted: str) -> bool:
    """
    Return whether an Arrow type is of a kind in a benchmark's schema.

    Args:
        found: the Arrow type.
        wanted: the kind, as in "text|integer" or "image?".
    """
    if wanted.endswith(OPTIONAL) and pa.types.is_null(found):
        return True
    return any(_OF_KIND[kind](found) for kind in wanted.removesuffix(OPTIONAL).split(EITHER))
