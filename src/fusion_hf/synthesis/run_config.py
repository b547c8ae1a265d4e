"""The YAML file of a synthesis run: what is made, by whom, where, and how it is spread over machines."""

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
PROCEDURAL = "procedural"  # the backend that draws everything, and the model of what it draws
DRAWN_LICENSE = "apache-2.0"  # this project's
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")  # as the Hub names them
SLURM_NEEDS = ("time", "partition")


@dataclass(frozen=True)
class CaptionPool:
    """
    Where captions come from.

    Attributes:
        source: File or folder of files, or for `hub` the data set's OWNER/NAME.
        kind: Format of the source.
        column: Column or key that holds the caption. Text files have none.
        split: Split of a data set of the Hub.
        limit: Largest number of captions that are read. Default: all.
        near_duplicates: Leave out captions that nearly repeat an earlier one.
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
    A language model that speaks the OpenAI protocol.

    Attributes:
        model: Name of the model at the endpoint, or what a server is started with.
        url: Address of a running server, for `endpoint` alone. An address without a path gets `/v1`.
        server: A running endpoint, or a server that each task starts.
        key_variable: Environment variable that holds the API key.
        structured: How the shape of an answer is asked for: by `response_format`, or in the prompt alone.
        temperature: Sampling temperature.
        max_tokens: Largest number of tokens of an answer.
        concurrency: Requests in flight of one task.
        tries: Attempts, each with a new seed, until an answer has the shape that was asked for.
        patience: How often a request that failed (429, 5xx, no connection) is sent again, with growing pauses.
        timeout: Seconds that one request may take.
        arguments: Further fields of each request.
        server_arguments: Further arguments of a server that is started.
        price_per_million_input: Price of a million prompt tokens, for the estimate.
        price_per_million_output: Price of a million answer tokens, for the estimate.
        tokens_per_second: Speed of all requests together, for the estimate.
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
            raise ValueError(f"url is {self.url!r} for server {self.server!r}; allowed: a url for `endpoint` alone.")
        if self.url is not None:
            check_url(self.url, "key_variable")


@dataclass(frozen=True)
class ImageSettings:
    """
    What makes images from descriptions.

    Attributes:
        kind: A diffusers pipeline in this process, or an OpenAI images endpoint.
        model: Folder or Hub repository of a text-to-image pipeline of diffusers, or the endpoint's model.
        url: Address of the endpoint, for `openai` alone.
        key_variable: Environment variable that holds the API key.
        width: Width of an image in pixels.
        height: Height of an image in pixels.
        steps: Denoising steps of the pipeline.
        guidance: Guidance scale of the pipeline.
        batch_size: Images that are made together. An image's bytes may depend on it.
        device: Device of the pipeline.
        dtype: Data type of the pipeline's weights.
        offload: Keep only the part of the pipeline that works on the GPU.
        arguments: Further arguments of the pipeline's call, or fields of the request.
        patience: How often a request that failed is sent again, with growing pauses.
        timeout: Seconds that one request may take.
        price_per_picture: Price of an image, for the estimate.
        seconds_per_picture: Seconds that one task takes for an image, for the estimate.
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
            raise ValueError(f"url is {self.url!r} for kind {self.kind!r}; allowed: a url for `openai` alone.")
        if self.url is not None:
            check_url(self.url, "key_variable")


@dataclass(frozen=True)
class ImageCheckSettings:
    """
    Who looks at an image with its answers: a vision-language endpoint, or a FUSION model in this process.

    Attributes:
        endpoint: A vision-language endpoint, with the keys of `writer`.
        fusion: Folder or Hub repository of a FUSION, or `nano`. Give it or `endpoint`.
        device: Device of the FUSION.
        dtype: Data type of the FUSION.
    """

    endpoint: EndpointSettings | None = None
    fusion: str | None = None
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if (self.endpoint is None) == (self.fusion is None):
            raise ValueError("it has endpoint and fusion, or neither; allowed: one of them.")


