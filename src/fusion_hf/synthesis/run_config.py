"""The configuration of a synthesis run: what is made, by which models, where, and on how many machines."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fusion_hf.common.endpoints import check_url
from fusion_hf.common.errors import InputError, short_name
from fusion_hf.common.yaml_config import PositiveFloat, PositiveInt, make_dataclass, parse_override, read_yaml_keys
from fusion_hf.synthesis.category import load_categories

MOST_RECORDS = 10**9
PROCEDURAL = "procedural"  # the backend that draws everything, and the name of its model in records
DRAWN_LICENSE = "apache-2.0"  # the license of this project
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")  # identifiers of the Hub
SLURM_NEEDS = ("time", "partition")


@dataclass(frozen=True)
class CaptionPool:
    """
    The source of captions.

    Attributes:
        source: A file or a folder of files, or OWNER/NAME of a data set for `hub`.
        kind: The format of the source.
        column: The column or field that holds the caption. Text files have none.
        split: The split of a Hub data set.
        limit: The maximum number of captions to read. None reads all.
        near_duplicates: Whether to leave out captions that nearly repeat an earlier one.
    """

    source: str
    kind: Literal["text", "jsonl", "parquet", "hub"]
    column: str = "caption"
    split: str = "train"
    limit: int | None = None
    near_duplicates: bool = True


@dataclass(frozen=True)
class EndpointSettings:
    """
    A language model on a server that is compatible with OpenAI's API.

    Attributes:
        model: The name of the model on the server.
        url: The address of a running server. `/v1` is added if it has no path. Leave it out for `vllm` and `sglang`,
            which are started by the run.
        server: `endpoint` for a running server, or the server to start.
        key_variable: The environment variable that holds the API key.
        structured: How the format of an answer is requested: by the `response_format` `json_schema` or `json_object`,
            or only in the prompt.
        temperature: The sampling temperature.
        max_tokens: The maximum number of tokens of an answer.
        concurrency: The number of concurrent requests of a task.
        tries: The maximum number of requests, each with a new seed, until an answer has the requested format.
        patience: How often a failed request (429, 5xx, no connection) is repeated, with growing pauses.
        timeout: The timeout of a request in seconds.
        arguments: Further fields of each request.
        server_arguments: Arguments of a server that is started.
        price_per_million_input: The price of a million input tokens, for the estimate.
        price_per_million_output: The price of a million output tokens, for the estimate.
        tokens_per_second: The output tokens per second of all requests together, for the estimate.
    """

    model: str
    url: str | None = None
    server: Literal["endpoint", "vllm", "sglang"] = "endpoint"
    key_variable: str | None = None
    structured: Literal["json_schema", "json_object", "prompt"] = "json_schema"
    temperature: float = 0.7
    max_tokens: PositiveInt = 1024
    concurrency: PositiveInt = 64
    tries: PositiveInt = 3
    patience: PositiveInt = 8
    timeout: PositiveFloat = 300.0
    arguments: dict[str, Any] = field(default_factory=dict)
    server_arguments: dict[str, Any] = field(default_factory=dict)
    price_per_million_input: float | None = None
    price_per_million_output: float | None = None
    tokens_per_second: float | None = None

    def __post_init__(self) -> None:
        if (self.url is None) != (self.server != "endpoint"):
            raise ValueError(
                f"`url` must be given for the server 'endpoint' and for no other, got {self.url!r} for "
                f"{self.server!r}."
            )
        if self.url is not None:
            check_url(self.url, "key_variable")


@dataclass(frozen=True)
class ImageSettings:
    """
    The generator of images.

    Attributes:
        kind: `diffusers` for a pipeline in this process, or `openai` for an endpoint with OpenAI's images API.
        model: A folder or Hub repository of a text-to-image pipeline of diffusers, or the name of the model on the
            endpoint.
        url: The address of the endpoint.
        key_variable: The environment variable that holds the API key.
        width: The width of an image in pixels.
        height: The height of an image in pixels.
        steps: The number of denoising steps.
        guidance: The guidance scale.
        batch_size: The number of images per batch. The bytes of an image may depend on it.
        device: The device of the pipeline.
        dtype: The dtype of the pipeline.
        offload: Whether to keep only the active part of the pipeline on the GPU.
        arguments: Further arguments of the pipeline's call, or fields of the request.
        patience: How often a failed request (429, 5xx, no connection) is repeated, with growing pauses.
        timeout: The timeout of a request in seconds.
        price_per_picture: The price of an image, for the estimate.
        seconds_per_picture: The time per image of one task in seconds, for the estimate.
    """

    kind: Literal["diffusers", "openai"]
    model: str
    url: str | None = None
    key_variable: str | None = None
    width: PositiveInt = 1024
    height: PositiveInt = 1024
    steps: PositiveInt = 28
    guidance: float = 3.5
    batch_size: PositiveInt = 4
    device: str = "auto"
    dtype: str = "auto"
    offload: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)
    patience: PositiveInt = 8
    timeout: PositiveFloat = 300.0
    price_per_picture: float | None = None
    seconds_per_picture: float | None = None

    def __post_init__(self) -> None:
        if (self.url is None) != (self.kind == "diffusers"):
            raise ValueError(
                f"`url` must be given for the kind 'openai' and for no other, got {self.url!r} for {self.kind!r}."
            )
        if self.url is not None:
            check_url(self.url, "key_variable")


@dataclass(frozen=True)
class ImageCheckSettings:
    """
    The model that checks an image and its answers. Set either `endpoint` or `fusion`.

    Attributes:
        endpoint: A vision-language model on a server.
        fusion: A FUSION model in this process: a folder, a Hub repository, or `nano`.
        device: The device of the FUSION model.
        dtype: The dtype of the FUSION model.
    """

    endpoint: EndpointSettings | None = None
    fusion: str | None = None
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if (self.endpoint is None) == (self.fusion is None):
            raise ValueError("exactly one of `endpoint` and `fusion` must be given.")


@dataclass(frozen=True)
class ExecutorSettings:
    """
    How a run is distributed by datatrove's executors.

    Attributes:
        kind: The executor.
        tasks: The number of parts of the run. Each one writes its own shard. It must be the same in every start of a
            run.
        workers: The number of concurrent tasks. -1 runs all of them.
        options: Further arguments of datatrove's `SlurmPipelineExecutor` or `RayPipelineExecutor` for all stages.
        stages: Further arguments of single stages by name, such as `images: {gpus_per_task: 1}`.
    """

    kind: Literal["local", "slurm", "ray"] = "local"
    tasks: PositiveInt = 1
    workers: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.workers < 1 and self.workers != -1:
            raise ValueError(f"`workers` must be 1 or more, or -1 for all tasks, got {self.workers}.")
        if self.kind == "local" and (self.options or self.stages):
            raise ValueError("`options` and `stages` must be empty unless `kind` is slurm or ray.")
        if self.kind == "slurm" and (missing := [name for name in SLURM_NEEDS if name not in self.options]):
            raise ValueError(f"`options` must have {' and '.join(SLURM_NEEDS)} for Slurm, but lacks {missing[0]}.")


@dataclass(frozen=True)
class SynthesisConfig:
    """
    The configuration of a run.

    Attributes:
        output: The folder of the run. The finished data is in `output/data`.
        records: The number of records to start with. Filters reject some of them.
        categories: The shares of categories by name. None uses all categories, with the shares in their files.
        backend: `models` asks the endpoints. `procedural` draws everything without a model.
        seed: The seed of the run.
        pool: The source of captions.
        writer: The language model that writes descriptions, questions and answers.
        images: The generator of images.
        judge: The language model that scores records. None skips this check.
        image_check: The vision-language model that scores records with their images. None skips this check.
        executor: How the run is distributed.
        format: The format of the shards.
        chunk: The number of records between two checkpoints of a task.
        license: The license in the data card, an identifier of the Hub such as `cc-by-4.0`. Drawn records default to
            the license of this project, whose templates they are made from. Other data has no default, since the
            license depends on captions and models.
    """

    output: Path
    records: PositiveInt
    categories: dict[str, float] | None = None
    backend: Literal["models", "procedural"] = "models"
    seed: int = 0
    pool: CaptionPool | None = None
    writer: EndpointSettings | None = None
    images: ImageSettings | None = None
    judge: EndpointSettings | None = None
    image_check: ImageCheckSettings | None = None
    executor: ExecutorSettings = field(default_factory=ExecutorSettings)
    format: Literal["tar", "parquet"] = "tar"
    chunk: PositiveInt = 500
    license: str | None = None

    def __post_init__(self) -> None:
        if self.records > MOST_RECORDS:
            raise ValueError(f"`records` must be at most {MOST_RECORDS}, got {self.records}.")
        if self.license is not None and not LICENSE.fullmatch(self.license):
            raise ValueError(
                f"`license` must be an identifier such as cc-by-4.0, got {short_name(repr(self.license))}."
            )
        if self.backend == "models":
            for name in ("pool", "writer", "images"):
                if getattr(self, name) is None:
                    raise ValueError(f"`{name}` must be given for the backend `models`.")
        known = load_categories()
        for name, share in (self.categories or {}).items():
            if name not in known:
                raise ValueError(
                    f"`categories` must contain only names from {', '.join(known)}, got {short_name(repr(name))}."
                )
            if share <= 0:
                raise ValueError(f"`categories.{name}` must be above 0, got {share}.")

    @property
    def license_name(self) -> str | None:
        """The license in the data card. None if you must choose it before you publish the data."""
        return DRAWN_LICENSE if self.license is None and self.backend == PROCEDURAL else self.license

    @property
    def shares(self) -> dict[str, float]:
        """The shares of the categories, which sum to 1."""
        known = load_categories()
        shares = self.categories or {name: category.share for name, category in known.items()}
        return {name: share / sum(shares.values()) for name, share in shares.items()}


class RunFolders:
    """
    The folders of a run. `data` is the result. You can remove `work` when the run is finished.

    Args:
        output: The folder of the run.
    """

    def __init__(self, output: Path):
        self.data, self.work = output / "data", output / "work"
        self.images, self.progress = self.work / "pictures", self.work / "progress"

    def stage(self, name: str) -> Path:
        """
        Return the folder of the records after a stage.

        Args:
            name: the name of the stage.
        """
        return self.work / name

    def logs(self, stage: str) -> Path:
        """
        Return datatrove's folder of a stage, with logs, completed tasks and scripts for Slurm.

        Args:
            stage: the name of the stage.
        """
        return self.work / "logs" / stage


def load_config(path: Path, overrides: Iterable[str] = ()) -> SynthesisConfig:
    """
    Read the configuration of a run.

    Args:
        path: A YAML file. Local paths in `pool.source` and `output` are relative to the working directory.
        overrides: Texts of the form `key=value` with values in YAML. Keys of a section are written `section.key`.

    Raises:
        InputError: if the file is not a configuration, a key is unknown, or a value is invalid.
    """
    values = read_yaml_keys(path, "The config")
    for text in overrides:
        _override(values, *parse_override(text, "executor.tasks=8"))
    return make_dataclass(SynthesisConfig, values, path.name)


def _override(values: dict[str, Any], name: str, value: Any) -> None:
    *sections, key = name.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise InputError(f"`{section}` must be a section to set {name}, got {short_name(repr(inner))}.")
        values = inner
    values[key] = value
