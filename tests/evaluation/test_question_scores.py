"""Scores of single questions, where a task of lmms-eval counts all together; without lmms-eval."""

from pathlib import Path
from types import SimpleNamespace

from fusion_hf.evaluation.question_scores import keep_results, score_questions


def share_of_hits(results: list[dict]) -> float:
    """As MathVista's: it changes what it is given."""
    return 100 * sum(result.pop("hit") for result in results) / len(results)


def written(results: list[dict], args) -> float:
    """As those that write a file of all answers."""
    path = Path(args.output_path) / "answers.json"
    assert not path.exists()
    path.write_text(str(results))
    return sum(result["hit"] for result in results)


def f1(results: list[dict]) -> float:
    return 1 / sum(result["hit"] for result in results)


def mean(results: list[float]) -> float:
    raise AssertionError("questions that have a number are not aggregated")


def test_questions_are_scored_one_by_one(tmp_path):
    task = SimpleNamespace(
        process_results=lambda doc, results: {"hits": (both := {"hit": doc == results[0]}), "f1": both, "acc": 0.5}
    )
    kept = keep_results(task)
    logged = [task.process_results(doc, [answer]) for doc, answer in (("a", "a"), ("a", "b"))]
    share_of_hits([entry["hits"] for entry in logged])  # what lmms-eval does before
    aggregations = {"hits": share_of_hits, "f1": f1, "acc": mean, "other": mean}
    scored = list(score_questions(logged, kept, aggregations, ["hits", "f1", "acc", "unknown", "other"]))
    assert [entry["hits"] for entry in scored] == [100.0, 0.0]
    assert [entry["acc"] for entry in scored] == [0.5, 0.5]
    assert scored[0]["f1"] == 1.0
    assert scored[1]["f1"] == {"hit": False}  # of one question alone there is none


def test_files_of_aggregations_go_nowhere():
    entries = [{"hits": {"hit": 1}}]
    (scored,) = score_questions(entries, entries, {"hits": written}, ["hits"])
    assert scored == {"hits": 1.0}
    (again,) = score_questions(entries, entries, {"hits": written}, ["hits"])  # nothing is left of the first
    assert again == scored
