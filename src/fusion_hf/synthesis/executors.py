"""The stages of a run, and datatrove's executors for them: processes of this machine, Slurm, Ray."""

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
# a stage whose predecessor failed would wait in Slurm's queue for ever
SLURM_DEFAULTS = {"kill-on-invalid-dep": "yes"}
# loguru writes the values of variables into its traces; no key is in one, but nothing else need be either
WITHOUT_VALUES = "export LOGURU_DIAGNOSE=NO"
OURS = ("self", "pipeline", "tasks", "workers", "depends", "logging_dir", "skip_completed", "job_name")


@dataclass(frozen=True)
class Stage:
    """Steps that run together, in as many tasks; a stage begins when all tasks of the one before are done."""

    name: str
    steps: list[PipelineStep]
    tasks: int


class TaskFailed(RuntimeError):
    """A task did not end; its message says why, in a form that passes between processes."""


class _NullStream(io.TextIOBase):
    """A stream that keeps nothing. It is never closed: loguru goes on writing to it."""

    def write(self, text: str) -> int:
        return len(text)


class LocalExecutor(LocalPipelineExecutor):
    """
    datatrove's executor for this machine.

    Args:
        quiet: keep its logs in their folder alone.
    """

    def __init__(self, *arguments: Any, quiet: bool):
        super().__init__(*arguments)
        self.quiet = quiet

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        try:
            with redirect_stderr(_NullStream()) if self.quiet else nullcontext():
                return super()._run_for_rank(rank, local_rank, node_rank)
        except InputError:  # it passes between processes, and no other start of the same run fares better
            raise
        except Exception as error:
            # datatrove's own errors cannot be unpickled: the parent process would wait for ever
            raise TaskFailed(f"task {rank}: {type(error).__name__}: {error}") from error


def make_executors(
    settings: ExecutorSettings, stages: list[Stage], folders: RunFolders, quiet: bool = True
) -> list[PipelineExecutor]:
    """
    Make one executor for each stage, in their order. Those of Slurm depend on each other.

    Raises:
        InputError: for an option that the executor does not have, or a stage that there is not.
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
