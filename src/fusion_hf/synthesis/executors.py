"""The stages of a run, and datatrove's executors that run them on this machine, on Slurm or on Ray."""

import inspect
import io
from collections.abc import Callable, Mapping
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep

from fusion_hf.common.errors import InputError
from fusion_hf.common.yaml_config import check_keys
from fusion_hf.synthesis.run_config import ExecutorSettings, RunFolders

JOB = "synth-{}"
# otherwise a stage whose predecessor failed would wait in Slurm's queue forever
SLURM_DEFAULTS = {"kill-on-invalid-dep": "yes"}
# loguru would write the values of variables into tracebacks, which could reveal private data
WITHOUT_VALUES = "export LOGURU_DIAGNOSE=NO"
OURS = ("self", "pipeline", "tasks", "workers", "depends", "logging_dir", "skip_completed", "job_name")


@dataclass(frozen=True)
class Stage:
    """Steps that run together in a number of tasks. A stage starts when all tasks of the stage before it are done."""

    name: str
    steps: list[PipelineStep]
    tasks: int


class TaskFailed(RuntimeError):
    """A task failed. The message says why, in a form that can be passed between processes."""


class _NullStream(io.TextIOBase):
    """A stream that discards its input. It is never closed, since loguru keeps writing to it."""

    def write(self, text: str) -> int:
        return len(text)


class LocalExecutor(LocalPipelineExecutor):
    """
    datatrove's executor for this machine.

    Args:
        *arguments: arguments of datatrove's executor.
        quiet: whether to write logs to their folder only.
    """

    def __init__(self, *arguments: Any, quiet: bool):
        super().__init__(*arguments)
        self.quiet = quiet

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        try:
            with redirect_stderr(_NullStream()) if self.quiet else nullcontext():
                return super()._run_for_rank(rank, local_rank, node_rank)
        except InputError:  # can be passed between processes, and a retry would not help
            raise
        except Exception as error:
            # datatrove's errors cannot be unpickled, so the parent process would wait forever
            raise TaskFailed(f"task {rank}: {type(error).__name__}: {error}") from error


def make_executors(
    settings: ExecutorSettings, stages: list[Stage], folders: RunFolders, quiet: bool = True
) -> list[PipelineExecutor]:
    """
    Make one executor per stage, in order. Those of Slurm depend on each other.

    Args:
        settings: the settings of the executors.
        stages: the stages.
        folders: the folders of the run.
        quiet: whether to write logs to their folder only.

    Raises:
        InputError: if an option or a stage is unknown.
    """
    check_keys(settings.stages, [stage.name for stage in stages], "executor.stages")
    executors: list[PipelineExecutor] = []
    for stage in stages:
        before = executors[-1] if executors else None
        executors.append(_executor(settings, stage, folders.logs(stage.name), before, quiet))
    return executors


def _executor(
    settings: ExecutorSettings, stage: Stage, logs: Path, before: PipelineExecutor | None, quiet: bool
) -> PipelineExecutor:
    if settings.kind == "local":
        workers = stage.tasks if settings.workers == -1 else min(settings.workers, stage.tasks)
        return LocalExecutor(stage.steps, stage.tasks, workers, str(logs), quiet=quiet)
    place = str(logs.absolute())
    if settings.kind == "ray":
        options = _options(RayPipelineExecutor, settings, stage)
        return RayPipelineExecutor(stage.steps, stage.tasks, settings.workers, logging_dir=place, **options)
    options = _options(SlurmPipelineExecutor, settings, stage)
    options["sbatch_args"] = {**SLURM_DEFAULTS, **options.get("sbatch_args", {})}
    if "env_command" in options or not {"condaenv", "venv_path"} & options.keys():
        options["env_command"] = "\n".join([WITHOUT_VALUES, options.get("env_command") or ""]).strip()
    job = JOB.format(stage.name)
    given = {"workers": settings.workers, "depends": before, "job_name": job, "logging_dir": place}
    return SlurmPipelineExecutor(stage.steps, stage.tasks, **given, **options)


def _options(kind: Callable[..., Any], settings: ExecutorSettings, stage: Stage) -> dict[str, Any]:
    allowed = [name for name in inspect.signature(kind).parameters if name not in OURS]
    given: Mapping[str, Any] = settings.stages.get(stage.name, {})
    check_keys(settings.options, allowed, "executor.options")
    check_keys(given, allowed, f"executor.stages.{stage.name}")
    return {**settings.options, **given}