@dataclass(frozen=True)
class ExecutorSettings:
    """
    How a run is spread: datatrove's executors.

    Attributes:
        kind: Where tasks run.
        tasks: Parts of the run. Each writes its own shard. The number may not change between two starts of a run.
        workers: Tasks that run at the same time. -1 runs all.
        options: Further arguments of datatrove's `SlurmPipelineExecutor` or `RayPipelineExecutor`, for all stages.
        stages: The same for single stages by their name, such as `images: {gpus_per_task: 1}`.
    """

    kind: Literal["local", "slurm", "ray"] = "local"
    tasks: PositiveInt = 1
    workers: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.workers < 1 and self.workers != -1:
            raise ValueError(f"workers is {self.workers}; allowed: 1 or more, or -1 for all tasks at a time.")
        if self.kind == "local" and (self.options or self.stages):
            raise ValueError("options and stages are for kind slurm and ray.")
        if self.kind == "slurm" and (missing := [name for name in SLURM_NEEDS if name not in self.options]):
            raise ValueError(f"options has no {missing[0]}; Slurm needs {' and '.join(SLURM_NEEDS)}.")


@dataclass(frozen=True)
class SynthesisConfig:
    """
    A run.

    Attributes:
        output: Folder of the run. The finished data is in `output/data`.
        records: Number of records that are begun. Filters take some of them out.
        categories: Shares of the categories by name. Default: all, with the shares that their files give.
        backend: `models` asks the endpoints. `procedural` draws everything without a model.
        seed: Seed of the run.
        pool: Where captions come from. The backend `models` needs it.
        writer: The language model that writes descriptions, questions and answers. The backend `models` needs it.
        images: What makes the images. The backend `models` needs it.
        judge: A language model that scores texts. Default: none.
        image_check: A vision-language model that scores images. Default: none.
        executor: How the run is spread over processes or machines.
        format: Format of the finished shards.
        chunk: Records between two checkpoints of a task.
        license: License of the data card, an identifier of the Hub such as `cc-by-4.0`. Default: the license of this
            project for drawn records, whose templates they are made of. Otherwise none, since the license depends on
            captions and models.
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
            raise ValueError(f"records is {self.records}; allowed: up to {MOST_RECORDS}.")
        if self.license is not None and not LICENSE.fullmatch(self.license):
            raise ValueError(f"license is {short_name(repr(self.license))}; allowed: an identifier such as cc-by-4.0.")
        if self.backend == "models":
            for name in ("pool", "writer", "images"):
                if getattr(self, name) is None:
                    raise ValueError(f"it has no {name}, which the backend `models` needs.")
        known = load_categories()
        for name, share in (self.categories or {}).items():
            if name not in known:
                raise ValueError(f"categories has {short_name(repr(name))}; allowed: {', '.join(known)}.")
            if share <= 0:
                raise ValueError(f"categories.{name} is {share}; allowed: a share above 0.")

    @property
    def license_name(self) -> str | None:
        """The licence that the data card states; None if whoever publishes the data has to."""
        return DRAWN_LICENSE if self.license is None and self.backend == PROCEDURAL else self.license

    @property
    def shares(self) -> dict[str, float]:
        """Of the categories that are made; their sum is 1."""
        known = load_categories()
        shares = self.categories or {name: category.share for name, category in known.items()}
        return {name: share / sum(shares.values()) for name, share in shares.items()}


class RunFolders:
    """Where a run keeps what. `data` is the result; `work` can be removed when it is there."""

    def __init__(self, output: Path):
        self.data, self.work = output / "data", output / "work"
        self.images, self.progress = self.work / "pictures", self.work / "progress"

    def stage(self, name: str) -> Path:
        """Name the folder of the records as a stage leaves them."""
        return self.work / name

    def logs(self, stage: str) -> Path:
        """datatrove's own: logs, completed tasks, scripts for Slurm."""
        return self.work / "logs" / stage


def load_config(path: Path, overrides: Iterable[str] = ()) -> SynthesisConfig:
    """
    Args:
        path: a YAML file. A local `pool.source` and `output` in it are relative to the working directory.
        overrides: `key=value`, values as in YAML; a key of a section as `section.key`.

    Raises:
        InputError: for a file that is no config, an unknown key or a wrong value.
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
            raise InputError(f"{name} cannot be set: {section} is {short_name(repr(inner))}.")
        values = inner
    values[key] = value
