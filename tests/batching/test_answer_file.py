"""What a run leaves on the disk, and that only the same run goes on with it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.questions import write_questions

from fusion_hf import FusionForConditionalGeneration, batch_generate
from fusion_hf.common.errors import InputError
from fusion_hf.common.result_log import ResultLog
from fusion_hf.inference import ChatModel
from fusion_hf.inference.answer_file import AnswerFile
from fusion_hf.inference.batching import digest_model

BEGUN = Path(__file__).parents[1] / "fixtures" / "begun"
FORMER_MODEL = b"fusion-nano@312d220e8a094794"  # its digest there
COUNT, BATCH_SIZE, NEW_TOKENS = 12, 3, 4
SETTINGS: dict[str, Any] = {"batch_size": BATCH_SIZE, "max_new_tokens": NEW_TOKENS, "progress": False}


class Stopped(Exception):
    """Stands for whatever ends a process between two batches."""


@pytest.fixture(scope="module")
def nano() -> ChatModel:
    return ChatModel.load(dtype="float32")


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write_questions(tmp_path, COUNT)[0]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "answers.jsonl"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each batch that is generated; a negative number put into it is how many more there may be."""
    rows: list[int] = []
    generate = FusionForConditionalGeneration.generate

    def noting(self: Any, input_ids: Any, **inputs: Any) -> Any:
        if rows and rows[0] < 0 and len(rows) > -rows[0]:
            raise Stopped
        rows.append(len(input_ids))
        return generate(self, input_ids=input_ids, **inputs)

    monkeypatch.setattr(FusionForConditionalGeneration, "generate", noting)
    return rows


@pytest.fixture
def stopped(nano: ChatModel, questions: Path, output: Path, calls: list[int]) -> list[int]:
    """A run that was stopped after two of its four batches."""
    calls.append(-2)
    with pytest.raises(Stopped):
        batch_generate(questions, nano, output, **SETTINGS)
    assert not output.exists()
    calls.clear()
    return calls


def partial(output: Path) -> Path:
    return output.with_name("answers.jsonl.partial")


def names(output: Path) -> set[str]:
    return {path.name for path in output.parent.iterdir() if path.name.startswith("answers")}


def test_a_stopped_run_goes_on(nano: ChatModel, questions: Path, output: Path, stopped: list[int]):
    results = batch_generate(questions, nano, output, **SETTINGS)
    assert stopped == [BATCH_SIZE] * 2
    assert results == batch_generate(questions, nano, **SETTINGS)
    assert [json.loads(line) for line in output.read_text().splitlines()] == results
    assert [result["id"] for result in results] == [f"record-{number}" for number in range(COUNT)]
    assert names(output) == {"answers.jsonl"}


def test_a_run_of_the_former_release_goes_on(nano: ChatModel, output: Path, tmp_path: Path, calls: list[int]):
    """`begun/batch.partial` was written by the former code, which a kill ended after two of four batches."""
    questions, _ = write_questions(tmp_path, 8)
    begun = (BEGUN / "batch.partial").read_bytes().replace(FORMER_MODEL, digest_model(nano).encode())
    partial(output).write_bytes(begun)
    settings = {**SETTINGS, "batch_size": 2}
    calls.append(-1)
    with pytest.raises(Stopped):
        batch_generate(questions, nano, output, **settings)
    assert partial(output).read_bytes().startswith(begun)
    calls.clear()
    results = batch_generate(questions, nano, output, **settings)
    assert calls == [2]
    assert results == batch_generate(questions, nano, **settings)
    assert names(output) == {"answers.jsonl"}


def test_a_run_is_logged_as_by_the_former_release(nano: ChatModel, output: Path, tmp_path: Path, calls: list[int]):
    questions, _ = write_questions(tmp_path, 8)
    calls.append(-2)
    with pytest.raises(Stopped):
        batch_generate(questions, nano, output, **{**SETTINGS, "batch_size": 2})
    before = (BEGUN / "batch.partial").read_bytes()
    assert partial(output).read_bytes().replace(digest_model(nano).encode(), FORMER_MODEL) == before


def test_with_another_batch_size(nano: ChatModel, questions: Path, output: Path, stopped: list[int]):
    results = batch_generate(questions, nano, output, **SETTINGS | {"batch_size": 4})
    assert sum(stopped) == COUNT - 2 * BATCH_SIZE
    assert results == batch_generate(questions, nano, **SETTINGS)


