"""`fusion-hf ask` answers: one image, several, and nothing but answers on its outputs."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.helpers.broken_images import BROKEN, ODD

from fusion_hf.common.errors import short_name
from fusion_hf.inference import ChatModel, Conversation, choose_device, nano_path

QUESTION = "what color is the shape?"
# of a clock, from a cold start on two quiet cores; or in terms of what the imports take where others work as well
COLD_SECONDS, COLD_IMPORTS = 15, 4
ATTEMPTS = 3
IMPORTS = "import torch, transformers.models.auto.modeling_auto, transformers.generation.utils"


@pytest.fixture(scope="module")
def chat_model(nano: Path) -> ChatModel:
    return ChatModel.load()


def seconds_of(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def answer_cold(run_cold, image_path: str) -> None:
    result = run_cold("ask", image_path, QUESTION)
    assert (result.returncode, result.stdout, result.stderr) == (0, "red\n", "")


def test_answers_within_seconds(run_cold, image_path):
    found = []
    for _ in range(ATTEMPTS):  # what else the machine does must not decide
        imports = seconds_of(lambda: subprocess.run([sys.executable, "-c", IMPORTS], check=True))
        found.append((seconds_of(lambda: answer_cold(run_cold, image_path)), imports))
        if found[-1][0] < max(COLD_SECONDS, COLD_IMPORTS * imports):
            return
    pytest.fail(f"cold starts, and the imports before each, took {found} s")


def test_several_images_give_a_line_each_and_broken_ones_an_error(run, image_path, tmp_path):
    whole = Path(image_path).read_bytes()
    copy, broken = tmp_path / "copy of it.png", tmp_path / "broken.png"
    copy.write_bytes(whole)
    broken.write_bytes(whole[: len(whole) // 2])

    result = run("ask", image_path, broken, copy, QUESTION)

    assert result.stdout == f"{image_path}: red\n{copy}: red\n"
    assert result.stderr.count("\n") == 1
    assert short_name(str(broken)) in result.stderr
    assert result.returncode == 2


def test_images_from_strangers(run, image_path, tmp_path):
    """Odd ones are answered; broken ones are a line each, and nothing ends the run."""
    names = []
    for number, content in enumerate([*BROKEN.values(), *ODD.values()]):
        names.append(tmp_path / f"{number}.png")
        names[-1].write_bytes(content)

    result = run("ask", image_path, *names, image_path, QUESTION, "--max-new-tokens", "1")

    answered = [line.split(": ")[0] for line in result.stdout.splitlines()]
    assert answered == [str(image_path), *map(str, names[len(BROKEN) :]), str(image_path)]
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert [short_name(str(name)) in error for name, error in zip(names, errors, strict=False)] == [True] * len(BROKEN)
    assert "Traceback" not in result.stderr
    assert result.returncode == 2


def test_prints_what_the_library_answers(run, chat_model, image_path):
    question = "how many shapes are there?"
    expected = Conversation(chat_model, chat_model.open_image(image_path), 5, query_len=4).ask(question)
    result = run("ask", image_path, question, "--query-len", 4, "--max-new-tokens", 5, "--dtype", "float32")
    assert (result.returncode, result.stdout, result.stderr) == (0, expected + "\n", "")


def test_prints_what_the_library_answers_with_fewer_image_tokens(run, chat_model, image_path):
    questions = ["how many shapes are there?", QUESTION]
    image = chat_model.open_image(image_path)
    expected = list(chat_model.answer_each(image, questions, 5, query_len=4, image_token_grid=2))
    options = ("--query-len", 4, "--image-token-grid", 2, "--max-new-tokens", 5, "--dtype", "float32")
    result = run("ask", image_path, questions[0], "--also", questions[1], *options)
    assert (result.returncode, result.stdout, result.stderr) == (0, "\n".join(expected) + "\n", "")
    talked = run("chat", image_path, *options, stdin=questions[0])
    assert (talked.returncode, talked.stdout, talked.stderr) == (0, expected[0] + "\n", "")


def test_max_new_tokens_limits_the_answer(chat_model, image_path):
    messages = [{"role": "user", "content": QUESTION}]
    answer = chat_model.answer(messages, max_new_tokens=1)
    assert len(chat_model.processor.tokenizer.tokenize(answer)) <= 1


def test_code_of_a_model_folder_is_not_run(run, image_path, nano, tmp_path):
    folder, trace = tmp_path / "model", tmp_path / "trace"
    shutil.copytree(nano, folder)
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(trace)!r}).touch()\nclass Evil: pass\n")
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        path = folder / name
        values = json.loads(path.read_text())
        classes = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor")
        values["auto_map"] = dict.fromkeys(classes, "evil.Evil")
        if name == "tokenizer_config.json":
            values["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        path.write_text(json.dumps(values))

    result = run("ask", image_path, QUESTION, "--model", folder)

    assert not trace.exists()
    assert "Traceback" not in result.stderr
    assert result.stdout in ("red\n", "")


def test_stops_quietly_when_nobody_reads(command, offline, image_path):
    process = subprocess.Popen(
        [*command, "ask", image_path, image_path, QUESTION],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=offline,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1


def test_default_is_the_bundled_model(nano):
    assert Path(nano_path()).resolve() == nano.resolve()


def test_automatic_device_exists():
    assert choose_device().type in ("cuda", "mps", "cpu")


def test_convert_has_arguments_of_its_own(run):
    result = run("convert", "--help")
    assert result.returncode == 0
    assert "--model" in result.stdout

    result = run("convert")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "--model" in result.stderr
