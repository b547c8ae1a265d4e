"""The authors' checkpoints by their names: equal to a converted folder, made once, found again, removed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.checkpoints import TOWER, write_json
from tests.helpers.hub_server import HubServer
from tests.helpers.named_checkpoints import write_named_checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from fusion_hf.cli import main
from fusion_hf.cli.convert import main as run_convert
from fusion_hf.cli.serve import model_of_vllm
from fusion_hf.common.errors import InputError
from fusion_hf.conversion import converted_models, from_authors
from fusion_hf.hub.folders import find_folder, nano_path
from fusion_hf.inference import ChatModel, question_message

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "docs" / "assets" / "red_circle.png"
QUESTION = "what color is the shape?"
SECONDS = 300
COMMITS = {"main": "a" * 40, "v1": "b" * 40}
NAME = "authors/FUSION-tiny"
ONE_TURN = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
HOSTILE = "from pathlib import Path\nPath({place!r}).touch()\n"
# Command lines in one process, since a start takes longer than most of them.
DRIVER = """
import contextlib, io, json, sys
from fusion_hf.cli import main
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    print(json.dumps([status, out.getvalue(), err.getvalue()]), flush=True)
"""

AUTO_CLASSES = """
import fusion_hf, sys
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], revision="main", token="hf_test", dtype="auto")
processor = AutoProcessor.from_pretrained(sys.argv[1], revision="main", token="hf_test")
print(type(model).__name__, type(processor).__name__, model.config.num_image_tokens, processor.num_image_tokens)
"""


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process converts to."""
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "assets"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """As the authors' code leaves it, with code of somebody's that must not run."""
    folder = write_named_checkpoint(tmp_path / "FUSION-tiny")
    place = tmp_path / "hostile"
    for name in ("configuration_fusion", "modeling_fusion", "processing_fusion", "tokenization_fusion"):
        (folder / f"{name}.py").write_text(HOSTILE.format(place=str(place)))
    model = {"AutoConfig": "configuration_fusion.C", "AutoModelForImageTextToText": "modeling_fusion.M"}
    tokenizer = {"AutoTokenizer": ["tokenization_fusion.T", None], "AutoProcessor": "processing_fusion.P"}
    for file, classes in (("config.json", model), ("tokenizer_config.json", tokenizer)):
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        write_json(folder / file, content | {"auto_map": classes})
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., list[Any]]:
    """Runs commands in a fresh process with the network off, and the caches in `tmp_path`."""

    def call(*commands: list[object], **variables: str) -> list[Any]:
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, json.dumps([[str(word) for word in command] for command in commands])],
            cwd=tmp_path,
            env={k: v for k, v in os.environ.items() if not k.startswith("HF_")}
            | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            | variables,
            capture_output=True,
            encoding="utf-8",
            timeout=SECONDS,
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return call


def contents(folder: Path) -> dict[str, bytes]:
    """Files by name; of the card, which has a name in it, only that it is there."""
    return {file.name: b"" if file.name == "README.md" else file.read_bytes() for file in folder.iterdir()}


def test_equal_to_a_converted_folder(tmp_path, assets, checkpoint):
    """To the bit: every file, weights, pixels, ids and logits; and nothing of the folder's code is run."""
    expected = tmp_path / "expected"
    assert run_convert(["--model", str(checkpoint), "--output", str(expected)]) == 0
    theirs = {"trust_remote_code": True, "dtype": torch.bfloat16, "device_map": "cpu", "image_token_grid": 3}
    loaded = {}
    for name in (str(checkpoint), str(expected)):
        model = AutoModelForImageTextToText.from_pretrained(name, **theirs).eval()
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=True, image_token_grid=3)
        assert model.dtype == torch.bfloat16 and model.config.image_token_grid == 3
        message = question_message(QUESTION, processor.image_processor.fetch_images(str(IMAGE)))
        inputs = processor.apply_chat_template([message], **ONE_TURN)
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == 9
        with torch.inference_mode():
            logits = model(**inputs.to("cpu", model.dtype)).logits
        loaded[name] = (
            model.state_dict(),
            inputs,
            logits,
            AutoTokenizer.from_pretrained(name, trust_remote_code=True),
        )
        assert AutoConfig.from_pretrained(name, trust_remote_code=True).model_type == "fusion"
        assert type(AutoImageProcessor.from_pretrained(name)) is type(processor.image_processor)
    (weights, inputs, logits, tokenizer), (*others, other_tokenizer) = loaded.values()
    for found, wanted in zip((weights, inputs), others[:2], strict=True):
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in found)
    assert torch.equal(logits, others[2]) and tokenizer.get_vocab() == other_tokenizer.get_vocab()

    (made,) = converted_models.converted_models()
    assert made.name == checkpoint.name and assets in made.folder.parents
    assert contents(made.folder) == contents(expected)
    ask = pipeline("image-text-to-text", model=str(checkpoint), trust_remote_code=True, device="cpu")
    answer = ask(text=[question_message(QUESTION)], max_new_tokens=3, return_full_text=False)[0]["generated_text"]
    alone = ChatModel.load(str(expected), device="cpu").answer([question_message(QUESTION)], 3)
    assert (
        answer.strip()
        == alone
        == ChatModel.load(str(checkpoint), device="cpu").answer([question_message(QUESTION)], 3)
    )
    assert not (tmp_path / "hostile").exists()


