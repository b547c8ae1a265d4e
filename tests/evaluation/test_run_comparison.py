"""Two runs of the same questions: what is paired, counted, refused, and what is written of it."""

import json
from pathlib import Path

import pytest
from PIL import Image

from fusion_hf.common.errors import InputError
from fusion_hf.evaluation.comparison_page import MOST, write_page
from fusion_hf.evaluation.comparison_report import describe_comparison, write_text
from fusion_hf.evaluation.run_answers import AUTHORS, LMMS_EVAL, OURS, RunAnswers, TaskAnswers
from fusion_hf.evaluation.run_comparison import TaskComparison, compare_runs, missing_tasks
from fusion_hf.evaluation.run_record import ModelRecord, RunRecord, TaskRecord
from fusion_hf.evaluation.sample_log import AnsweredQuestion, AskedQuestion

METRIC = "exact_match"
TARGETS = ["red", "blue", "yes", "no", "red", "circle", "blue", "yes"]
CORRECT = [1, 1, 1, 0, 0, 1, 1, 0]


def asked(text: str, image: str | None) -> AskedQuestion:
    blocks = [{"type": "image"}, {"type": "text", "text": text}]
    return AskedQuestion([{"role": "user", "content": blocks}], text, image, {})


def samples(correct: list[int] = CORRECT, metric: str | None = METRIC, **others) -> list[AnsweredQuestion]:
    """One question after the other; two are about the same image."""
    return [
        AnsweredQuestion(
            number,
            TARGETS[number] if right else "wrong",
            target=TARGETS[number],
            scores={} if metric is None else {metric: float(right)},
            asked=asked(f"question {number}?", f"image {number // 2}"),
            **others,
        )
        for number, right in enumerate(correct)
    ]


def make(first: list[AnsweredQuestion], task: str = "easy_vqa", kind=OURS, **figures: float) -> RunAnswers:
    return RunAnswers(Path("run"), kind, {task: TaskAnswers(task, first, figures)})


def authors(texts: list[str], ids: list | None = None, prompts: list[str] | None = None) -> RunAnswers:
    found = [
        AnsweredQuestion(i, text, question_id=ids[i] if ids else i, asked=asked(prompts[i], None) if prompts else None)
        for i, text in enumerate(texts)
    ]
    return RunAnswers(Path("answers.jsonl"), AUTHORS, {"": TaskAnswers("", found)})


def compare(first: RunAnswers, second: RunAnswers) -> TaskComparison:
    (task,) = compare_runs(first, second)
    return task


def test_scores_are_paired_and_clustered_by_image():
    task = compare(make(samples()), make(samples([1, 1, 0, 1, 1, 1, 1, 0])))
    (metric,) = task.metrics
    test = metric.test
    assert (metric.metric, test.questions, test.clusters) == (METRIC, 8, 4)
    assert (test.first, test.second, test.won, test.lost) == (5 / 8, 6 / 8, 2, 1)
    assert task.directions == {"better": 2, "worse": 1}
    assert [pair.first.doc_id for pair in task.changed] == [2, 3, 4]
    assert task.notes == [] and task.alone == (0, 0)


def test_changed_answers_of_the_same_score_are_counted():
    other = samples()
    vars(other[3])["answer"] = "wrong in another way"
    task = compare(make(samples()), make(other))
    assert task.directions == {"same score": 1}
    assert task.metrics[0].test.difference == 0


def test_questions_with_metrics_of_their_own_are_told_by_these():
    """As MME's, of which one half has the score of perception, the other that of cognition."""
    runs = [samples(), samples([0, 1, 1, 0, 0, 1, 1, 1])]
    for run in runs:
        for sample in run[4:]:
            vars(sample)["scores"] = {"cognition": sample.scores[METRIC]}
    task = compare(*(make(run, "mine") for run in runs))
    assert [(metric.metric, metric.test.questions) for metric in task.metrics] == [(METRIC, 4), ("cognition", 4)]
    assert task.directions == {"worse": 1, "better": 1}


