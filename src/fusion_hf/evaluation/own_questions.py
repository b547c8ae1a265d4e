"""Questions of your own, with their right answers: what scores a run that knows neither."""

from dataclasses import replace
from pathlib import Path

from fusion_hf.common.errors import InputError
from fusion_hf.evaluation.run_answers import AUTHORS, RunAnswers, TaskAnswers, asked_text, check_ids, read_id
from fusion_hf.evaluation.run_comparison import exact_match
from fusion_hf.evaluation.sample_log import AnsweredQuestion, find_image, read_lines

METRIC = "exact_match"  # lmms-eval's name


def score_answers(run: RunAnswers, questions: Path) -> RunAnswers:
    """
    Score the answers to a file of questions that has the right ones: a score is 1 where both are the same text.

    Args:
        run: of an `answers.jsonl`.
        questions: JSON Lines: `question_id` or `id`, `answer`, optionally `text` or `question`, and `image`, a path
            relative to the file.

    Returns:
        The run as one task, which has the file's name.

    Raises:
        InputError: If the run has scores of its own, an answer's question is not in the file, or a line has no right
            answer.
    """
    if run.kind != AUTHORS:
        raise InputError(f"{run.path} is a run of {run.kind}; allowed with --questions: an answers.jsonl.")
    known = _read_questions(questions)
    samples = []
    for sample in run.tasks[""].samples:
        question = known.get(str(sample.question_id))
        if question is None:
            raise InputError(f"{run.path} answers question {sample.question_id!r}, which is not in {questions}.")
        scores = {METRIC: exact_match(sample.answer, question.target)}
        asked = question.asked if sample.asked is None else sample.asked
        samples.append(replace(question, answer=sample.answer, scores=scores, asked=asked))
    name = questions.stem
    return replace(run, tasks={name: TaskAnswers(name, samples)})


def _read_questions(path: Path) -> dict[str, AnsweredQuestion]:
    """The questions by their ids, without answers."""
    found = []
    for number, entry in enumerate(read_lines(path), start=1):
        identity, target, image = read_id(entry), entry.get("answer"), entry.get("image")
        if not isinstance(identity, str | int) or not isinstance(target, str):
            raise InputError(f"{path} has no question_id and answer, which are texts, in line {number}.")
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
