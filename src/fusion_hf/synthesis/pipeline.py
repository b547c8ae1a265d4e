"""A run from start to end: its stages, their executors, and the settings that must not change between two starts."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from fusion_hf.common.endpoints import check_key
from fusion_hf.common.errors import InputError, short_name
from fusion_hf.common.outputs import json_bytes, write_atomically
from fusion_hf.synthesis.category import load_categories
from fusion_hf.synthesis.executors import Stage, make_executors
from fusion_hf.synthesis.filtering import BalanceOptions, FilterRecords
from fusion_hf.synthesis.image_generation import MakeImages
from fusion_hf.synthesis.pool import STAGE as POOL
from fusion_hf.synthesis.pool import DrawRecords, PlanRecords
from fusion_hf.synthesis.progress import Progress
from fusion_hf.synthesis.readers import check_pool
from fusion_hf.synthesis.record_documents import ReadStage, SaveStage, plan_file
from fusion_hf.synthesis.request_step import RequestStep
from fusion_hf.synthesis.rollouts import (
    DescribeRollout,
    FusionImageCheck,
    ImageJudgeRollout,
    JudgeRollout,
    RecordRollout,
    WriteTurnsRollout,
)
from fusion_hf.synthesis.run_config import PROCEDURAL, EndpointSettings, RunFolders, SynthesisConfig
from fusion_hf.synthesis.run_report import MakeReport
from fusion_hf.synthesis.shards import WriteRecords

SETTINGS, MODELS = "settings.json", "models"
# settings that change no record: the address, the speed and the price of an endpoint
FREE_OF_ENDPOINT = (
    *("url", "key_variable", "concurrency", "patience", "timeout", "server", "server_arguments"),
    *("price_per_million_input", "price_per_million_output", "tokens_per_second"),
)
FREE_OF_IMAGES = (
    *("url", "key_variable", "patience", "timeout", "device", "offload"),
    *("price_per_picture", "seconds_per_picture"),
)


def run(config: SynthesisConfig, quiet: bool = True) -> bool:
    """
    Do the remaining work of a run on this machine or a cluster. With Slurm, jobs are submitted and run later.

    Args:
        config: the configuration of the run.
        quiet: whether to keep datatrove's logs off the terminal.

    Returns:
        Whether the run is finished.

    Raises:
        InputError: if the folder belongs to a run with other settings, or captions or an API key are missing.
        TaskFailed: if a task failed. Its finished work is kept.

    Example:

        config = load_config(Path("configs/synthesis/mix.yaml"), ["backend=procedural", "records=24"])
        run(config)  # writes config.output / "data"
    """
    viewer = None if config.image_check is None else config.image_check.endpoint
    for asked in (config.writer, config.images, config.judge, viewer):
        if asked is not None:
            check_key(asked.key_variable)
    folders = RunFolders(config.output)
    if config.pool is not None and config.backend == MODELS and not plan_file(folders.work).exists():
        check_pool(config.pool)
    begin(config)
    executors = make_executors(config.executor, StageBuilder(config).all(), folders, quiet)
    if config.executor.kind == "slurm":
        executors[-1].run()  # launches the earlier ones first
        return False
    for executor in executors:
        executor.run()
    return True


def begin(config: SynthesisConfig) -> None:
    """
    Create the folder of a run, or check that an existing one has the same settings.

    Args:
        config: the configuration of the run.

    Raises:
        InputError: if the folder belongs to a run with other settings, or cannot be written.
    """
    path, settings = RunFolders(config.output).work / SETTINGS, decisive(config)
    if not path.exists():
        try:
            write_atomically(path, json_bytes(settings, indent=1))
        except OSError as error:
            raise InputError(f"`output` must be a writable folder, got {config.output} ({error.strerror}).") from error
        return
    before = json.loads(path.read_bytes())
    for name, value in settings.items():
        if before.get(name) != value:
            raise InputError(
                f"`{name}` must be {short_name(repr(before.get(name)))}, with which the run in {config.output} was "
                f"started, got {short_name(repr(value))}. Give the same value, or another output."
            )


def decisive(config: SynthesisConfig) -> dict[str, Any]:
    """
    Return the settings that determine the bytes of the result, as JSON values.

    Args:
        config: the configuration of the run.
    """
    values = asdict(config)
    for name in ("writer", "judge"):
        values[name] = _without(values[name], FREE_OF_ENDPOINT)
    values["images"] = _without(values["images"], FREE_OF_IMAGES)
    if (check := values["image_check"]) is not None:
        check["endpoint"] = _without(check["endpoint"], FREE_OF_ENDPOINT)
    values["executor"] = {"tasks": config.executor.tasks}
    values["output"] = None
    del values["license"]  # appears only in the data card
    known = load_categories()
    values["prompts"] = {name: known[name].prompts_hash for name in config.shares}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
    return json.loads(json_bytes(flat))


def _without(values: dict[str, Any] | None, names: tuple[str, ...]) -> dict[str, Any] | None:
    return None if values is None else {name: value for name, value in values.items() if name not in names}


class StageBuilder:
    """
    Make the stages of a run.

    Args:
        config: the configuration of the run.
    """

    def __init__(self, config: SynthesisConfig):
        self.config = config
        self.folders = RunFolders(config.output)
        self.made: list[Stage] = []

    def all(self) -> list[Stage]:
        """Make all stages in order."""
        if self.config.backend == PROCEDURAL:
            self._add("write", [DrawRecords(self.config), FilterRecords(self._progress("write")), *self._write()])
        else:
            self._add_models()
        self.made.append(Stage("report", [MakeReport(self.config)], 1))
        return self.made

    def _add_models(self) -> None:
        config = self.config
        assert config.writer is not None and config.images is not None, "checked by SynthesisConfig"
        self.made.append(Stage(POOL, [PlanRecords(config)], 1))
        self._ask("describe", [self._read()], DescribeRollout, config.writer)
        self._ask("write_qa", [self._read()], WriteTurnsRollout, config.writer)
        # comes before images, which cost the most
        steps = [self._read(), FilterRecords(self._progress("filter"))]
        if config.judge is not None:
            self._ask("judge", steps, JudgeRollout, config.judge)
            steps = [self._read()]
        make = MakeImages(config.images, self.folders.images, self._progress("images"))
        self._add("images", [*steps, make, SaveStage(self.folders.stage("images"))])
        self._add("write", [*self._look(), *self._write()])

    def _look(self) -> list[PipelineStep]:
        """Make the steps that check images. An endpoint gets a stage of its own."""
        check = self.config.image_check
        if check is None:
            return [self._read()]
        if check.endpoint is None:
            return [self._read(), FusionImageCheck(check, self.folders.images, self._progress("look"))]
        self._ask("look", [self._read()], ImageJudgeRollout, check.endpoint, self.folders.images)
        return [self._read()]

    def _add(self, name: str, steps: list[PipelineStep]) -> None:
        self.made.append(Stage(name, steps, self.config.executor.tasks))

    def _progress(self, stage: str, resumes: bool = False) -> Progress:
        return Progress(self.folders.progress, f"{len(self.made)}-{stage}", resumes)

    def _read(self) -> ReadStage:
        return ReadStage(self.folders.stage(self.made[-1].name))

    def _ask(
        self, name: str, steps: list[PipelineStep], kind: type[RecordRollout], endpoint: EndpointSettings, *more: Path
    ) -> None:
        """Add a stage that ends with requests."""
        folder, checkpoints = self.folders.stage(name), self.folders.work / "checkpoints" / name
        rollout = kind(endpoint, self._progress(name, resumes=True), *more)
        self._add(name, [*steps, RequestStep(name, rollout, folder, checkpoints, self.config.chunk)])

    def _write(self) -> list[PipelineStep]:
        return [BalanceOptions(self.config.seed), WriteRecords(self.folders, self.config.format)]
