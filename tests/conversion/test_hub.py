"""Repositories as input and output, against a stand-in server on this machine."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.hub_server import COMMIT, REFUSED, HubServer

from fusion_hf.conversion import repositories as hub_module
from fusion_hf.conversion.model_files import ConversionError
from fusion_hf.hub import publishing

ROOT = Path(__file__).parents[2]
# Several commands in one process, since most of the time goes into importing torch.
DRIVER = """
import contextlib, io, json, sys
from fusion_hf.cli.convert import main
results = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    results.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    error: str


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def run(tmp_path, hub):
    """Runs commands in a process of its own: huggingface_hub reads its environment when it is imported."""

    def call(*commands: list[str]) -> list[Result]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
            "PYTHONPATH": str(ROOT / "src"),
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_TOKEN": "hf_test",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-c", DRIVER, json.dumps(commands)]
        finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
        return [Result(*result) for result in json.loads(finished.stdout.splitlines()[-1])]

    return call


def publish(hub: HubServer, folder: Path, name: str) -> None:
    hub.state.repositories[name] = {file.name: file.read_bytes() for file in folder.iterdir()}


def test_push(tmp_path, hub, run):
    write_checkpoint(tmp_path / "checkpoint", num_shards=2)
    arguments = ["--model", "checkpoint", "--vision-config", "vision_config.json", "--tokenizer", "none"]
    pushed, refused = run(
        [*arguments, "--output", "output", "--repo-id", "somebody/fusion", "--private"],
        [*arguments, "--output", "kept", "--repo-id", REFUSED],
    )
    assert pushed.status == 0 and COMMIT in pushed.out, pushed.error

    (commit,) = hub.state.commits
    assert commit["repository"] == "somebody/fusion" and "checkpoint" in commit["summary"]
    local = {file.name: file.read_bytes() for file in (tmp_path / "output").iterdir()}
    assert sorted(commit["files"]) == sorted(local)
    assert hub.state.repositories["somebody/fusion"] == local
    assert hub.state.private["somebody/fusion"]
    assert 'model_id = "somebody/fusion"' in local["README.md"].decode()

    assert refused.status == 2 and f"pushing it to {REFUSED} failed" in refused.error
    assert (tmp_path / "kept" / "model.safetensors").is_file()


def test_push_needs_a_login_before_any_work(monkeypatch):
    monkeypatch.setattr(publishing, "get_token", lambda: None)
    with pytest.raises(ConversionError, match="hf auth login"):
        hub_module.check_can_push("somebody/fusion")


def test_checkpoints_from_the_hub(tmp_path, hub, run):
    stored = write_checkpoint(tmp_path / "checkpoint", "llama", num_shards=3, hidden_size=256)
    publish(hub, tmp_path / "checkpoint", "authors/FUSION-Stage1.5")
    hub.state.repositories["authors/FUSION-Stage1.5"] |= {"original/params.json": b"{}", "optimizer.pt": b"x"}
    publish(hub, tmp_path / "checkpoint", "authors/headers")
    publish(hub, tmp_path / "checkpoint", "authors/broken")
    hub.state.repositories["authors/headers"]["marker.safetensors"] = b"never read"
    del hub.state.repositories["authors/broken"]["model-00002-of-00003.safetensors"]
    sizes = ["--vision-config", "vision_config.json"]
    headers, broken, unknown = run(
        ["--model", "authors/headers", *sizes, "--dry-run"],
        ["--model", "authors/broken", *sizes, "--dry-run"],
        ["--model", "authors/nothing", *sizes, "--dry-run"],
    )
    assert headers.status == 0 and "The checkpoint fits" in headers.out, headers.error
    sent = sum(size for path, size in hub.state.downloads.items() if path.endswith(".safetensors"))
    assert sent < sum(tensor.nbytes for tensor in stored.values()) / 2
    for result, named in ((broken, "authors/broken"), (unknown, "authors/nothing")):
        assert result.status == 2 and named in result.error
        assert result.error.startswith("error: ") and len(result.error.splitlines()) == 1

    (converted,) = run(["--model", "authors/FUSION-Stage1.5", *sizes, "--output", "output"])
    assert converted.status == 0, converted.error
    card = (tmp_path / "output" / "README.md").read_text()
    assert f"`authors/FUSION-Stage1.5`, revision `{COMMIT}`" in card
    assert not {"original/params.json", "optimizer.pt"} & set(hub.state.downloads)
