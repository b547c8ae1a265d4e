"""How answers are chosen by `ask` and `chat`: sampled with a seed, or by beam search; and other options of both."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.questions import write_questions

from fusion_hf import batch_generate
from fusion_hf.cli.model_options import takes_lean_imports
from fusion_hf.common.errors import InputError
from fusion_hf.inference import ChatModel, SamplingOptions, batching, question_message
from fusion_hf.inference.sampling import GumbelNoise

COUNT = 6
QUESTION = "what color is the shape?"
HOT = SamplingOptions(temperature=2.0, top_p=0.999, seed=3)
SETTINGS: dict[str, Any] = {"max_new_tokens": 4, "progress": False}


@pytest.fixture(scope="module")
def nano_model() -> ChatModel:
    return ChatModel.load(dtype="float32")


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write_questions(tmp_path, COUNT)[0]


def test_noise_makes_samples_of_the_probabilities():
    """Of 4,000 rows with own seeds, each token is the largest as often as its probability says, within 4 sigma."""
    rows = 4000
    probabilities = torch.tensor([0.5, 0.3, 0.2, 0.0])
    noisy = GumbelNoise(range(rows))(torch.empty(rows, 1), probabilities.log().expand(rows, -1))
    counts = noisy.argmax(-1).bincount(minlength=4) / rows
    assert counts[3] == 0
    assert (counts - probabilities).abs().max() < 4 * (0.25 / rows) ** 0.5


def test_answers_depend_on_the_seed_alone(nano_model: ChatModel, questions: Path):
    """Neither on the batch nor on what is answered beside them."""
    batches = [batch_generate(questions, nano_model, batch_size=n, sampling=HOT, **SETTINGS) for n in (1, 4)]
    assert batches[0] == batches[1]
    record = json.loads(questions.read_text().splitlines()[2])
    image = nano_model.open_image(str(questions.parent / record["image"]))
    message = question_message(record["question"], image)
    alone = nano_model.answer([message], 4, sampling=HOT.of_answer(2))
    assert alone == batches[0][2]["answer"]
    seeds = {nano_model.answer([message], 4, sampling=SamplingOptions(2.0, seed=seed)) for seed in range(5)}
    assert len(seeds) > 1


def test_a_sampled_run_resumes(nano_model: ChatModel, questions: Path, tmp_path: Path, monkeypatch):
    expected = batch_generate(questions, nano_model, sampling=HOT, **SETTINGS)
    output = tmp_path / "answers.jsonl"
    answer = batching._Run._answer

    def stop(run: batching._Run, batch: list[Any]) -> Any:
        if (tmp_path / "answers.jsonl.partial").read_text().count("\n") > 1:
            raise KeyboardInterrupt
        return answer(run, batch)

    monkeypatch.setattr(batching._Run, "_answer", stop)
    with pytest.raises(KeyboardInterrupt):
        batch_generate(questions, nano_model, output, batch_size=2, sampling=HOT, **SETTINGS)
    monkeypatch.undo()
    for other, part in (
        (SamplingOptions(), "`temperature` must be 2.0, .*, got None"),
        (SamplingOptions(2.0, 0.999, seed=4), "`seed` must be 3, .*, got 4"),
    ):
        with pytest.raises(InputError, match=part):
            batch_generate(questions, nano_model, output, batch_size=2, sampling=other, **SETTINGS)
    assert batch_generate(questions, nano_model, output, batch_size=3, sampling=HOT, **SETTINGS) == expected


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"temperature": -1}, "`temperature` must be a number from 0 to 2, got -1"),
        ({"temperature": float("nan")}, "`temperature` must be .* got nan"),
        ({"temperature": 1, "top_p": 1.5}, "`top_p` must be .* at most 1, got 1.5"),
        ({"top_p": 0.5}, "`top_p` must be 1 when `temperature` is 0, got 0.5"),
        ({"temperature": 1, "num_beams": 2}, "`num_beams` must be 1 when `temperature` is above 0, got 2"),
        ({"seed": 2**32}, "`seed` must be a whole number from 0 to 4294967295, got 4294967296"),
        ({"num_beams": 0}, "`num_beams` must be a whole number from 1, got 0"),
    ],
)
def test_impossible_options(values: dict[str, Any], part: str):
    with pytest.raises(InputError, match=part):
        SamplingOptions(**values)


def test_the_command_repeats_an_answer(run, image_path):
    """As lines of text and as JSON; the first answer of several is that of one."""
    hot = ("--temperature", 2, "--seed", 5, "--max-new-tokens", 4)
    first, again, several = (
        run("ask", image_path, QUESTION, *hot),
        run("ask", image_path, QUESTION, "--json", *hot),
        run("ask", image_path, QUESTION, "--also", "what shape is in the image?", "--json", *hot),
    )
    answer = first.stdout.strip()
    content = {"image": image_path, "question": QUESTION, "answer": answer}
    assert (again.returncode, json.loads(again.stdout)) == (0, content)
    lines = [json.loads(line) for line in several.stdout.splitlines()]
    assert lines[0] == content and len(lines) == 2
    chat = run("chat", image_path, *hot, stdin=f"{QUESTION}\n/reset\n{QUESTION}\n")
    assert chat.stdout.splitlines() == [answer, answer]


def test_beam_search(run, image_path, questions, tmp_path):
    assert run("ask", image_path, QUESTION, "--num-beams", 3).stdout == "red\n"
    assert run("chat", image_path, "--num-beams", 2, stdin=f"{QUESTION}\n").stdout == "red\n"
    output = tmp_path / "answers.jsonl"
    result = run("ask", "--input", questions, "--output", output, "--num-beams", 2, "--json", "--max-new-tokens", 4)
    assert json.loads(result.stdout) == {"output": str(output), "answers": COUNT, "errors": 0}


@pytest.mark.parametrize("command", [("ask", QUESTION), ("chat",), ("serve",)])
def test_quantization_needs_its_extra(run_here, image_path, command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fusion_hf.common.extras.find_spec", lambda name: None)
    name, *question = command
    images = () if name == "serve" else (image_path,)
    result = run_here(name, *images, *question, "--load-in-4bit")
    assert (result.returncode, result.stdout) == (2, "")
    assert "`--load-in-4bit` needs bitsandbytes" in result.stderr and "fusion_hf[quant]" in result.stderr


def test_quantized_models_take_no_lean_imports(tmp_path: Path):
    for content, bits, lean in (({}, None, True), ({}, 8, False), ({"quantization_config": {}}, None, False)):
        (tmp_path / "config.json").write_text(json.dumps(content))
        arguments = argparse.Namespace(model=str(tmp_path), bits=bits, owns_process=True)
        assert takes_lean_imports(arguments) is lean
