"""Score runs without scores by a file of your own questions and their right answers."""

from dataclasses import replace
from pathlib import Path

from fusion_hf.common.errors import InputError
from fusion_hf.evaluation.run_answers import AUTHORS, RunAnswers, TaskAnswers, asked_text, check_ids, read_id
from fusion_hf.evaluation.run_comparison import exact_match
from fusion_hf.evaluation.sample_log import AnsweredQuestion, find_image, read_lines

METRIC = "exact_match"  # the name that lmms-eval uses


def score_answers(run: RunAnswers, questions: Path) -> RunAnswers:
    """
    Score answers by a file of questions with the right answers. A score is 1 if both texts are equal, and 0
    otherwise.

    Args:
        run: the run of an `answers.jsonl`.
        questions: a JSON Lines file with `question_id` or `id`, `answer`, optionally `text` or `question`, and
            optionally `image`, a path relative to the file.

    Returns:
        The run as one task, named after the file.

    Raises:
        InputError: if the run has scores already, the file lacks a question that was answered, or a line has no right
            answer.
    """
    if run.kind != AUTHORS:
        raise InputError(
            f"The runs must be answers.jsonl files if --questions is given, got a run of {run.kind}: {run.path}."
        )
    known = _read_questions(questions)
    samples = []
    for sample in run.tasks[""].samples:
        question = known.get(str(sample.question_id))
        if question is None:
            raise InputError(
                f"{questions} must contain all answered questions, but lacks {sample.question_id!r} of {run.path}."
            )
        scores = {METRIC: exact_match(sample.answer, question.target)}
        asked = question.asked if sample.asked is None else sample.asked
        samples.append(replace(question, answer=sample.answer, scores=scores, asked=asked))
    name = questions.stem
    return replace(run, tasks={name: TaskAnswers(name, samples)})


def _read_questions(path: Path) -> dict[str, AnsweredQuestion]:
    """Read the questions by id, without answers."""
    found = []
    for number, entry in enumerate(read_lines(path), start=1):
        identity, target, image = read_id(entry), entry.get("answer"), entry.get("image")
        if not isinstance(identity, str | int) or not isinstance(target, str):
            raise InputError(f"{path}: line {number} must have the texts question_id and answer.")
        text = entry.get("text", entry.get("question"))
        found.append(
            AnsweredQuestion(
                number - 1,
                "",
                question_id=identity,
                target=target,
                image=find_image(str(path.parent / image)) if isinstance(image, str) else None,
                asked=asked_text(text) if isinstance(text, str) else None,
            )
        )
    check_ids([question.question_id for question in found], path)
    return {str(question.question_id): question for question in found}
