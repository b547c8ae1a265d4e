"""The record of a run: its results and everything that they depend on, in one JSON file."""

import json
import math
import sys
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal

from fusion_hf.common.errors import InputError
from fusion_hf.common.outputs import write_atomically
from fusion_hf.inference.model_info import ModelInfo

FORMAT = 2
SCORED: Final = "scored"
FAILED: Final = "failed"
SUBMITTED: Final = "submission written"
PACKAGES = ("fusion_hf", "lmms_eval", "transformers", "torch", "datasets", "accelerate", "pillow")
TIME = "%Y%m%d-%H%M%S-%f"  # time format in file names
STDERR = ("_stderr", "_stderr_clt")  # suffixes between the name of a metric and its filter


@dataclass(frozen=True)
class Metric:
    """One result of a task in lmms-eval's unit. `standard_error` is None if lmms-eval gives none."""

    metric: str
    value: float
    standard_error: float | None


@dataclass(frozen=True)
class TaskRecord:
    """
    A task that was scored, whose answers were written to a file for a server, or that failed.

    Attributes:
        task: the name of the benchmark.
        lmms_task: the name of lmms-eval's task.
        status: what was done.
        n: the number of questions that were asked.
        n_total: the number of questions of the benchmark.
        prompt_sha256: the hash of all prompts.
        metrics: the results of a scored task.
        judge: the language model that the scoring asked.
        submission: the file for the server, in the output folder of the run.
        reason: why the task failed.
        failures: the failed requests.
    """

    task: str
    lmms_task: str
    status: Literal["scored", "failed", "submission written"]
    n: int = 0
    n_total: int = 0
    prompt_sha256: str | None = None
    metrics: tuple[Metric, ...] = ()
    judge: str | None = None
    submission: str | None = None
    reason: str | None = None
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelRecord:
    """
    The model of a run, and how it was run.

    Attributes:
        name: the name of the model, on the server if it has one.
        revision: the hash of its weights and configuration.
        dtype: the dtype of the weights, which a server may not report.
        device: the device, which a server may not report.
        query_len: the number of latent tokens, which a server may not report.
        image_token_grid: the side of the grid of image tokens, which a server may not report.
        published: the row of the published table with the sizes of the model, if any.
        url: the address of the server, or None for a model in the process of the run.
        settings: the settings of a model in the process of the run that change answers and are not in its weights; see
            `local.describe_settings`.
    """

    name: str
    revision: str
    dtype: str
    device: str
    query_len: int | None
    image_token_grid: int | None
    published: str | None = None
    url: str | None = None
    settings: dict[str, Any] | None = None

    @classmethod
    def of(cls, name: str, info: ModelInfo, url: str | None = None) -> "ModelRecord":
        """
        Make the record of a model whose information is known.

        Args:
            name: the name of the model.
            info: the information.
            url: the address of the server, or None.
        """
        known = asdict(info)
        del known["max_length"]
        return cls(name, **known, url=url)


@dataclass(frozen=True)
class RunRecord:
    """
    The record of a run.

    Attributes:
        command: the command line.
        model: the model.
        prompts: whose prompts were used.
        limit: the maximum number of questions per task, or None.
        batch_size: the number of prompts per batch.
        processes: the number of processes.
        data_root: the folder of local data, or None.
        tasks: the tasks in the order in which they were requested.
        parallel: the number of concurrent requests to a server.
        samples: the folder in the output folder with the log of each question; see `sample_log`.
    """

    command: list[str]
    model: ModelRecord
    prompts: str
    limit: int | None
    batch_size: int
    processes: int
    data_root: str | None
    tasks: list[TaskRecord] = field(default_factory=list)
    parallel: int | None = None
    samples: str | None = None

    @property
    def failed(self) -> list[TaskRecord]:
        """The tasks that failed."""
        return [task for task in self.tasks if task.status == FAILED]

    def write(self, folder: Path) -> Path:
        """
        Write the record to a new file in `folder`, with the time in its name.

        Args:
            folder: the output folder of the run.

        Returns:
            The path of the file.
        """
        now = datetime.now(timezone.utc)
        content = {"format": FORMAT, "date": now.isoformat(timespec="seconds"), "versions": versions(), **asdict(self)}
        path = folder / f"record-{now.strftime(TIME)}.json"
        write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
        return path

    @classmethod
    def read(cls, path: Path) -> "RunRecord":
        """
        Read a record.

        Args:
            path: the file.

        Raises:
            InputError: if the file is not a record of this format.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = content.pop("format")
            if found == FORMAT:
                del content["date"], content["versions"]
                tasks = [_read_task(task) for task in content.pop("tasks")]
                return cls(model=ModelRecord(**content.pop("model")), tasks=tasks, **content)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is not a record of `fusion-hf evaluate` ({error!r}).") from error
        raise InputError(f"The format of {path} must be {FORMAT}, got {found!r}.")


def _read_task(content: dict[str, Any]) -> TaskRecord:
    metrics = tuple(Metric(**metric) for metric in content.pop("metrics"))
    return TaskRecord(metrics=metrics, failures=tuple(content.pop("failures")), **content)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    return {"python": sys.version.split()[0], **{name: metadata.version(name) for name in PACKAGES}}


def read_metrics(results: dict[str, Any]) -> tuple[Metric, ...]:
    """
    Read the results of a task from those of lmms-eval, whose keys are `metric,filter`.

    Args:
        results: the results of lmms-eval.

    Raises:
        ValueError: if there is no result, or one is not a number.
    """
    metrics = []
    for key, value in results.items():
        name, _, kind = key.partition(",")
        if not kind or not _is_number(value) or "_stderr" in name:
            continue
        if not math.isfinite(value):
            raise ValueError(f"{key} must be a number, got {value}.")
        errors: list[Any] = [results.get(f"{name}{suffix},{kind}") for suffix in STDERR]
        error = next((float(e) for e in errors if _is_number(e) and math.isfinite(e)), None)
        metrics.append(Metric(key, float(value), error))
    if not metrics:
        raise ValueError(f"lmms-eval must return at least one metric, got only {', '.join(results)}.")
    return tuple(metrics)


def _is_number(value: Any) -> bool:
    return hasattr(value, "__float__") and not isinstance(value, (str, bool))