@pytest.mark.parametrize("left", [0, 1, 20, -1])
def test_a_torn_last_line(nano: ChatModel, questions: Path, output: Path, stopped: list[int], left: int):
    """Only `left` bytes of the second batch's line are there: it is made again, and again the run is stopped."""
    lines = partial(output).read_bytes().splitlines(keepends=True)
    partial(output).write_bytes(b"".join(lines[:-1]) + lines[-1][:left])
    stopped.append(-1)
    with pytest.raises(Stopped):
        batch_generate(questions, nano, output, **SETTINGS)
    assert partial(output).read_bytes() == b"".join(lines)
    stopped.clear()
    results = batch_generate(questions, nano, output, **SETTINGS)
    assert stopped == [BATCH_SIZE] * 2
    assert results == batch_generate(questions, nano, **SETTINGS)
    assert [json.loads(line) for line in output.read_text().splitlines()] == results


@pytest.mark.parametrize("left", [0, 10])
def test_a_torn_first_line(nano: ChatModel, questions: Path, output: Path, stopped: list[int], left: int):
    partial(output).write_bytes(partial(output).read_bytes()[:left])
    assert batch_generate(questions, nano, output, **SETTINGS) == batch_generate(questions, nano, **SETTINGS)
    assert stopped[:4] == [BATCH_SIZE] * 4


@pytest.mark.parametrize(
    ("number", "line"),
    [(1, b"{}\n"), (1, b"[]\n"), (2, b"{\n"), (2, b'{"results": [[99, {}]]}\n'), (3, b'{"results": [["0", {}]]}\n')],
)
def test_damage_elsewhere_is_named(nano: ChatModel, questions: Path, output: Path, stopped, number: int, line: bytes):
    lines = partial(output).read_bytes().splitlines(keepends=True)
    partial(output).write_bytes(b"".join([*lines[: number - 1], line, *lines[number:]]))
    with pytest.raises(InputError, match=f"partial is damaged in line {number}; remove it"):
        batch_generate(questions, nano, output, **SETTINGS)
    assert stopped == []


def add_record(questions: Path) -> None:
    questions.write_text(questions.read_text() + '{"question": "why?"}\n')


def change_record(questions: Path) -> None:
    questions.write_text(questions.read_text().replace("record-7", "record-0"))


def reorder_records(questions: Path) -> None:
    questions.write_text("\n".join(sorted(questions.read_text().splitlines(), reverse=True)))


@pytest.mark.parametrize(
    ("change", "settings", "part"),
    [
        (None, {"max_new_tokens": 5}, "max_new_tokens. must be 4, as .*answers.jsonl.partial began, got 5"),
        (None, {"query_len": 4}, "query_len. must be 16.* got 4"),
        (None, {"image_token_grid": 2}, "image_token_grid. must be 6.* got 2"),
        (add_record, {}, "records. must be 12.* got 13"),
        (change_record, {}, "`records_sha256` must be "),
        (reorder_records, {}, "`records_sha256` must be "),
    ],
)
def test_another_run_is_refused(
    nano: ChatModel,
    questions: Path,
    output: Path,
    stopped: list[int],
    change: Callable[[Path], None] | None,
    settings: dict[str, Any],
    part: str,
):
    before = partial(output).read_bytes()
    if change is not None:
        change(questions)
    with pytest.raises(InputError, match=part):
        batch_generate(questions, nano, output, **SETTINGS | settings)
    assert stopped == []
    assert partial(output).read_bytes() == before


def test_another_model_is_refused(nano: ChatModel, questions: Path, output: Path, stopped: list[int]):
    trained = ChatModel.load(dtype="float32")
    trained.model.model.language_model.norm.weight.data += 1
    with pytest.raises(InputError, match=r"model. must be fusion-nano@"):
        batch_generate(questions, trained, output, **SETTINGS)
    with pytest.raises(InputError, match=r"dtype. must be float32.* got bfloat16"):
        batch_generate(questions, None, output, dtype="bfloat16", **SETTINGS)


def test_a_finished_output_is_kept(nano: ChatModel, questions: Path, output: Path, calls: list[int]):
    output.write_text("precious\n")
    with pytest.raises(InputError, match=r"must be a new file, got .*answers.jsonl, which exists"):
        batch_generate(questions, nano, output, **SETTINGS)
    assert (output.read_text(), calls, names(output)) == ("precious\n", [], {"answers.jsonl"})


