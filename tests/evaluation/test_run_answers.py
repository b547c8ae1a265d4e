"""Runs as they are on disk: records, lmms-eval's samples, the authors' answers, and files that are none."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fusion_hf.common.errors import InputError
from fusion_hf.evaluation.run_answers import check_ids, find_task, read_run
from fusion_hf.evaluation.run_record import Metric, ModelRecord, RunRecord, TaskRecord
from fusion_hf.evaluation.sample_log import (
    AnsweredQuestion,
    AskedQuestion,
    make_samples,
    read_samples,
    samples_file,
    write_samples,
)

MODEL = ModelRecord("my", "my@1", "float32", "cpu", 16, 6)
ASKED = AskedQuestion(
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}], "<image> what?", "abc", {}
)
SAMPLES = [
    AnsweredQuestion(0, "red", target="red", scores={"exact_match": 1.0}, asked=ASKED),
    AnsweredQuestion(1, "bl\ud800ue", question_id="q1", target="red", scores={"exact_match": 0.0}, image="/a.png"),
]
LMMS = [
    {"doc_id": 0, "target": "red", "filtered_resps": "red", "input": "what?", "doc_hash": "1", "exact_match": 1.0},
    {"doc_id": 1, "target": "red", "filtered_resps": "blue", "input": "what?", "doc_hash": "2", "exact_match": 0.0},
]
AUTHORS = [
    {"question_id": 7, "prompt": "what?", "text": "red", "answer_id": "x", "model_id": "fusion", "metadata": {}},
    {"question_id": 8, "prompt": "what?", "text": "blue", "answer_id": "y", "model_id": "fusion", "metadata": {}},
]


@pytest.fixture(autouse=True)
def _no_lmms_eval(monkeypatch) -> None:
    monkeypatch.setattr("fusion_hf.evaluation.run_record.PACKAGES", ("transformers",))


def write_record(folder: Path, written: list[AnsweredQuestion] | None = SAMPLES, **others) -> Path:
    task = TaskRecord("easy_vqa", "fusion_easy_vqa", "scored", 2, 2, metrics=(Metric("exact_match,none", 0.5, None),))
    record = RunRecord(["fusion-hf"], MODEL, "authors", None, 1, 1, None, [task], samples="samples/now")
    if written is not None:
        write_samples(samples_file(folder / "samples/now", "easy_vqa"), written)
    return replace(record, **others).write(folder)


def write_lines(path: Path, entries: list[dict]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


@pytest.mark.parametrize("by_folder", [False, True])
def test_a_record_has_its_samples(tmp_path, by_folder):
    path = write_record(tmp_path)
    run = read_run(tmp_path if by_folder else path)
    assert (run.kind, run.path, list(run.tasks)) == ("fusion-hf", path, ["easy_vqa"])
    assert run.tasks["easy_vqa"].samples == SAMPLES
    assert run.tasks["easy_vqa"].metrics == {"exact_match": 0.5}
    assert run.record == RunRecord.read(path) and "python" in run.versions


def test_of_several_records_in_a_folder_the_newest_counts(tmp_path):
    write_record(tmp_path)
    newest = write_record(tmp_path)
    assert read_run(tmp_path).path == newest


def test_a_record_without_samples_has_its_kept_answers(tmp_path):
    """As those of earlier releases, which have neither the field nor the settings."""
    path = write_record(tmp_path, None)
    content = json.loads(path.read_text())
    del content["samples"], content["model"]["settings"]
    path.write_text(json.dumps(content))
    (tmp_path / "answers").mkdir()
    kept = [{"key": "b", "task": "fusion_easy_vqa", "doc_id": 1, "answer": "blue"}]
    kept += [{"key": "a", "task": "fusion_easy_vqa", "doc_id": 0, "answer": "red"}]
    kept += [{"key": "c", "task": "pope", "doc_id": 0, "answer": "yes"}]
    file = write_lines(tmp_path / "answers" / "00000.jsonl", kept)
    assert read_run(path).tasks["easy_vqa"].samples == [AnsweredQuestion(0, "red"), AnsweredQuestion(1, "blue")]

    write_lines(file, [*kept, {**kept[0], "key": "d", "answer": "green"}])
    with pytest.raises(InputError, match="several answers to question 1 of easy_vqa"):
        read_run(path)
    write_lines(file, kept[:1])
    with pytest.raises(InputError, match="has only 1 of 2 answers to easy_vqa"):
        read_run(path)


def test_a_failed_task_says_why(tmp_path):
    task = TaskRecord("pope", "pope", "failed", reason="no data")
    run = read_run(write_record(tmp_path, tasks=[task]))
    assert (run.tasks["pope"].reason, run.tasks["pope"].samples) == ("it failed: no data", ())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must contain at least one answer"),
        (json.dumps(asdict(SAMPLES[0])).encode() + b"\n" + b'{"doc_id": 1, "ans', "damaged: line 2 is not valid JSON"),
        (b"[1]\n", "is damaged: line 1 is not a JSON object"),
        (b'{"doc_id": 0}\n', "line 1 must contain a sample"),
        (
            json.dumps(asdict(SAMPLES[0]) | {"scores": {"exact_match": float("nan")}}).encode(),
            "line 1 must contain a sample",
        ),
        (json.dumps(asdict(SAMPLES[0]) | {"answer": 3}).encode(), "line 1 must contain a sample"),
        (json.dumps(asdict(SAMPLES[0]) | {"doc_id": [0]}).encode(), "line 1 must contain a sample"),
        (
            json.dumps(asdict(replace(SAMPLES[0], asked=replace(ASKED, messages="x")))).encode(),
            "line 1 must contain a sample",
        ),
        (2 * (json.dumps(asdict(SAMPLES[0])).encode() + b"\n"), "got question 0 twice"),
    ],
)
def test_damaged_samples_are_named(tmp_path, content, message):
    path = write_record(tmp_path)
    samples_file(tmp_path / "samples/now", "easy_vqa").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_run(path)


def test_missing_samples_and_ways_out_of_the_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"easy_vqa\.jsonl does not exist"):
        read_run(write_record(tmp_path / "a", None))
    with pytest.raises(InputError, match=r"`samples` must be a folder in .*got '\.\./x'"):
        read_run(write_record(tmp_path / "b", None, samples="../x"))


def test_samples_of_lmms_eval(tmp_path):
    path = write_lines(tmp_path / "20260101_000000_samples_mmbench_en_dev_static.jsonl", LMMS)
    for given in (path, tmp_path):
        run = read_run(given)
        assert (run.kind, list(run.tasks)) == ("lmms-eval", ["mmbench_en"])
        first, second = run.tasks["mmbench_en"].samples
        assert (first.answer, first.scores, first.target) == ("red", {"exact_match": 1.0}, "red")
        assert second.doc_id == 1 and second.asked.messages[0]["content"][0]["text"] == "what?"
        assert run.tasks["mmbench_en"].metrics == {}
    results = {"results": {"mmbench_en_dev_static": {"alias": "x", "exact_match,none": 0.5}}}
    (tmp_path / "20260101_000000_results.json").write_text(json.dumps(results))
    assert read_run(path).tasks["mmbench_en"].metrics == {"exact_match": 0.5}
    write_lines(tmp_path / "20260102_000000_samples_mmbench_en_dev_static.jsonl", LMMS)
    with pytest.raises(InputError, match=r"several files of samples of mmbench_en\. Give one of them"):
        read_run(tmp_path)


def test_answers_of_the_authors(tmp_path):
    run = read_run(write_lines(tmp_path / "answers.jsonl", AUTHORS))
    assert (run.kind, list(run.tasks)) == ("authors", [""])
    assert [(sample.question_id, sample.answer) for sample in run.tasks[""].samples] == [(7, "red"), (8, "blue")]


@pytest.mark.parametrize(
    ("name", "entries", "message"),
    [
        ("answers.jsonl", [*AUTHORS, AUTHORS[0]], "got question 7 twice"),
        ("answers.jsonl", [{"question_id": 1}], "line 1 must have question_id and text"),
        ("t_samples_pope.jsonl", [*LMMS, LMMS[0]], "got question 0 twice"),
        ("t_samples_pope.jsonl", [{"doc_id": 0}], "line 1 must have doc_id and filtered_resps"),
        ("t_samples_pope.jsonl", [], "must contain at least one answer"),
        ("answers.txt", [], "A run must be a record"),
        ("record.json", [{"a": 1}, {"a": 2}], "is not a record of `fusion-hf evaluate`"),
    ],
)
def test_files_that_are_no_run(tmp_path, name, entries, message):
    with pytest.raises(InputError, match=message):
        read_run(write_lines(tmp_path / name, entries))


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(InputError, match=r"holds neither record-\*\.json nor \*_samples_TASK\.jsonl"):
        read_run(tmp_path)
    with pytest.raises(InputError, match=r"gone\.jsonl does not exist"):
        read_run(tmp_path / "gone.jsonl")


def test_logged_samples_become_ours(tmp_path):
    image = tmp_path / "a.png"
    image.touch()
    logged = [
        {
            "doc_id": 1,
            "doc": {"question_id": "q1", "image": str(image), "score": 3},
            "target": ["a", "b"],
            "filtered_resps": [["yes"]],
            "token_counts": [None],
            "pope_accuracy": {"score": 1.0, "prediction": "yes"},
            "passed": True,
            "words": "none",
        },
        {"doc_id": 0, "doc": {"image": "gone.png"}, "target": "b", "filtered_resps": ["x", "y"], "acc": 0.0},
        {"doc_id": 0, "doc": {}, "target": "b", "filtered_resps": ["of another filter"], "acc": 1.0},
    ]
    first, second = make_samples(logged, {1: [ASKED, ASKED], 0: [ASKED, replace(ASKED, prompt="other")]})
    assert first == AnsweredQuestion(0, "['x', 'y']", target="b", scores={"acc": 0.0})
    scores = {"pope_accuracy": 1.0, "passed": 1.0}
    assert second == AnsweredQuestion(1, "yes", "q1", "['a', 'b']", scores, str(image), ASKED)
    write_samples(tmp_path / "t.jsonl", [first, second])
    assert read_samples(tmp_path / "t.jsonl") == [first, second]


def test_tasks_by_all_their_names():
    for name in ("mmbench_en", "mmbench_en_dev_static", "fusion_mmbench_en", "lmms_mmbench_en"):
        assert find_task(name) == "mmbench_en"
    assert find_task("another") == "another"


def test_ids_are_there_once():
    check_ids([0, "0"], Path("x"))
    with pytest.raises(InputError, match="x must have each question once, got question 'a' twice"):
        check_ids(["a", "b", "a"], Path("x"))
