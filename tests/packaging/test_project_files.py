"""Versions, workflows and links agree with the package."""

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import fusion_hf

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PYTHON = "Programming Language :: Python :: 3."
REPOSITORY = "https://github.com/someone/fusion_hf"


@pytest.fixture(scope="module")
def metadata() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def test_one_version(metadata: configparser.ConfigParser):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert metadata["metadata"]["version"] == fusion_hf.__version__ == citation["version"]
    assert f"## [{fusion_hf.__version__}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_workflows_run_the_supported_versions_of_python(metadata: configparser.ConfigParser):
    supported = re.findall(rf"{re.escape(PYTHON)}(\d+)", metadata["metadata"]["classifiers"])
    tests = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text("utf-8"))
    assert tests["jobs"]["fast"]["strategy"]["matrix"]["python"] == [f"3.{minor}" for minor in supported]


def test_workflows_name_targets_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    tests = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text("utf-8"))
    matrix = tests["jobs"]["fast"]["strategy"]["matrix"]
    named = {*matrix["target"], *(extra["target"] for extra in matrix["include"])}
    for workflow in WORKFLOWS:
        named |= set(re.findall(r"run: make ([a-z-]+)", workflow.read_text("utf-8")))
    assert len(named) >= 3
    assert named <= targets


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_may_only_read(workflow: Path):
    content = yaml.safe_load(workflow.read_text("utf-8"))
    assert content["permissions"] == {"contents": "read"}
    allowed = {"publish": {"id-token": "write"}}
    for name, job in content["jobs"].items():
        assert job.get("permissions") == allowed.get(name)
        assert job["runs-on"].startswith("ubuntu-")


def test_absolute_links(tmp_path: Path):
    """Those of the real README all lead to files of the repository, and none is relative afterwards."""
    readme = tmp_path / "README.md"
    text = (ROOT / "README.md").read_text("utf-8")
    others = "[arXiv](https://arxiv.org/abs/1) [here](#use)"
    readme.write_text(f"{text}\n[bounds](docs/serving.md#security) {others}\n", "utf-8")
    script = ROOT / ".ci/absolute_links.py"
    subprocess.run([sys.executable, script, readme, REPOSITORY, "v1"], check=True)
    changed = readme.read_text("utf-8")
    assert f"[bounds]({REPOSITORY}/blob/v1/docs/serving.md#security) {others}" in changed
    assert f"{REPOSITORY}/raw/v1/docs/assets/architecture.svg" in changed
    links = re.findall(r"(?:\]\(|src=\")([^)\"\s]+)", changed)
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    paths = {link.split("/v1/")[1].partition("#")[0] for link in links if link.startswith(REPOSITORY)}
    assert len(paths) > 10
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