def test_made_once_and_found_again(tmp_path, assets, monkeypatch):
    """By several at once as well; what a killed process left goes; a changed folder is converted anew."""
    checkpoint = write_named_checkpoint(tmp_path / "FUSION-tiny")
    conversions: list[Path] = []
    original = from_authors.convert

    def convert(options: Any, inputs: Any) -> str:
        conversions.append(options.output)
        return original(options, inputs)

    monkeypatch.setattr(from_authors, "convert", convert)
    place = converted_models._place(str(checkpoint), checkpoint)
    left = place.parent / f".{place.name}.123.tmp"
    left.mkdir(parents=True)
    with ThreadPoolExecutor(3) as threads:
        found = set(threads.map(find_folder, [str(checkpoint)] * 3))
    assert found == {place} and conversions == [place]
    assert [path.name for path in place.parent.iterdir()] == [place.name]
    assert find_folder(str(checkpoint)) == place and len(conversions) == 1

    write_named_checkpoint(checkpoint, seed=1)
    os.utime(checkpoint / "config.json", (1, 1))
    changed = find_folder(str(checkpoint))
    assert changed != place and conversions == [place, changed]
    write_json(checkpoint.parent / "siglip-tower" / "config.json", TOWER | {"layer_norm_eps": 1e-5})
    assert find_folder(str(checkpoint)) not in (place, changed)
    assert main(["cache", "--remove", str(checkpoint)]) == 0  # as commands name it
    assert converted_models.converted_models() == []


