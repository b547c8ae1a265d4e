"""`from_pretrained` puts the converted folder in place of an authors' checkpoint, and leaves other names alone."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import fusion_hf
from fusion_hf import FusionForConditionalGeneration, FusionModel, nano_path
from fusion_hf.common.errors import InputError
from fusion_hf.hub import checkpoint_names, folders
from fusion_hf.hub.checkpoint_names import MARK, find_converted, take_authors_names
from fusion_hf.hub.folders import HubOptions, find_folder

AUTO = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
CLASSES = [
    *(getattr(transformers, name) for name in (*AUTO, "AutoProcessor", "AutoTokenizer")),
    AutoImageProcessor,
    *(getattr(fusion_hf, name) for name in fusion_hf.__all__ if name.startswith("Fusion")),
]
OWN = (FusionModel, FusionForConditionalGeneration)  # which hand on all of their arguments
COMMIT, TAGGED = "a" * 40, "b" * 40


class Loader:
    """Gives back what it is called with."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        return cls, pretrained_model_name_or_path, args, kwargs


@pytest.fixture
def loader() -> type:
    """A class of its own, which takes the authors' names."""
    taking = type("Taking", (), {"from_pretrained": Loader.__dict__["from_pretrained"]})
    take_authors_names(taking)
    return taking


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path, HubOptions]]:
    """Calls of what converts; each gives the folder `converted`."""
    calls: list[tuple[str, Path, HubOptions]] = []

    def convert(name: str, folder: Path, hub: HubOptions) -> Path:
        calls.append((name, folder, hub))
        return Path("converted")

    monkeypatch.setattr(folders, "_converters", [convert])
    return calls


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The Hub's cache as downloads leave it: a checkpoint of the authors with a tag, and another model."""
    for name, commit, ref, model_type in (
        ("authors--it", COMMIT, "main", "fusion_phi"),
        ("authors--it", TAGGED, "v1", "fusion_phi"),
        ("some--other", COMMIT, "main", "llama"),
    ):
        folder = tmp_path / "hub" / f"models--{name}"
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "config.json").write_text(json.dumps({"model_type": model_type}))
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return tmp_path / "hub"


@pytest.mark.parametrize("each", CLASSES, ids=lambda each: each.__name__)
def test_every_class_that_loads_a_fusion_takes_the_names(each: Any):
    """A contract with transformers: `from_pretrained` is a class method whose first argument is the name."""
    loader = inspect.getattr_static(each, "from_pretrained")
    assert isinstance(loader, classmethod) and hasattr(loader.__func__, MARK)
    names = list(inspect.signature(loader.__func__.__wrapped__).parameters)
    assert names[names[0] == "cls"] == ("args" if issubclass(each, OWN) else "pretrained_model_name_or_path")
    take_authors_names(each)
    assert inspect.getattr_static(each, "from_pretrained") is loader


def test_a_folder_of_the_authors(tmp_path, loader, converted):
    (tmp_path / "config.json").write_text('{"model_type": "fusion_phi"}')
    options = {"dtype": "auto", "device_map": "cpu", "quantization_config": {"a": 1}, "revision": "v1", "token": False}
    for name in (tmp_path, str(tmp_path)):
        assert loader.from_pretrained(name, 1, **options) == (loader, "converted", (1,), options)
        assert converted.pop() == (str(tmp_path), tmp_path, HubOptions(token=False))
    assert find_folder(str(tmp_path)) == Path("converted")


def test_a_repository_of_the_authors(cache, loader, converted):
    snapshots = cache / "models--authors--it" / "snapshots"
    options = {"cache_dir": str(cache), "local_files_only": True}
    hub = HubOptions(str(cache), None, True)
    for revision, commit in ((None, COMMIT), ("main", COMMIT), ("v1", TAGGED), (TAGGED, TAGGED)):
        found = loader.from_pretrained("authors/it", revision=revision, **options)
        assert found[1] == "converted" and converted.pop() == ("authors/it", snapshots / commit, hub)


@pytest.mark.parametrize(
    "name",
    [
        *("some/other", "some/gone", "authors/it/more", "..", "README.md", "a" * 300, "a\0b"),
        *(nano_path(), Path("gone"), None, {"a": 1}),
    ],
)
def test_other_names(cache, loader, converted, name, monkeypatch):
    """Go through as they are, and a model whose configuration is in the cache costs no request."""
    asked: list[str] = []

    def fail(api: Any, name: str, **options: Any) -> str:
        asked.append(name)
        raise OSError("not reached")

    monkeypatch.setattr(checkpoint_names.HfApi, "model_info", fail)
    monkeypatch.setattr(checkpoint_names, "hf_hub_download", None)  # which tries for long
    assert loader.from_pretrained(name, cache_dir=cache)[1] is name
    assert not converted and asked == [str(name)] * (str(name) in ("some/gone", "gone"))


def test_find_folder_takes_a_revision(cache, converted, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, revision, commit in (
        ("authors/it", None, COMMIT),
        ("authors/it", "v1", TAGGED),
        ("authors/it@v1", None, TAGGED),
        ("authors/it@v1", "main", TAGGED),
    ):
        assert find_folder(name, revision) == Path("converted")
        assert converted.pop()[:2] == ("authors/it", cache / "models--authors--it" / "snapshots" / commit)
    with pytest.raises(InputError, match="authors/it@v2"):
        find_folder("authors/it", "v2")


@pytest.mark.parametrize("content", ["[]", "{", '{"model_type": 7}', '{"model_type": "fusion"}', "{}"])
def test_other_folders(tmp_path, content, converted):
    (tmp_path / "config.json").write_text(content)
    assert find_converted(tmp_path) is None and not converted


def test_errors_of_conversion_come_through(tmp_path, loader):
    (tmp_path / "config.json").write_text('{"model_type": "fusion_mpt"}')
    with pytest.raises(InputError, match=r"model_type.*'fusion_phi', 'fusion_llama'.*got 'fusion_mpt'"):
        loader.from_pretrained(str(tmp_path))
