"""`fusion-hf push`: what is checked, what is sent, and that a failure leaves nothing half-published."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.helpers.hub_server import COMMIT, REFUSED, HubServer

from fusion_hf import __version__
from fusion_hf.common.errors import InputError
from fusion_hf.hub import publishing
from fusion_hf.hub.parity import HEADING, PARITY, card_with_parity, digest_file
from fusion_hf.hub.publishing import check_files

REPOSITORY = "somebody/fusion"
ROOT = Path(__file__).parents[2]
SECONDS = 300  # a hung process fails its test
Push = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def folder(nano: Path, tmp_path: Path) -> Path:
    """A copy of the bundled model, with what git and huggingface_hub leave in a folder."""
    copy = tmp_path / "model"
    shutil.copytree(nano, copy)
    for name in (".git", ".cache"):
        (copy / name).mkdir()
        (copy / name / "secret.pkl").touch()
    return copy


@pytest.fixture
def push(hub: HubServer, tmp_path: Path) -> Push:
    """Runs the command in a process of its own: huggingface_hub reads its environment when it is imported."""

    def call(
        model: Path, *options: str, repository: str = REPOSITORY, **variables: str
    ) -> subprocess.CompletedProcess:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
            "PYTHONPATH": str(ROOT / "src"),
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_TOKEN": "hf_test",
        }
        command = [sys.executable, "-m", "fusion_hf", "push", "--model", str(model), "--repo-id", repository, *options]
        environment = {name: value for name, value in (environment | variables).items() if value}
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=300
        )

    return call


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of other checks: the one that starts a process is left out."""
    monkeypatch.setattr(publishing, "check_alone", lambda folder: None)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def failed(result: subprocess.CompletedProcess[str], *messages: str) -> None:
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert all(message in result.stderr for message in messages), result.stderr


def test_one_commit_and_a_tag(hub: HubServer, folder: Path, push: Push):
    result = push(folder, "--private", "--tag", "v2.0")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{hub.url}/{REPOSITORY}/tree/v2.0\n"
    (commit,) = hub.state.commits
    assert commit["repository"] == REPOSITORY and commit["summary"] == "Upload model (v2.0)"
    assert sorted(commit["files"]) == sorted(files_of(folder))
    assert hub.state.repositories[REPOSITORY] == files_of(folder)
    assert hub.state.private[REPOSITORY]
    assert hub.state.tags == {REPOSITORY: {"v2.0": COMMIT}}


@pytest.mark.slow
def test_dry_run_sends_nothing(hub: HubServer, folder: Path, push: Push):
    result = push(folder, "--dry-run", HF_TOKEN="")
    assert (result.returncode, result.stderr) == (0, "")
    *lines, total = result.stdout.splitlines()
    sizes = {name: int(size.replace(",", "")) for size, name in map(str.split, lines)}
    assert sizes == {name: len(content) for name, content in files_of(folder).items()}
    assert total == f"{sum(sizes.values()):,} bytes would be sent to {REPOSITORY}"
    assert hub.state.requests == [] and hub.state.repositories == {}


@pytest.mark.slow
def test_a_second_version(hub: HubServer, folder: Path, push: Push):
    """The same tag is refused before anything is sent; another one, and none, is a commit of its own."""
    assert push(folder, "--tag", "v1").returncode == 0
    before = list(hub.state.requests)
    failed(push(folder, "--tag", "v1"), "--tag", "v1", REPOSITORY)
    assert hub.state.requests == before
    failed(push(folder, "--private", "--tag", "v3"), "--private", "is public")
    assert push(folder, "--tag", "v3").returncode == 0
    assert len(hub.state.commits) == 2 and set(hub.state.tags[REPOSITORY]) == {"v1", "v3"}
    result = push(folder)
    assert (result.returncode, result.stdout) == (0, f"{hub.url}/{REPOSITORY}/commit/{COMMIT}\n")
    assert len(hub.state.commits) == 3 and set(hub.state.tags[REPOSITORY]) == {"v1", "v3"}


