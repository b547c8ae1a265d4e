"""What a user can do wrong is one line on the standard error, with exit status 2 and no traceback."""

import json
import shutil
from pathlib import Path

import pytest
from tests.helpers.image_files import png_claiming

from fusion_hf.inference import ChatModel

QUESTION = "what color is the shape?"
BOMB_SIDE = 20_000  # pixels; a gigabyte when decoded
LARGE_SIDE = 10_000  # above our limit, below the one at which PIL itself refuses
CLOSED_PORT = "http://127.0.0.1:9"


def check_one_line(result, *parts: str, status: int = 2) -> None:
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1 and result.stderr.endswith("\n")
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr
    assert result.returncode == status


# no model is loaded for these


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "COMMAND"),
        (["paint"], "paint"),
        (["ask", "image_path.png"], "QUESTION"),
        (["ask", "nowhere.png", QUESTION], "'nowhere.png' is no file"),
        (["ask", "docs/assets/red_circle.png", "what", "color", "is it?"], "quotation marks"),
        (["ask", "docs", QUESTION], "docs is a folder"),
        (["ask", "x" * 10_000, QUESTION], "is no file"),
        (["ask", "docs/assets/red_circle.png", ""], "question is empty"),
        (["ask", "docs/assets/red_circle.png", " \n"], "question is empty"),
        (["ask", "docs/assets/red_circle.png", QUESTION, "--query-len", "10"], "perfect square"),
        (["ask", "docs/assets/red_circle.png", QUESTION, "--query-len", "-4"], "perfect square"),
        (["ask", "docs/assets/red_circle.png", QUESTION, "--query-len", "many"], "perfect square"),
        (["ask", "docs/assets/red_circle.png", QUESTION, "--max-new-tokens", "0"], "whole number from 1"),
        (["ask", "docs/assets/red_circle.png", QUESTION, "--image-token-grid", "0"], "whole number from 1"),
        (["chat", "nowhere.png"], "'nowhere.png' is no file"),
    ],
)
def test_wrong_command_line(run, arguments, part):
    check_one_line(run(*arguments), part)


def test_unreadable_images(run, tmp_path):
    contents = {
        "text.png": b"What color is the shape?",
        "empty.png": b"",
        "truncated.png": Path("docs/assets/red_circle.png").read_bytes()[:200],
        "bomb.png": png_claiming(BOMB_SIDE),
        "large.png": png_claiming(LARGE_SIDE),
    }
    files = {name: tmp_path / name for name in contents}
    for name, content in contents.items():
        files[name].write_bytes(content)

    result = run("ask", *files.values(), QUESTION)

    assert (result.returncode, result.stdout) == (2, "")
    lines = result.stderr.splitlines()
    assert len(lines) == len(files)
    for line, path in zip(lines, files.values(), strict=True):
        assert line.startswith(f"error: {path}: ")
        assert line.endswith("Use another image, or save it as PNG or JPEG.")
    assert str(BOMB_SIDE**2) in lines[-2] and "limit" in lines[-2]
    assert f"{LARGE_SIDE} x {LARGE_SIDE}" in lines[-1] and "more than max_image_pixels = " in lines[-1]


def test_unreadable_image_alone(run_here, tmp_path):
    path = tmp_path / "text.png"
    path.write_text("no image_path")
    check_one_line(run_here("ask", path, QUESTION), str(path))


def test_question_longer_than_the_model_reads(run, image_path, nano):
    most = json.loads((nano / "tokenizer_config.json").read_text())["model_max_length"]
    check_one_line(run("ask", image_path, "why? " * 20_000), "tokens", str(most))


def test_more_latent_tokens_than_the_model_reads(run_here, image_path):
    check_one_line(
        run_here("ask", image_path, QUESTION, "--query-len", 10**8),
        "`query_len`",
        "got 100000000",
        "below the model's",
    )


@pytest.mark.parametrize("command", [("ask", QUESTION), ("chat",)])
def test_more_image_tokens_than_the_tower_gives(run_here, image_path, command):
    name, *question = command
    result = run_here(name, image_path, *question, "--image-token-grid", 7)
    check_one_line(result, "`image_token_grid` must be a whole number from 1 to 6", "got 7")


