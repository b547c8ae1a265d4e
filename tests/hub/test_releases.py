"""Releases of transformers: the tested range is said everywhere alike, and other releases are named in words."""

import configparser
import re
from pathlib import Path

import pytest
from tests.helpers.hub_folder import run
from tests.helpers.transformers_releases import RELEASES, install_release, supported_releases

from fusion_hf import nano_path
from fusion_hf.hub.model_cards import USAGE
from fusion_hf.model.chat_fusion import as_dicts
from fusion_hf.model.compatibility_fusion import NEWEST_TESTED, OLDEST_TESTED, TESTED, check_transformers
from fusion_hf.nano.report import CARD

ROOT = Path(__file__).parents[2]
OLDEST, NEWEST = (".".join(map(str, release)) for release in (OLDEST_TESTED, NEWEST_TESTED))
BELOW = f"{NEWEST_TESTED[0]}.{NEWEST_TESTED[1] + 1}"

ANSWER = """
from transformers import AutoModelForImageTextToText, AutoProcessor
def answer(folder):
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    answered = output[0, inputs["input_ids"].shape[1]:]
    return processor, model, processor.decode(answered, skip_special_tokens=True).strip()
"""
UNTESTED = """
import logging, transformers
transformers.__version__ = sys.argv[2]
handler = logging.Handler()
handler.emit = lambda record: print(record.getMessage())
logging.getLogger().addHandler(handler)  # of a model folder's modules
print(answer(FOLDER)[2])
print(answer(FOLDER)[2])
"""
WRITE = """
import transformers
assert transformers.__version__ == sys.argv[3], transformers.__version__
processor, model, answered = answer(FOLDER)
model.save_pretrained(sys.argv[2])
processor.save_pretrained(sys.argv[2])
print(answered)
"""
READ = """
import transformers
assert transformers.__version__ == sys.argv[2], transformers.__version__
for folder in sys.argv[3:]:
    print(answer(folder)[2])
"""


def test_the_range_is_the_same_everywhere() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    bound = f"transformers>={OLDEST},<{BELOW}"
    assert bound in setup["options"]["install_requires"].splitlines()
    assert bound in (ROOT / "space" / "requirements.txt").read_text().splitlines()
    assert f"OLDEST_TRANSFORMERS := {OLDEST}.0\n" in (ROOT / "Makefile").read_text()
    assert re.search(rf"^transformers=={NEWEST}\.\d", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert f"{OLDEST} to {NEWEST}" == TESTED
    assert USAGE.read_text().lower().count("transformers {{ releases }}") == 2
    assert "transformers {releases}" in CARD.read_text().lower()
    assert (
        f"transformers {OLDEST} to {NEWEST}"
        in (Path(nano_path()) / "README.md").read_text().replace("\n", " ").lower()
    )
    minors = [release.rpartition(".")[0] for release in RELEASES]
    assert minors == [f"{NEWEST_TESTED[0]}.{minor}" for minor in range(OLDEST_TESTED[1], NEWEST_TESTED[1] + 1)]


@pytest.mark.parametrize("version", [f"{BELOW}.0", f"{BELOW}.0.dev0", "6.0.1"])
def test_a_newer_release_is_a_warning_with_the_range(version: str, caplog: pytest.LogCaptureFixture) -> None:
    check_transformers(version)
    check_transformers(version)
    messages = [record.getMessage() for record in caplog.records if version in record.getMessage()]
    assert len(messages) == 1 and f"transformers {OLDEST} to {NEWEST}, but you use {version}" in messages[0]


@pytest.mark.parametrize("version", ["4.57.3", "5.16.1"])
def test_an_older_release_is_an_error_with_the_range(version: str) -> None:
    with pytest.raises(ImportError, match=f"transformers {OLDEST} to {NEWEST}, got {re.escape(version)}"):
        check_transformers(version)


@pytest.mark.parametrize("version", [f"{OLDEST}.0", "5.20.2", f"{NEWEST}.7", f"{NEWEST}.1.dev0"])
def test_tested_releases_are_silent(version: str, caplog: pytest.LogCaptureFixture) -> None:
    check_transformers(version)
    assert not [record for record in caplog.records if version in record.getMessage()]


def test_remote_code_warns_once_of_an_untested_release(tmp_path: Path) -> None:
    warning, *answers = run(ANSWER + UNTESTED, nano_path(), "5.99.0", cache=tmp_path)
    assert f"{OLDEST} to {NEWEST}, but you use 5.99.0" in warning
    assert answers == ["red", "red"]


def test_objects_in_chats_become_dicts_and_images_stay() -> None:
    class Pydantic:
        def model_dump(self) -> dict:
            return {"role": "assistant", "content": "yes", "tool_calls": None}

    image = object()
    messages = [{"role": "user", "content": ({"type": "image", "image": image},)}, Pydantic()]
    assert as_dicts(messages) == [
        {"role": "user", "content": [{"type": "image", "image": image}]},
        {"role": "assistant", "content": "yes"},
    ]


@pytest.mark.slow
def test_a_folder_of_every_release_loads_in_every_other(tmp_path: Path) -> None:
    releases = supported_releases()
    folders = {version: tmp_path / f"folder-{version}" for version in releases}
    for version, folder in folders.items():
        cache = tmp_path / f"write-{version}"
        cache.mkdir()
        found = install_release(version)
        assert run(ANSWER + WRITE, nano_path(), folder, version, cache=cache, packages=found) == ["red"]
    for version in releases:
        cache = tmp_path / f"read-{version}"
        cache.mkdir()
        found = install_release(version)
        answers = run(ANSWER + READ, nano_path(), version, *folders.values(), cache=cache, packages=found)
        assert dict(zip(folders, answers, strict=True)) == dict.fromkeys(folders, "red"), version