def test_too_few_questions_can_show_nothing():
    runs = make(samples()[:3]), make(samples([0, 1, 1]))
    assert "too few questions to detect a difference: at least 6 scores must change" in write_text(
        *runs, compare_runs(*runs)
    )


def test_the_intersection_is_stated():
    task = compare(make(samples()[:6], exact_match=0.9), make(samples()[2:], exact_match=0.8))
    assert (len(task.pairs), task.alone) == (4, (2, 2))
    assert "2 questions are only in RUN_A and 2 only in RUN_B. They are left out." in task.notes
    assert task.metrics[0].figures == (None, None)  # they are of other questions
    assert compare(make(samples(), exact_match=0.9), make(samples())).metrics[0].figures == (0.9, None)


def test_other_questions_are_refused():
    other = samples()
    vars(other[5])["target"] = "square"
    with pytest.raises(
        InputError, match="the same questions of easy_vqa, but question 5 has the target 'circle' and 'square'"
    ):
        compare(make(samples()), make(other))
    shifted = [AnsweredQuestion(sample.doc_id + 100, sample.answer) for sample in samples()]
    with pytest.raises(InputError, match="at least one question of easy_vqa in common"):
        compare(make(samples()), make(shifted))


def test_runs_without_a_common_task_are_refused():
    with pytest.raises(InputError, match="a scored task in common: easy_vqa and pope"):
        compare(make(samples()), make(samples(), "pope"))
    failed = RunAnswers(Path("run"), OURS, {"easy_vqa": TaskAnswers("easy_vqa", reason="it failed: no data")})
    with pytest.raises(InputError, match=r"a scored task in common: it failed: no data \(easy_vqa\)"):
        compare(make(samples()), failed)
    with pytest.raises(InputError, match="--tasks must contain only names from easy_vqa, got 'mme'"):
        compare_runs(make(samples()), make(samples()), ["mme"])


def test_missing_tasks_are_named():
    first, second = make(samples()), make(samples())
    first.tasks["pope"] = TaskAnswers("pope", samples())
    second.tasks["mme"] = TaskAnswers("mme", reason="it failed: no data")
    first.tasks["mme"] = TaskAnswers("mme", samples())
    assert missing_tasks(first, second) == [
        "pope is only in RUN_A.",
        "mme cannot be compared: in RUN_B it failed: no data",
    ]
    assert [task.task for task in compare_runs(first, second)] == ["easy_vqa"]


def test_what_records_say_is_noted():
    model = ModelRecord("my", "my@1", "float32", "cpu", 16, 6)
    runs = []
    for prompts, judge in (("authors", "gpt-4"), ("lmms-eval", None)):
        task = TaskRecord("easy_vqa", "easy_vqa", "scored", 8, 8, judge=judge)
        record = RunRecord([], model, prompts, None, 1, 1, None, [task])
        runs.append(RunAnswers(Path("r"), OURS, {"easy_vqa": TaskAnswers("easy_vqa", samples())}, record))
    assert compare(*runs).notes == [
        "The runs use different prompts: authors and lmms-eval.",
        "The runs use different judges: gpt-4 and None.",
    ]


def test_samples_of_lmms_eval_are_one_side():
    theirs = [
        AnsweredQuestion(s.doc_id, s.answer, target=s.target, scores={METRIC: s.scores[METRIC]}) for s in samples()
    ]
    task = compare(make(samples([1] * 8)), make(theirs, kind=LMMS_EVAL))
    assert task.metrics[0].test.clusters == 4  # the images are those of the other run
    assert task.metrics[0].test.lost == 3


@pytest.mark.parametrize("ids", [list(range(8)), [f"q{i}" for i in range(8)]])
def test_answers_of_the_authors_are_one_side(ids):
    """They are matched by the benchmark's ids, or by numbers, and scored as the other run was."""
    own = samples()
    for sample in own:
        vars(sample)["question_id"] = f"q{sample.doc_id}"
    texts = [target if i != 1 else "wrong" for i, target in enumerate(TARGETS)]
    for task in (compare(make(own), authors(texts, ids)), compare(authors(texts, ids), make(own))):
        (metric,) = task.metrics
        assert (task.task, metric.metric) == ("easy_vqa", METRIC)
        assert {metric.test.first, metric.test.second} == {5 / 8, 7 / 8}
        assert any(
            "scored by exact match, which reproduces every exact_match of the other run" in n for n in task.notes
        )


