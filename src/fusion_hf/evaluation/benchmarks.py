"""The benchmarks of FUSION's published table, what lmms-eval calls them, and what their data hold."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fusion_hf.common.errors import InputError
from fusion_hf.common.yaml_config import make_dataclass, read_yaml_keys

TABLE = Path(__file__).with_name("benchmarks.yaml")
AUTHORS, LMMS_EVAL = "authors", "lmms-eval"  # whose prompts
# Kinds of columns; one that ends with OPTIONAL may be empty, and EITHER is between two that are both allowed.
TEXT, TEXTS, INTEGER, NUMBER, RECORD, IMAGE, IMAGES = "text", "texts", "integer", "number", "record", "image", "images"
OPTIONAL, EITHER = "?", "|"
PERCENT = 100.0  # of a share

API_TYPE, OPENAI, AZURE = "API_TYPE", "openai", "azure"
JUDGE_VARIABLES: Mapping[str, tuple[str, ...]] = {
    OPENAI: ("OPENAI_API_KEY",),
    AZURE: ("AZURE_API_KEY", "AZURE_ENDPOINT"),
    "async_openai": ("OPENAI_API_KEY",),
    "async_azure": ("AZURE_API_KEY", "AZURE_ENDPOINT"),
    "bedrock": ("AWS_BEARER_TOKEN_BEDROCK",),
    "local": ("LLM_JUDGE_URL",),
}
SERVERS = tuple(JUDGE_VARIABLES)


@dataclass(frozen=True)
class BenchmarkJudge:
    """
    A language model that a benchmark's scoring asks.

    `model` is what is asked where MODEL_VERSION is not set, or always if `fixed`. `takes_endpoint`: the benchmark's
    scoring reads OPENAI_API_URL as the whole address, not as the base that `/chat/completions` is put behind.
    `api_types` are the values of API_TYPE that it knows.
    """

    model: str
    fixed: bool = False
    takes_endpoint: bool = False
    api_types: tuple[str, ...] = SERVERS

    def asked(self, environment: Mapping[str, str]) -> str:
        """Name the model that is asked in an environment."""
        return self.model if self.fixed else environment.get("MODEL_VERSION", self.model)

    def lacks(self, environment: Mapping[str, str]) -> list[str]:
        """Say what of the environment keeps the judge from being asked; empty if nothing does."""
        api_type = environment.get(API_TYPE, OPENAI)
        if api_type not in self.api_types:
            return [f"{API_TYPE} is {api_type!r}; allowed: {', '.join(self.api_types)}"]
        return [f"{name} is not set" for name in JUDGE_VARIABLES[api_type] if not environment.get(name)]


@dataclass(frozen=True)
class Benchmark:
    """
    A benchmark as it is published, and what lmms-eval calls it.

    Args:
        name: ours, and that of its folder of local data.
        lmms_task: lmms-eval's, or None if it has none.
        authors_task: of our variant with the authors' prompt, or None if their prompt is lmms-eval's.
        columns: of the published table.
        metrics: lmms-eval's key `metric,filter` for each column; the filter is what is done to answers before scoring.
        scale: what a metric is multiplied with for the table's unit.
        dataset, config, splits: of the Hub; only these splits are read.
        schema: the columns that lmms-eval's functions read, and their kinds.
        judge: the language model that scoring asks, or None.
        source: lmms-eval's YAML, in its folder `tasks`.
    """

    name: str
    metrics: tuple[str, ...]
    splits: tuple[str, ...]
    lmms_task: str | None = None
    authors_task: str | None = None
    columns: tuple[str, ...] = ()
    scale: float = PERCENT
    dataset: str | None = None
    config: str | None = None
    schema: dict[str, str] = field(default_factory=dict)
    judge: BenchmarkJudge | None = None
    source: str | None = None

    @property
    def is_submitted(self) -> bool:
        """Whether a server scores it: it is answered and written down, see `submissions`."""
        return not self.metrics


def _read_table(section: str) -> dict[str, Benchmark]:
    """By name, in the order of the file."""
    entries = read_yaml_keys(TABLE, "The table of benchmarks")[section]
    return {
        name: make_dataclass(Benchmark, entry, f"{TABLE.name}: {name}", name=name) for name, entry in entries.items()
    }


BENCHMARKS = _read_table("benchmarks")
VARIANTS = _read_table("variants")


def find_benchmark(name: str) -> Benchmark:
    """
    Raises:
        InputError: if there is none of this name.
    """
    known = {**BENCHMARKS, **VARIANTS}
    if name not in known:
        raise InputError(f"tasks has {name!r}; allowed: {', '.join(known)}.")
    return known[name]