@pytest.mark.slow
@pytest.mark.parametrize("part", ["preupload", "/put/", "/commit/"])
def test_a_failure_half_way_leaves_nothing(hub: HubServer, folder: Path, push: Push, part: str):
    hub.state.fails = {part: 400}
    failed(push(folder), f"{REPOSITORY} is as it was")
    assert hub.state.repositories == {} and hub.state.commits == [] and hub.state.tags == {}

    hub.state.repositories[REPOSITORY] = {"README.md": b"old"}
    failed(push(folder), f"{REPOSITORY} is as it was")
    assert hub.state.repositories == {REPOSITORY: {"README.md": b"old"}} and hub.state.tags == {}


@pytest.mark.slow
def test_a_server_error_leaves_nothing(hub: HubServer, folder: Path, push: Push):
    hub.state.fails = {"/commit/": 500}
    failed(push(folder), f"{REPOSITORY} is as it was", "500")
    assert hub.state.repositories == {} and hub.state.tags == {}


@pytest.mark.slow
def test_what_could_not_be_removed_is_named(hub: HubServer, folder: Path, push: Push):
    hub.state.fails = {"/commit/": 400, "/repos/delete": 403}
    failed(push(folder), f"{REPOSITORY} is left empty")
    assert hub.state.repositories == {REPOSITORY: {}}


@pytest.mark.slow
def test_a_tag_that_fails_can_be_made_later(hub: HubServer, folder: Path, push: Push):
    hub.state.fails = {"/tag/": 400}
    failed(push(folder, "--tag", "v1"), "tag v1 could not be made", f"{hub.url}/{REPOSITORY}")
    hub.state.fails = {}
    assert push(folder, "--tag", "v1").returncode == 0
    assert hub.state.repositories[REPOSITORY] == files_of(folder)
    assert set(hub.state.tags[REPOSITORY]) == {"v1"}


@pytest.mark.slow
def test_the_hub_refuses(hub: HubServer, folder: Path, push: Push):
    hub.state.fails = {"validate-yaml": 400}
    failed(push(folder), f"{REPOSITORY} is as it was", "Invalid metadata in README.md")
    assert not [request for request in hub.state.requests if "PUT" in request]
    assert hub.state.repositories == {}
    hub.state.fails, hub.state.requests = {}, []
    failed(push(folder, repository=REFUSED), f"{REFUSED} is as it was")
    assert not [request for request in hub.state.requests if "DELETE" in request]
    assert hub.state.repositories == {} and hub.state.commits == []


@pytest.mark.slow
def test_without_a_token(folder: Path, push: Push, hub: HubServer):
    failed(push(folder, HF_TOKEN=""), "--repo-id needs a login", "hf auth login")
    assert hub.state.requests == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--repo-id", "a/b/c"), "--repo-id: "),
        (("--repo-id", "me/nano", "--tag", "no spaces"), "--tag must be letters, digits"),
        (("--repo-id", "me/nano", "--model", "nowhere"), "got nowhere, which is not a folder"),
    ],
)
def test_wrong_arguments(run_here, nano: Path, options: tuple[str, ...], message: str):
    failed(run_here("push", "--model", nano, "--dry-run", *options), message)


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_card(folder: Path, old: str, new: str) -> None:
    card = folder / "README.md"
    text = card.read_text()
    assert old in text
    card.write_text(text.replace(old, new, 1))