def test_other_scoring_than_exact_match_is_not_guessed():
    own = samples(metric="anls")
    vars(own[0])["scores"] = {"anls": 0.5}
    task = compare(make(own), authors(TARGETS))
    assert task.metrics == []
    assert any("RUN_B has no scores of single questions" in note for note in task.notes)
    assert task.directions == {"not scored": 3}


def test_answers_to_other_questions_are_refused():
    prompts = [f"Question {i}?\nAnswer with one word." for i in range(8)]
    assert compare(authors(TARGETS, prompts=prompts), make(without_targets())).alone == (0, 0)
    prompts[4] = "What is this?"
    with pytest.raises(InputError, match="question 4 has the words "):
        compare(authors(TARGETS, prompts=prompts), make(without_targets()))


def without_targets() -> list[AnsweredQuestion]:
    return [AnsweredQuestion(**{**vars(sample), "target": None}) for sample in samples()]


def test_answers_of_the_authors_on_both_sides():
    task = compare(authors(TARGETS), authors([*TARGETS[:-1], "wrong"]))
    assert (len(task.pairs), len(task.changed), task.metrics) == (8, 1, [])
    assert any("Neither run says which questions share an image" in note for note in task.notes)


def test_text_and_json_say_the_same():
    runs = make(samples(), exact_match=0.7), make(samples([1, 1, 0, 1, 1, 1, 1, 0]))
    tasks = compare_runs(*runs)
    text, content = write_text(*runs, tasks), describe_comparison(*runs, tasks)
    (metric,) = json.loads(json.dumps(content))["tasks"][0]["metrics"]
    assert f"0.6250 and 0.7500, difference {metric['difference']:+.4f}" in text
    assert "the runs report 0.7000 and unknown" in text
    assert f"95% interval {metric['interval']['low']:+.4f} to {metric['interval']['high']:+.4f}" in text
    assert "answers: 3 changed (1 worse, 2 better)" in text
    assert f"detect a difference of {metric['detectable']:.4f} with a power of 80%" in text
    assert "fewer than 6 changed scores (0.7500 of all) can never be significant" in text
    assert [change["direction"] for change in content["tasks"][0]["changes"]] == ["worse", "better", "better"]


def test_the_page_shows_what_changed_and_is_escaped(tmp_path):
    Image.new("RGB", (900, 600), "red").save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_text("no image")
    first, second = samples(), samples([0, 0, 0, 0, 0, 0, 0, 0])
    vars(first[0])["image"] = str(tmp_path / "a.png")
    vars(second[1])["image"] = str(tmp_path / "broken.png")
    vars(second[0])["answer"] = "<script>alert('x')</script>\ud800"
    runs = make(first), make(second)
    page = write_page(*runs, compare_runs(*runs))
    page.encode()
    assert "<script" not in page and "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;\\ud800" in page
    assert page.count('<img alt="" src="data:image/jpeg;base64,') == 1
    assert page.count("Neither run names the file of this image.") == 3
    assert "broken.png cannot be shown: " in page
    assert "5 of 8 answers changed" in page and "worse in RUN_B: 5" in page
    assert 'src="http' not in page and "href" not in page


def test_the_page_is_bounded():
    count = MOST + 5
    first = [AnsweredQuestion(i, "yes", target="yes", scores={METRIC: 1.0}) for i in range(count)]
    second = [AnsweredQuestion(i, "no", target="yes", scores={METRIC: 0.0}) for i in range(count)]
    runs = make(first), make(second)
    page = write_page(*runs, compare_runs(*runs))
    assert page.count("<article>") == MOST
    assert f"worse in RUN_B: {count}, the first {MOST}" in page
