"""The stages of a run, and where each keeps what."""

from dataclasses import dataclass
from pathlib import Path

from datatrove.pipeline.base import PipelineStep


@dataclass(frozen=True)
class RunFolders:
    """Where a run keeps what. `data` is the result; `work` can be removed when it is there."""

    output: Path

    @property
    def data(self) -> Path:
        return self.output / "data"

    @property
    def work(self) -> Path:
        return self.output / "work"

    @property
    def images(self) -> Path:
        return self.work / "pictures"

    @property
    def progress(self) -> Path:
        return self.work / "progress"

    def stage(self, name: str) -> Path:
        """The records as a stage leaves them."""
        return self.work / name

    def logs(self, stage: str) -> Path:
        """datatrove's own: logs, completed tasks, scripts for Slurm."""
        return self.work / "logs" / stage


@dataclass(frozen=True)
class Stage:
    """Steps that run together, in as many tasks; a stage begins when all tasks of the one before are done."""

    name: str
    steps: list[PipelineStep]
    tasks: int