@pytest.mark.parametrize("option", ["--device", "--dtype"])
def test_unknown_device_or_type(run_here, image_path, option):
    check_one_line(run_here("ask", image_path, QUESTION, option, "abacus"), option, "'abacus'", "auto")


class TestModel:
    """`--model` that is no FUSION, or a broken one."""

    @pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a b", "owner/..", "no\x1bwhere"])
    def test_impossible_name(self, run_here, image_path, name):
        check_one_line(run_here("ask", image_path, QUESTION, "--model", name), "is neither a folder")

    def test_file(self, run_here, image_path):
        check_one_line(
            run_here("ask", image_path, QUESTION, "--model", "README.md"),
            "must be a folder or a repository",
            "the file README.md",
        )

    def test_no_network(self, run_cold, image_path, tmp_path):
        variables = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": CLOSED_PORT, "HF_HOME": str(tmp_path)}
        result = run_cold("ask", image_path, QUESTION, "--model", "someone/something", **variables)
        check_one_line(result, "someone/something is not a folder", "the Hub cannot be reached")

    def test_folder_without_a_model(self, run_here, image_path):
        check_one_line(
            run_here("ask", image_path, QUESTION, "--model", "docs"), "docs must be a folder", "no config.json"
        )

    @pytest.mark.parametrize(
        ("config", "part"),
        [
            ({"model_type": "llama"}, "must be 'fusion', got 'llama'"),
            ({}, "must be 'fusion', got None"),
            ({"model_type": "fusion_phi"}, "fusion-hf convert"),
            ({"model_type": "fusion", "query_len": 10}, "perfect square (1, 4, 9, 16, ...), got 10"),
        ],
    )
    def test_other_configuration(self, run_here, image_path, nano, tmp_path, config, part):
        folder = self.copy(nano, tmp_path)
        (folder / "config.json").write_text(json.dumps(config))
        check_one_line(run_here("ask", image_path, QUESTION, "--model", folder), str(folder), part)

    def test_configuration_that_is_no_json(self, run_here, image_path, nano, tmp_path):
        folder = self.copy(nano, tmp_path)
        (folder / "config.json").write_text("{")
        check_one_line(run_here("ask", image_path, QUESTION, "--model", folder), "unreadable config.json")

    def test_missing_weights(self, run, image_path, nano, tmp_path):
        folder = self.copy(nano, tmp_path)
        (folder / "model.safetensors").unlink()
        check_one_line(run("ask", image_path, QUESTION, "--model", folder), "cannot be loaded", "model.safetensors")

    def test_missing_tokenizer(self, run_here, image_path, nano, tmp_path):
        folder = self.copy(nano, tmp_path)
        (folder / "tokenizer.json").unlink()
        check_one_line(run_here("ask", image_path, QUESTION, "--model", folder), "no tokenizer.json", "--tokenizer")

    def test_truncated_weights(self, run_here, image_path, nano, tmp_path):
        folder = self.copy(nano, tmp_path)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
        check_one_line(run_here("ask", image_path, QUESTION, "--model", folder), "cannot be loaded")

    def test_missing_tensors(self, run_here, image_path, nano, tmp_path):
        from safetensors.torch import load_file, save_file

        folder = self.copy(nano, tmp_path)
        tensors = load_file(folder / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        check_one_line(run_here("ask", image_path, QUESTION, "--model", folder), "lack 1 tensors", "lm_head.weight")

    def test_tokenizer_of_something_else(self, run_here, image_path, nano, tmp_path):
        folder = self.copy(nano, tmp_path)
        (folder / "tokenizer.json").write_text("{}")
        check_one_line(run_here("ask", image_path, QUESTION, "--model", folder), "cannot be loaded")

    @staticmethod
    def copy(nano: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(nano, tmp_path / "model"))


def test_what_nobody_foresaw_ends_in_one_line_as_well(run_here, image_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr(ChatModel, "answer", fail)
    check_one_line(run_here("ask", image_path, QUESTION), "RuntimeError: out of luck", "--debug", status=1)


def test_debug_shows_the_traceback(run_cold, image_path):
    result = run_cold("ask", "nowhere.png", QUESTION, "--debug")
    assert result.stderr.startswith("Traceback")
    assert result.returncode == 1