def test_a_checkpoint_that_does_not_fit(tmp_path, assets):
    """Conversion's error, and nothing is left."""
    checkpoint = write_named_checkpoint(tmp_path / "FUSION-tiny", num_shards=1)
    weights = checkpoint / "model.safetensors"
    whole = weights.read_bytes()
    for change, parts in (
        (lambda: weights.write_bytes(whole[: len(whole) // 2]), (str(checkpoint), "model.safetensors", "truncated")),
        (lambda: weights.unlink(), (str(checkpoint), "must have weights")),
        (lambda: (checkpoint / "mm_projector.bin").touch(), (str(checkpoint), "adapter-only run", "--base")),
    ):
        change()
        with pytest.raises(InputError) as error:
            find_folder(str(checkpoint))
        assert all(part in str(error.value) for part in (*parts, "fusion-hf convert"))
        assert converted_models.converted_models() == [] and not list(assets.rglob("*.tmp"))


def write_cache(home: Path, checkpoints: dict[str, Path]) -> None:
    """The Hub's cache as downloads of the checkpoints leave it, by reference."""
    folder = home / "hub" / f"models--{NAME.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    for ref, checkpoint in checkpoints.items():
        (folder / "refs" / ref).write_text(COMMITS[ref])
        shutil.copytree(checkpoint, folder / "snapshots" / COMMITS[ref])


@pytest.mark.slow
def test_commands_offline(tmp_path, run):
    """From the Hub's cache, by name and revision, in processes of their own; weights are not needed a second time."""
    first = write_named_checkpoint(tmp_path / "first" / "FUSION-tiny")
    second = write_named_checkpoint(tmp_path / "second" / "FUSION-tiny", suffix=".bin", seed=1)
    write_cache(tmp_path / "home", {"main": first, "v1": second})
    (tmp_path / "questions.jsonl").write_text(json.dumps({"question": QUESTION, "image": str(IMAGE)}) + "\n")
    (tmp_path / "run.yaml").write_text(f"model: {first}\ndata: records.json\noutput_dir: out\n")
    few = ["--max-new-tokens", 3]
    planned, of_name, of_folder, tagged, other_folder, of_file, listed = run(
        ["plan", "run.yaml", "--records", 10, "--gpus", 1, "--gpu-memory", 80],
        ["ask", IMAGE, QUESTION, "--model", NAME, *few],
        ["ask", IMAGE, QUESTION, "--model", first, *few],
        ["ask", IMAGE, QUESTION, "--model", f"{NAME}@v1", *few],
        ["ask", IMAGE, QUESTION, "--model", second, *few],
        ["ask", "--input", "questions.jsonl", "--output", "answers.jsonl", "--model", f"{NAME}@{COMMITS['v1']}", *few],
        ["cache"],
    )
    assert planned[0] == 0 and "It fits." in planned[1]
    assert of_name[0] == 0 and of_name[1:] == of_folder[1:] and of_name[2] == "", (of_name, of_folder)
    assert tagged[0] == 0 and tagged[1:] == other_folder[1:] and tagged[1] != of_name[1], (tagged, other_folder)
    assert of_file[0] == 0
    assert json.loads((tmp_path / "answers.jsonl").read_text())["answer"] == tagged[1].strip()
    assert [line.split("  ")[0] for line in listed[1].splitlines()] == [NAME, NAME, "FUSION-tiny", "FUSION-tiny"]
    assert all(commit in listed[1] for commit in COMMITS.values())

    for file in (tmp_path / "home" / "hub").rglob("*model*"):
        if file.suffix in (".bin", ".safetensors"):
            file.unlink()
    again, wrong, removed, left, as_json, gone = run(
        ["ask", IMAGE, QUESTION, "--model", NAME, *few],
        ["cache", "--remove", "authors/none"],
        ["cache", "--remove", NAME],
        ["cache"],
        ["cache", "--json"],
        ["ask", IMAGE, QUESTION, "--model", NAME, *few],
    )
    assert again[:2] == of_name[:2]
    assert wrong[0] == 2 and "'authors/none'" in wrong[2] and NAME in wrong[2]
    assert removed[0] == 0 and removed[1].count(f"Removed {NAME}") == 2
    assert [line.split("  ")[0] for line in left[1].splitlines()] == ["FUSION-tiny", "FUSION-tiny"]
    models = json.loads(as_json[1])["models"]
    assert [(model["name"], model["num_bytes"] > 0) for model in models] == [("FUSION-tiny", True)] * 2
    assert gone[0] == 2 and f"The model {NAME}" in gone[2] and "shards" in gone[2]


@pytest.mark.slow
def test_from_the_hub(tmp_path, run):
    """Fetched, converted, and the same answer without the network."""
    checkpoint = write_named_checkpoint(tmp_path / "FUSION-tiny", num_shards=1)
    command = ["ask", IMAGE, QUESTION, "--model", NAME, "--max-new-tokens", 3]
    with HubServer() as hub:
        files = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
        hub.state.repositories[NAME] = files | {
            "modeling_fusion.py": b"raise SystemExit",
            "original/params.json": b"{}",
        }
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test"}
        (fetched,) = run(command, HF_HUB_DISABLE_PROGRESS_BARS="1", **online)
        done = subprocess.run(
            [sys.executable, "-c", AUTO_CLASSES, NAME],
            env={**os.environ, **online, "HF_HOME": str(tmp_path / "another"), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            encoding="utf-8",
            timeout=SECONDS,
        )
    assert done.stdout.split() == ["FusionForConditionalGeneration", "FusionProcessor", "16", "16"], done.stderr
    assert fetched[0] == 0 and not {"modeling_fusion.py", "original/params.json"} & set(hub.state.downloads), fetched
    (offline,) = run(command)
    assert offline == fetched


def test_a_tower_that_the_checkpoint_names(tmp_path, capsys):
    """Its folder gives the sizes; another kind of tower is refused by name."""
    checkpoint = write_named_checkpoint(tmp_path / "FUSION-tiny")
    tower = tmp_path / "siglip-tower" / "config.json"
    command = ["--model", str(checkpoint), "--dry-run"]
    assert run_convert(command) == 0
    capsys.readouterr()
    for content, parts in (
        (TOWER | {"model_type": "clip_vision_model"}, (str(tower), "'clip_vision_model'", "'siglip_vision_model'")),
        (TOWER | {"hidden_size": 24}, ("The tower does not fit", "width 16", "siglip-tower has width 24")),
    ):
        write_json(tower, content)
        assert run_convert(command) == 2
        error = capsys.readouterr().err
        assert all(part in error for part in parts), error


def test_what_vllm_is_given(tmp_path, assets, monkeypatch):
    """It loads folders and repositories by itself, but no checkpoint of the authors and no revision behind `@`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    checkpoint = write_named_checkpoint(tmp_path / "FUSION-tiny")
    assert model_of_vllm(nano_path()) == nano_path() and model_of_vllm("some/model") == "some/model"
    assert Path(model_of_vllm(str(checkpoint))) == find_folder(str(checkpoint)) != checkpoint
    with pytest.raises(InputError, match="some/model@v1"):
        model_of_vllm("some/model@v1")
