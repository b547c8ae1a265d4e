"""What a run measured, and everything that it depends on, as one JSON file."""

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
TIME = "%Y%m%d-%H%M%S-%f"  # in names of files
STDERR = ("_stderr", "_stderr_clt")  # behind a metric's name, before its filter


@dataclass(frozen=True)
class Metric:
    """A figure of a task in lmms-eval's unit; `standard_error` is None where lmms-eval knows none."""

    metric: str
    value: float
    standard_error: float | None


@dataclass(frozen=True)
class TaskRecord:
    """
    A task that was scored, or whose answers were written down for a server, or why neither was done.

    `n` of its `n_total` questions were asked; only a task that is scored has metrics. `judge` is the language model
    that scoring asked, `submission` the file for the server, in the run's output folder.
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
    Which model it was, and how it ran. `published`: the row of the published table whose sizes it has, if any.

    A model that a server has is at `url`, under its `name` there. A server that does not say more of it leaves
    `dtype` and `device` unknown, the token budget too. `settings` are those of a model in the run's own process which
    change answers and are not in its weights; see `local.describe_settings`.
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
        """Describe a model that is known."""
        known = asdict(info)
        del known["max_length"]
        return cls(name, **known, url=url)


@dataclass(frozen=True)
class RunRecord:
    """
    A run: its tasks in the order in which they were asked for. `parallel`: requests in flight to a server. `samples`:
    the folder of what it did with each question, in the output folder; see `sample_log`.
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
        return [task for task in self.tasks if task.status == FAILED]

    def write(self, folder: Path) -> Path:
        """Write a new file into `folder`, named by the time."""
        now = datetime.now(timezone.utc)
        content = {"format": FORMAT, "date": now.isoformat(timespec="seconds"), "versions": versions(), **asdict(self)}
        path = folder / f"record-{now.strftime(TIME)}.json"
        write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
        return path

    @classmethod
    def read(cls, path: Path) -> "RunRecord":
        """
        Raises:
            InputError: if the file is no record of this format.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = content.pop("format")
            if found == FORMAT:
                del content["date"], content["versions"]
                tasks = [_read_task(task) for task in content.pop("tasks")]
                return cls(model=ModelRecord(**content.pop("model")), tasks=tasks, **content)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is no record of `fusion-hf evaluate` ({error!r}).") from error
        raise InputError(f"{path} has the format {found!r}; allowed: {FORMAT}.")


def _read_task(content: dict[str, Any]) -> TaskRecord:
    metrics = tuple(Metric(**metric) for metric in content.pop("metrics"))
    return TaskRecord(metrics=metrics, failures=tuple(content.pop("failures")), **content)


def versions() -> dict[str, str]:
    """List the versions of Python and the packages that the figures depend on."""
    return {"python": sys.version.split()[0], **{name: metadata.version(name) for name in PACKAGES}}


def read_metrics(results: dict[str, Any]) -> tuple[Metric, ...]:
    """Read the figures among a task's results of lmms-eval, whose keys are `metric,filter`.

    Raises:
        ValueError: if there is none, or one is no number.
    """
    metrics = []
    for key, value in results.items():
        name, _, kind = key.partition(",")
        if not kind or not _is_number(value) or "_stderr" in name:
            continue
        if not math.isfinite(value):
            raise ValueError(f"{key} is {value}; allowed: a number.")
        errors: list[Any] = [results.get(f"{name}{suffix},{kind}") for suffix in STDERR]
        error = next((float(e) for e in errors if _is_number(e) and math.isfinite(e)), None)
        metrics.append(Metric(key, float(value), error))
    if not metrics:
        raise ValueError(f"lmms-eval gave no figure, only {', '.join(results)}.")
    return tuple(metrics)


def _is_number(value: Any) -> bool:
    return hasattr(value, "__float__") and not isinstance(value, (str, bool))
