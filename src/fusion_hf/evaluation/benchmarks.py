"""The benchmarks of FUSION's published table, their names in lmms-eval, and the columns of their data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fusion_hf.common.errors import InputError
from fusion_hf.common.yaml_config import make_dataclass, read_yaml_keys

TABLE = Path(__file__).with_name("benchmarks.yaml")
AUTHORS, LMMS_EVAL = "authors", "lmms-eval"  # the choices of prompts
# Kinds of columns. A kind that ends with OPTIONAL may be empty, and EITHER separates alternatives.
TEXT, TEXTS, INTEGER, NUMBER, RECORD, IMAGE, IMAGES = "text", "texts", "integer", "number", "record", "image", "images"
OPTIONAL, EITHER = "?", "|"
PERCENT = 100.0  # converts a share to percent

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
    A language model that the scoring of a benchmark asks.

    Attributes:
        model: the model that is asked if MODEL_VERSION is not set, or always if `fixed`.
        fixed: whether MODEL_VERSION is ignored.
        takes_endpoint: whether the scoring reads OPENAI_API_URL as the full address instead of the base of
            `/chat/completions`.
        api_types: the values of API_TYPE that the scoring supports.
    """

    model: str
    fixed: bool = False
    takes_endpoint: bool = False
    api_types: tuple[str, ...] = SERVERS

    def asked(self, environment: Mapping[str, str]) -> str:
        """
        Return the name of the model that is asked.

        Args:
            environment: the environment variables.
        """
        return self.model if self.fixed else environment.get("MODEL_VERSION", self.model)

    def lacks(self, environment: Mapping[str, str]) -> list[str]:
        """
        List what prevents the judge from being asked.

        Args:
            environment: the environment variables.

        Returns:
            The reasons, empty if there are none.
        """
        api_type = environment.get(API_TYPE, OPENAI)
        if api_type not in self.api_types:
            return [f"{API_TYPE} must be one of {', '.join(self.api_types)}, got {api_type!r}"]
        return [f"{name} is not set" for name in JUDGE_VARIABLES[api_type] if not environment.get(name)]


@dataclass(frozen=True)
class Benchmark:
    """
    A published benchmark and its task in lmms-eval.

    Attributes:
        name: the name in this package, and of its folder of local data.
        metrics: lmms-eval's key `metric,filter` for each column. A filter is applied to answers before scoring.
        splits: the splits that are read.
        lmms_task: the name of lmms-eval's task, or None if it has none.
        authors_task: the name of our variant with the authors' prompt, or None if lmms-eval has the same prompt.
        columns: the columns of the published table.
        scale: the factor from a metric to the unit of the table.
        dataset: the data set on the Hub.
        config: the configuration of the data set.
        schema: the columns that lmms-eval's functions read, and their kinds.
        judge: the language model that the scoring asks, or None.
        source: lmms-eval's YAML file in its folder `tasks`.
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
        """Whether a server scores the benchmark, so that its answers are written to a file; see `submissions`."""
        return not self.metrics


def _read_table(section: str) -> dict[str, Benchmark]:
    """Read the benchmarks of a section by name, in the order of the file."""
    entries = read_yaml_keys(TABLE, "The table of benchmarks")[section]
    return {
        name: make_dataclass(Benchmark, entry, f"{TABLE.name}: {name}", name=name) for name, entry in entries.items()
    }


BENCHMARKS = _read_table("benchmarks")
VARIANTS = _read_table("variants")


def find_benchmark(name: str) -> Benchmark:
    """
    Return the benchmark called `name`.

    Args:
        name: the name.

    Raises:
        InputError: if there is no such benchmark.
    """
    known = {**BENCHMARKS, **VARIANTS}
    if name not in known:
        raise InputError(f"`tasks` must contain only names from {', '.join(known)}, got {name!r}.")
    return known[name]
