"""Runs of fusion-nano, and of copies of it with one planted difference, as `fusion-hf evaluate` records them.

They are made without lmms-eval: the questions are easy-vqa's, the score is an exact match.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fusion_hf.data.easy_vqa import read_easy_vqa
from fusion_hf.evaluation.answering import RequestAnswerer
from fusion_hf.evaluation.local import LocalModel
from fusion_hf.evaluation.prompting import Generation, Messages, Request
from fusion_hf.evaluation.run_record import Metric, RunRecord, TaskRecord
from fusion_hf.evaluation.sample_log import make_samples, samples_file, write_samples
from fusion_hf.inference import nano_path

Score = Callable[[str, str], float]
TASK, SAMPLES = "easy_vqa", "samples/now"
QUESTIONS = 24
WANTED = Generation(max_new_tokens=6)
WRITTEN = "{{- text + '<|im_end|>\\n' -}}"  # a user's text, in the template


def exact(answer: str, target: str) -> float:
    return float(answer == target)


def first_letter_missing(answer: str, target: str) -> float:
    """A scoring that counts nothing that begins with an r."""
    return float(answer == target and not answer.startswith("r"))


def questions(count: int = QUESTIONS) -> list[tuple[Path, str, str]]:
    """Images, questions and answers."""
    rows = [(image.path, text, answer) for image in read_easy_vqa("test")[:count] for text, answer in image.questions]
    return rows[:count]


def _conversation(path: Path, text: str) -> Messages:
    image = Image.open(path).convert("RGB")
    return [{"role": "user", "content": [{"type": "image", "url": image}, {"type": "text", "text": text}]}]


def make_run(
    output: Path,
    folder: Path | None = None,
    dtype: str = "auto",
    batch_size: int = 1,
    score: Score = exact,
    count: int = QUESTIONS,
) -> Path:
    """Answer and score questions; returns the record."""
    model = LocalModel.load(None if folder is None else str(folder), "cpu", dtype, batch_size=batch_size)
    answerer = RequestAnswerer(model, progress=False)
    rows = questions(count)
    requests = [
        Request(TASK, number, lambda path=path, text=text: _conversation(path, text), WANTED)
        for number, (path, text, _) in enumerate(rows)
    ]
    answers = [answer["answer"] for answer in answerer.answer(requests)]
    scores = [score(answer, target) for answer, (_, _, target) in zip(answers, rows, strict=True)]
    logged = [
        {
            "doc_id": number,
            "doc": {"image": str(path), "question": text},
            "target": target,
            "filtered_resps": [answer],
            "exact_match": value,
        }
        for number, ((path, text, target), answer, value) in enumerate(zip(rows, answers, scores, strict=True))
    ]
    asked = {number: each for (_, number), each in answerer.prompts.items()}
    write_samples(samples_file(output / SAMPLES, TASK), make_samples(logged, asked))
    metric = Metric("exact_match,none", sum(scores) / len(scores), None)
    task = TaskRecord(TASK, TASK, "scored", len(rows), len(rows), metrics=(metric,))
    record = RunRecord(["fusion-hf"], model.describe(), "authors", count, batch_size, 1, None, [task], samples=SAMPLES)
    with patch("fusion_hf.evaluation.run_record.PACKAGES", ("transformers", "torch")):  # lmms-eval is not needed
        return record.write(output)


def copy_nano(folder: Path, *changes: Callable[[Path], None]) -> Path:
    """A copy of fusion-nano's folder with differences."""
    shutil.copytree(nano_path(), folder)
    for change in changes:
        change(folder)
    return folder


def space_in_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    text = path.read_text(encoding="utf-8")
    assert text.count(WRITTEN) == 1
    path.write_text(text.replace(WRITTEN, WRITTEN.replace("text", "' ' + text")), encoding="utf-8")


def _edit_json(path: Path, edit: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def other_filter(folder: Path) -> None:
    """PIL's nearest pixel in place of bicubic."""
    path = folder / "processor_config.json"
    _edit_json(path, lambda content: content["image_processor"].update(resample=int(Image.Resampling.NEAREST)))


def swapped_words(folder: Path) -> None:
    """The tokenizer's ids of two words of a question."""

    def swap(content: dict) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["Ġshape"], vocabulary["Ġcolor"] = vocabulary["Ġcolor"], vocabulary["Ġshape"]

    _edit_json(folder / "tokenizer.json", swap)


def never_red(folder: Path) -> None:
    """A generation that may not write the answer `red`."""
    red = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]["red"]
    _edit_json(folder / "generation_config.json", lambda content: content["suppress_tokens"].append(red))


def changed_weight(name: str) -> Callable[[Path], None]:
    """One tensor with another number in it."""

    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights[name].view(-1)[0] += torch.tensor(1.0, dtype=weights[name].dtype)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return change


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def lines(path: Path) -> Sequence[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