def test_an_unfinished_run_does_not_replace_another_output(nano, questions: Path, output: Path, stopped: list[int]):
    output.write_text("precious\n")
    with pytest.raises(InputError, match="the log of another run"):
        batch_generate(questions, nano, output, **SETTINGS)
    assert (output.read_text(), stopped) == ("precious\n", [])


def test_killed_before_the_log_is_removed(
    nano: ChatModel, questions: Path, output: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
):
    unlink = Path.unlink

    def stop(self: Path, **settings: bool) -> None:
        if self.suffix == ".partial":
            raise Stopped
        unlink(self, **settings)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Path, "unlink", stop)
        batch_generate(questions, nano, output, **SETTINGS)
    before = output.read_bytes()
    calls.clear()
    batch_generate(questions, nano, output, **SETTINGS)
    assert (output.read_bytes(), calls, names(output)) == (before, [], {"answers.jsonl"})


def test_a_batch_is_on_the_disk_before_the_next(
    nano: ChatModel, questions: Path, output: Path, monkeypatch: pytest.MonkeyPatch
):
    events: list[str] = []
    generate, fsync, replace = FusionForConditionalGeneration.generate, os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append("sync") or fsync(descriptor))
    monkeypatch.setattr(Path, "replace", lambda *paths: events.append("replace") or replace(*paths))
    monkeypatch.setattr(
        FusionForConditionalGeneration, "generate", lambda *a, **k: events.append("generate") or generate(*a, **k)
    )
    batch_generate(questions, nano, output, **SETTINGS)
    assert events == ["sync"] * 2 + ["generate", "sync"] * 4 + ["sync", "replace", "sync"]


def test_two_processes_do_not_share_an_output(nano: ChatModel, questions: Path, output: Path, calls: list[int]):
    with AnswerFile(output), pytest.raises(InputError, match="Another process is writing"):
        batch_generate(questions, nano, output, **SETTINGS)
    assert calls == []
    batch_generate(questions, nano, output, **SETTINGS)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("nowhere/answers.jsonl", "must be in an existing folder, got .*nowhere/answers.jsonl"),
        (".", "must be a file, got the folder"),
    ],
)
def test_impossible_outputs(questions: Path, tmp_path: Path, name: str, part: str):
    with pytest.raises(InputError, match=part):
        batch_generate(questions, "no/such/model", tmp_path / name)  # before a model is loaded


def test_missing_and_empty_inputs(nano: ChatModel, tmp_path: Path):
    with pytest.raises(InputError, match=r"nowhere.jsonl cannot be read"):
        batch_generate(tmp_path / "nowhere.jsonl", nano)
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(InputError, match=r"empty.jsonl must be JSON Lines.*got an empty file"):
        batch_generate(tmp_path / "empty.jsonl", nano)


def test_input_is_not_overwritten(nano: ChatModel, questions: Path):
    before = questions.read_bytes()
    with pytest.raises(InputError, match=r"must be a new file, got .*questions.jsonl, which exists"):
        batch_generate(questions, nano, questions)
    assert questions.read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
def test_disk_is_full(nano: ChatModel, questions: Path, output: Path, monkeypatch: pytest.MonkeyPatch):
    written = ResultLog.append

    with monkeypatch.context() as patch, Path("/dev/full").open("wb") as full:

        def write(self: ResultLog, entries: list[dict[str, Any]]) -> None:
            if len(self.read()) > 1 and self._stream is not None:  # a header and a batch
                self._stream.close()
                self._stream = full
            written(self, entries)

        patch.setattr(ResultLog, "append", write)
        with pytest.raises(InputError, match=r"partial cannot be written \(No space left.*same command again"):
            batch_generate(questions, nano, output, **SETTINGS)
    results = batch_generate(questions, nano, output, **SETTINGS)
    assert results == batch_generate(questions, nano, **SETTINGS)


def test_ids_of_any_characters(nano: ChatModel, output: Path):
    records = [{"id": "\ud83d", "question": "what?"}, {"id": "Füße \u2028", "question": "what?"}]
    results = batch_generate(records, nano, output, **SETTINGS)
    assert [json.loads(line) for line in output.read_text(encoding="utf-8").split("\n")[:-1]] == results