def split(folder: Path, place: str) -> None:
    """An index as of several shards, which puts all tensors into the file `place`."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "numpy") as file:
        keys = list(file.keys())
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, place) | {"extra": place}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "no code": (lambda f: (f / "modeling_fusion_vision.py").unlink(), "has no modeling_fusion_vision.py"),
    "no card": (lambda f: (f / "README.md").unlink(), "has no README.md. Write its model card"),
    "pickle": (lambda f: (f / "training_args.bin").write_bytes(b"\x80\x04."), "training_args.bin does not belong"),
    "pickle in disguise": (lambda f: (f / "spiece.model").write_bytes(b"\x80\x04."), "spiece.model begins like"),
    "archive in disguise": (lambda f: (f / "a.txt").write_bytes(b"PK\x03\x04rest"), "a.txt begins like"),
    "other code": (lambda f: (f / "evil.py").write_text("1"), "evil.py is code"),
    "changed code": (
        lambda f: (f / "processing_fusion.py").write_text("1"),
        f"processing_fusion.py differs from processing_fusion.py of fusion_hf {__version__}",
    ),
    "folder": (lambda f: (f / "checkpoint-5").mkdir(), "checkpoint-5 is a folder"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "no text": (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff\xfe"), "chat_template.jinja cannot be read"),
    "code of another repository": (
        lambda f: rewrite(f / "config.json", auto_map={"AutoModel": "evil/repo--modeling_fusion.FusionModel"}),
        "got 'evil/repo--modeling_fusion.FusionModel'",
    ),
    "code of another file": (
        lambda f: rewrite(f / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.Evil"]}),
        "got 'evil.Evil'",
    ),
    "broken weights": (lambda f: cut(f / "model.safetensors"), "model.safetensors cannot be read"),
    "weights too many": (
        lambda f: shutil.copy(f / "model.safetensors", f / "old.safetensors"),
        "old.safetensors is not part of the model",
    ),
    "missing shard": (lambda f: split(f, "gone.safetensors"), "has no gone.safetensors"),
    "wrong index": (lambda f: split(f, "model.safetensors"), "disagree about extra"),
    "card without metadata": (
        lambda f: (f / "README.md").write_text("# nano"),
        "`library_name` must be 'transformers' in the metadata, got None",
    ),
    "card without licence": (
        lambda f: change_card(f, "license: apache-2.0\n", ""),
        "`license` must be the identifier of a licence in the metadata, got None",
    ),
    "card of another task": (
        lambda f: change_card(f, "image-text-to-text", "text-generation"),
        "got 'text-generation'",
    ),
    "card without YAML": (lambda f: change_card(f, "language: en", "language: [en"), "invalid metadata"),
    "card with broken results": (
        lambda f: change_card(f, "language: en", "model-index:\n- name: nano\n  results:\n  - task: 1"),
        "invalid metadata",
    ),
}


CERTIFICATE = {
    "equal": True,
    "dtype": "float32",
    "query_len": 36,
    "num_tokens": 16,
    "authors": {"model_class": "FusionPhiForCausalLM", "commit": "0" * 40, "versions": {"transformers": "4.48.1"}},
    "questions": [{}, {}, {}, {}],
    "stages": [{"name": "tower, tiles", "parts": 27, "relative": 2.9e-7, "tolerance": 1e-5}],
}


def certify(folder: Path, **changes: object) -> None:
    digests = {"model.safetensors": digest_file(folder / "model.safetensors")}
    content = CERTIFICATE | {"weights": {"compared": 1234, "folder": digests}} | changes
    (folder / PARITY).write_text(json.dumps(content))


def test_the_certificate_is_in_the_card(hub: HubServer, folder: Path, push: Push):
    """The folder's own card stays as it is; one that shows the figures already gets them no second time."""
    certify(folder)
    card = (folder / "README.md").read_text()
    assert push(folder).returncode == 0
    sent = hub.state.repositories[REPOSITORY]
    assert json.loads(sent[PARITY]) == json.loads((folder / PARITY).read_text())
    text = sent["README.md"].decode()
    assert text.startswith(card.rstrip()) and (folder / "README.md").read_text() == card
    assert text.count(HEADING) == 1 and "FusionPhiForCausalLM, commit `000000000000`" in text
    assert "| weights | 1,234 tensors | equal to the bit | |" in text
    assert "| tower, tiles | 27 | 2.9e-07 | 1e-05 |" in text
    (folder / "README.md").write_text(text)
    assert card_with_parity(folder, text) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"equal": False}, "parity.json shows that the folder differs"),
        ({"stages": [{"name": "pixels"}]}, "parity.json is not a certificate"),
        ({"weights": {"compared": 1, "folder": {"model.safetensors": "0" * 64}}}, "parity.json does not belong to"),
        (
            {"weights": {"compared": 1, "folder": {"../model.safetensors": "0" * 64}}},
            "parity.json does not belong to",
        ),
    ],
)
def test_a_certificate_that_is_not_of_the_folder(folder: Path, changes: dict[str, object], message: str):
    certify(folder)
    check_files(folder)
    certify(folder, **changes)
    with pytest.raises(InputError, match=message):
        check_files(folder)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_named(name: str, folder: Path):
    check_files(folder)
    break_it, message = BROKEN[name]
    break_it(folder)
    with pytest.raises(InputError) as error:
        check_files(folder)
    assert message in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "chat_template.jinja").write_text("{{ nothing.at.all }}"), "does not work on its own"),
        (lambda f: rewrite(f / "config.json", sampler_layers=[0, 1, 2]), "missing_keys"),
        (lambda f: rewrite(f / "config.json", sampler_layers=[0]), "unexpected_keys"),
        (lambda f: rewrite(f / "config.json", auto_map={}), "does not work on its own"),
    ],
)
def test_a_folder_that_does_not_answer_by_itself(
    folder: Path, push: Push, hub: HubServer, break_it: Callable[[Path], object], message: str
):
    break_it(folder)
    failed(push(folder), message)
    assert hub.state.requests == [] and hub.state.repositories == {}


