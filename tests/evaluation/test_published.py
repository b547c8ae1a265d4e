"""`published_results.yaml`: the table of FUSION's authors."""

import yaml

from fusion_hf.evaluation.benchmarks import BENCHMARKS
from fusion_hf.hub.family import PUBLISHED_FILE

TABLE = yaml.safe_load(PUBLISHED_FILE.read_text(encoding="utf-8"))


def test_columns_are_those_of_the_benchmarks_in_their_order() -> None:
    assert TABLE["columns"] == [column for benchmark in BENCHMARKS.values() for column in benchmark.columns]


def test_every_model_has_every_column() -> None:
    names = [model["name"] for model in TABLE["models"]]
    assert len(names) == len(set(names)) == 19
    assert {f"FUSION{variant} {size}" for variant in ("", "-X", "-L") for size in ("3B", "8B")} <= set(names)
    for model in TABLE["models"]:
        assert len(model["values"]) == len(TABLE["columns"]), model["name"]
        assert all(value is None or value > 0 for value in model["values"]), model["name"]
