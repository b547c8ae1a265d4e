"""`fusion-hf compare` in real processes: records of real models, lmms-eval's samples, wrong input."""

import json
from pathlib import Path

import pytest
from tests.evaluation.compared_runs import copy_nano, first_letter_missing, make_run, never_red, other_filter

SAMPLES = "docs/assets/run_{}_samples_easy_vqa.jsonl"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "a")
    make_run(folder / "b", copy_nano(folder / "nano", never_red))
    return folder / "a", folder / "b"


def test_two_records_with_a_page(run, runs, tmp_path):
    result = run("compare", *runs, "--page", tmp_path / "page.html")
    assert (result.returncode, result.stderr) == (0, "")
    assert "easy_vqa: 24 questions, in " in result.stdout and "groups with a common image" in result.stdout
    assert "exact_match: 1.0000 and 0.9167, difference -0.0833" in result.stdout
    assert "answers: 2 changed (2 worse)" in result.stdout
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<article>") == page.count("data:image/jpeg;base64,") == 2


def test_json_is_for_programs(run, runs):
    result = run("compare", *runs, "--json", "--stages")
    content = json.loads(result.stdout)
    (task,), (stages,) = content["tasks"], content["stages"]
    assert (task["changed"], task["directions"]) == (2, {"worse": 2})
    assert (stages["first"], stages["differing"]) == ("decoding", ["decoding"])
    assert [setting["name"] for setting in stages["settings"]] == ["generation_config.suppress_tokens"]
    assert [run["kind"] for run in content["runs"]] == ["fusion-hf", "fusion-hf"]
    assert result.returncode == 1


@pytest.mark.parametrize(
    ("make", "stage"),
    [
        (lambda folder: make_run(folder / "run", copy_nano(folder / "nano", other_filter)), "pixels"),
        (lambda folder: make_run(folder / "run", dtype="bfloat16"), "features"),
        (lambda folder: make_run(folder / "run", score=first_letter_missing), "scoring"),
    ],
    ids=["filter", "bfloat16", "scoring"],
)
def test_the_first_differing_stage_is_named(run, runs, tmp_path, make, stage):
    result = run("compare", runs[0], make(tmp_path), "--stages")
    assert f"easy_vqa: the first stage that differs is {stage}: " in result.stdout
    assert (result.returncode, result.stderr) == (1, "")


def test_a_model_that_has_moved(run, runs, tmp_path):
    folder = copy_nano(tmp_path / "nano")
    record = make_run(tmp_path / "run", folder)
    folder.rename(tmp_path / "moved")
    result = run("compare", runs[0], record, "--stages")
    assert result.returncode == 2 and str(folder) in result.stderr
    result = run("compare", runs[0], record, "--stages", "--model-b", tmp_path / "moved")
    assert "easy_vqa: no stage differs in 3 questions" in result.stdout
    assert result.returncode == 0


def test_an_answer_that_is_not_made_again_is_a_finding(run, runs, tmp_path):
    """As that of another engine, which a record names and this package cannot rebuild."""
    record = make_run(tmp_path / "run")
    path = tmp_path / "run/samples/now/easy_vqa.jsonl"
    path.write_text(path.read_text().replace('"answer": "red"', '"answer": "blue"', 1))
    result = run("compare", runs[0], record, "--stages")
    assert "no stage differs in 1 questions, but the recorded answers were not reproduced" in result.stdout
    assert (
        "note: RUN_B: 1 of 1 recorded answers were not reproduced, such as 'blue', which became 'red'" in result.stdout
    )
    assert result.returncode == 1


def test_samples_of_lmms_eval_in_a_process_of_their_own(run_cold):
    result = run_cold("compare", SAMPLES.format("a"), SAMPLES.format("b"))
    assert (result.returncode, result.stderr) == (0, "")
    assert "exact_match: 1.0000 and 0.9333, difference -0.0667" in result.stdout
    assert "McNemar, exact 0.125" in result.stdout


def test_answers_of_the_authors_against_a_record(run, runs, tmp_path):
    content = [json.loads(line) for line in (runs[0] / "samples/now/easy_vqa.jsonl").read_text().splitlines()]
    path = tmp_path / "answers.jsonl"
    lines = [{"question_id": s["doc_id"], "prompt": s["asked"]["messages"][0]["content"][1]["text"]} for s in content]
    texts = ["x" if number == 3 else sample["answer"] for number, sample in enumerate(content)]
    path.write_text("".join(json.dumps({**a, "text": b}) + "\n" for a, b in zip(lines, texts, strict=True)))
    result = run("compare", path, runs[0])
    assert "answers: 1 changed (1 better)" in result.stdout
    assert "RUN_A is scored by exact match" in result.stdout
    assert run("compare", path, runs[0], "--stages").stderr.startswith("error: RUN_A must be a record of `fusion-hf")


def test_answers_to_own_questions(run_here, tmp_path):
    answers = {"a": ["red", "2"], "b": ["red", "3"]}
    for name, texts in answers.items():
        lines = [json.dumps({"id": number, "answer": text}) for number, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    right = [{"question_id": 0, "text": "which?", "answer": "red"}, {"question_id": 1, "text": "?", "answer": "3"}]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, right)))
    result = run_here(
        "compare", *(tmp_path / f"{name}.jsonl" for name in answers), "--questions", tmp_path / "own.jsonl"
    )
    assert "own: 2 questions\n  exact_match: 0.5000 and 1.0000" in result.stdout and result.stderr == ""


def test_wrong_input(run_here, runs, tmp_path):
    torn = tmp_path / "t_samples_easy_vqa.jsonl"
    torn.write_text('{"doc_id": 0, "filtered_resps": "red", "target": "red"}\n{"doc_id": 1, "filt')
    twice = tmp_path / "twice" / "t_samples_easy_vqa.jsonl"
    twice.parent.mkdir()
    twice.write_text('{"doc_id": 0, "filtered_resps": "red"}\n' * 2)
    other = tmp_path / "other" / "t_samples_easy_vqa.jsonl"
    other.parent.mkdir()
    other.write_text('{"doc_id": 0, "filtered_resps": "red", "target": "square"}\n')
    for given, message in (
        (["compare", runs[0], torn], "damaged: line 2 is not valid JSON"),
        (["compare", runs[0], twice], "got question 0 twice"),
        (["compare", runs[0], other], "the same questions of easy_vqa, but question 0 has the target"),
        (["compare", runs[0], tmp_path / "gone"], "A run must be a record of"),
        (["compare", *runs, "--tasks", "pope"], "--tasks must contain only names from easy_vqa, got 'pope'."),
        (["compare", *runs, "--questions", torn], "must be answers.jsonl files if --questions is given"),
        (["compare", *runs, "--model-a", "x"], "`--model-a` is only allowed with `--stages`, got x"),
    ):
        result = run_here(*given)
        assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1, result


def test_without_scipy_the_error_names_the_extra(run_here, runs, monkeypatch):
    monkeypatch.setattr("fusion_hf.common.extras.find_spec", lambda name: None)
    result = run_here("compare", *runs)
    assert result.returncode == 2 and "scipy" in result.stderr and "fusion_hf[eval]" in result.stderr