RUN = ("log.jsonl", "finished.json", "training_args.bin", "trainer_state.json", "skipped.jsonl", "skipped.jsonl.lock")


def make_run(folder: Path) -> Path:
    """What a run leaves beside its model."""
    (folder / "recipe.yaml").write_text("model: base\nhub_token: hf_secret\n")
    for name in RUN:
        (folder / name).write_bytes(b"\x80\x04.")
    for name in ("checkpoint-10", "incomplete-checkpoint-12", "superseded-checkpoint-14-1", "runs", "wandb"):
        (folder / name).mkdir()
        (folder / name / "optimizer.pt").touch()
    return folder


def test_of_a_run_the_model_is_sent(folder: Path):
    before = [file.name for file in check_files(folder)]
    assert [file.name for file in check_files(make_run(folder))] == before
    (folder / "notes.bin").touch()
    with pytest.raises(InputError, match=r"notes\.bin does not belong in a model folder"):
        check_files(folder)


def test_without_a_recipe_nothing_is_passed_over(folder: Path):
    (make_run(folder) / "recipe.yaml").unlink()
    with pytest.raises(InputError, match="checkpoint-10 is a folder"):
        check_files(folder)


def test_a_run_that_has_not_ended(folder: Path):
    (make_run(folder) / "finished.json").unlink()
    with pytest.raises(InputError, match="is not finished"):
        check_files(folder)


def test_an_adapter_is_to_be_merged(folder: Path):
    (make_run(folder) / "adapter_config.json").write_text("{}")
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=f"fusion-hf merge --model {re.escape(str(folder))}"):
        check_files(folder)


def test_a_card_without_a_licence_is_a_warning(folder: Path, push: Push, hub: HubServer):
    change_card(folder, "license: apache-2.0\n", "license: other\nlicense_name: unknown\n")
    result = push(folder, "--dry-run", "--json")
    assert result.returncode == 0 and result.stderr.startswith("WARNING: ") and "names no licence" in result.stderr
    report = json.loads(result.stdout)
    assert {file["name"]: file["size"] for file in report["files"]} == {
        name: len(content) for name, content in files_of(folder).items()
    }
    assert (report["repo_id"], report["tag"], report["url"]) == (REPOSITORY, None, None)


def test_the_cards_examples_load_from_the_repository(tmp_path: Path):
    """In the examples alone, and only where a card names its model so."""
    card = tmp_path / "README.md"
    card.write_text('# run\n\n`"run"`\n\n```python\nmodel_id = "run"\nload(model="run", task="run-on")\n```\n')
    expected = '# run\n\n`"run"`\n\n```python\nmodel_id = "me/x"\nload(model="me/x", task="run-on")\n```\n'
    assert publishing.card_for(tmp_path, "me/x") == expected.encode()
    card.write_text("# other\n")
    assert publishing.card_for(tmp_path, "me/x") == b"# other\n"


def test_what_is_loaded_is_the_folders_own_code(nano: Path, tmp_path: Path):
    """The process that tries a folder cannot import this package, even where it is installed."""
    script = (Path(publishing.__file__).parent / "standalone_check.py").read_text().split("if __name__")[0]
    code = f"{script}\ntry:\n    import fusion_hf\nexcept ImportError:\n    print('gone')\n"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", cwd=tmp_path)
    assert result.stdout == "gone\n", result.stderr
