"""`fusion-hf synthesize`: what is missing is told before the run begins, and the estimate is of the run."""

import pickle
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from datatrove.pipeline.base import PipelineStep
from tests.helpers.light_runs import run_light

from fusion_hf.common.errors import InputError
from fusion_hf.synthesis.category import load_categories
from fusion_hf.synthesis.estimate import make_estimate
from fusion_hf.synthesis.executors import Stage, make_executors
from fusion_hf.synthesis.pool import spread_categories
from fusion_hf.synthesis.run_config import ExecutorSettings, RunFolders, SynthesisConfig

MODELS = """
output: made
records: 6
pool: {source: captions.txt, kind: text}
writer: {model: m, url: "http://127.0.0.1:9"}
images: {kind: openai, model: m, url: "http://127.0.0.1:9"}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mix.yaml").write_text(MODELS)
    return tmp_path


def test_missing_captions(folder: Path):
    (folder / "empty.txt").touch()
    (folder / "empty").mkdir()
    (folder / "text.parquet").write_text("no Parquet")
    overrides = (
        ((), "must be an existing file or folder, got captions.txt"),
        (("pool.source=empty.txt",), "must contain at least one caption, got none in empty.txt"),
        (("pool.source=empty",), "must be a folder with files of .txt, got empty"),
        (("pool.source=text.parquet", "pool.kind=parquet"), "must be a Parquet file, got text.parquet"),
    )
    results = run_light(folder, [["synthesize", "mix.yaml", *given] for given, _ in overrides])
    for result, (_, part) in zip(results, overrides, strict=True):
        estimate, error = result.error.splitlines()[:-1], result.error.splitlines()[-1]
        assert result.status == 2 and error.startswith("error: `pool.source`") and part in error, result
        assert error.count(".txt") <= 1 and estimate[0].startswith("records: 6 ")
    assert not (folder / "made").exists()


class _Missing(PipelineStep):
    """A step whose captions are gone."""

    name, type = "Missing", "Reader"

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> Iterator[None]:
        raise InputError("pool: gone")
        yield


def test_wrong_input_stays_wrong_input_in_a_task(tmp_path: Path):
    stage = Stage("pool", [_Missing()], 1)
    (executor,) = make_executors(ExecutorSettings(), [stage], RunFolders(tmp_path))
    with pytest.raises(InputError, match=r"^pool: gone$"):
        executor.run()
    assert str(pickle.loads(pickle.dumps(InputError("pool: gone")))) == "pool: gone"  # noqa: S301 (as between tasks)


@pytest.mark.parametrize("records", [1, 7, 59, 60, 61, 1000])
def test_estimate_is_of_as_many_records_as_the_run(records: int):
    config = SynthesisConfig(Path("made"), records, backend="procedural")
    estimated = make_estimate(config).records
    made = Counter(islice(spread_categories(config.shares), records))
    assert sum(estimated.values()) == records
    assert all(abs(estimated[name] - made[name]) <= 1 for name in load_categories())
