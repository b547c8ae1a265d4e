"""This package's own clients of vLLM's server, by their commands: benchmarks, and the data engine's image check."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.evaluation.runs import LIMIT, by_question, figures, finish, record_of
from tests.helpers.openai_server import Scripted, serve
from tests.helpers.serving import MODEL, Server, run_server
from tests.synthesis.author import make_captions, write
from tests.synthesis.runs import rejected

pytestmark = pytest.mark.vllm
ENGINE = ("--engine", "vllm", "--device", "auto", "--dtype", "float32")
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
RECORDS, ANSWER_TOKENS, SECONDS = 6, 256, 300


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with run_server(*ENGINE, **SETTINGS) as running:
        yield running


def test_benchmarks_answer_as_in_one_process(server: Server, tmp_path: Path):
    here, there = tmp_path / "here", tmp_path / "there"
    finish(here, "--batch-size", 16, "--dtype", "float32")
    record = finish(there, "--url", f"{server.url}/v1", "--concurrency", 8)
    assert by_question(there) == by_question(here)
    assert len(by_question(there)) > LIMIT // 2
    assert figures(record) == figures(record_of(here))


@pytest.fixture
def writer() -> Iterator[Scripted]:
    """Writes questions and draws images."""
    with serve(Scripted(write)) as script:
        yield script


def synthesize(folder: Path, writer: Scripted, image_check: dict[str, Any]) -> list[dict[str, Any]]:
    """Why records were rejected, by a run of the command."""
    folder.mkdir()
    pool = folder / "pool.txt"
    pool.write_text("\n".join(make_captions(RECORDS)))
    config = {
        "output": str(folder / "run"),
        "records": RECORDS,
        "categories": {"SynthColor": 1},
        "pool": {"source": str(pool), "kind": "text", "near_duplicates": False},
        "writer": {"model": "scripted", "url": writer.url},
        "images": {"kind": "openai", "model": "painter", "url": writer.url, "width": 64, "height": 64},
        "image_check": image_check,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    subprocess.run(
        [sys.executable, "-m", "fusion_hf", "synthesize", str(path)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=SECONDS,
    )
    return [record["rejection"] for record in rejected(folder / "run" / "data")]


def test_the_image_check_asks_it(server: Server, writer: Scripted, tmp_path: Path):
    """fusion-nano is no good judge: the scores that it gives stand in the rejections."""
    endpoint = {"model": MODEL, "url": server.url, "temperature": 0, "max_tokens": ANSWER_TOKENS}
    there = synthesize(tmp_path / "there", writer, {"endpoint": endpoint})
    here = synthesize(tmp_path / "here", writer, {"fusion": "nano", "device": "cpu", "dtype": "float32"})
    assert there == here
    assert {reason["step"] for reason in there} == {"image_check"}
    assert not any(reason["reason"].startswith("refused") for reason in there), there
