"""Compare two runs on the same questions: which one is better, how certain that is, and which answers changed."""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from fusion_hf.common.errors import InputError, short_name
from fusion_hf.evaluation.benchmarks import BENCHMARKS, VARIANTS
from fusion_hf.evaluation.paired_statistics import PairedTest, compare_scores
from fusion_hf.evaluation.run_answers import RunAnswers, TaskAnswers
from fusion_hf.evaluation.run_record import TaskRecord
from fusion_hf.evaluation.sample_log import AnsweredQuestion

BETTER: Final = "better"
WORSE: Final = "worse"
SAME: Final = "same score"
UNKNOWN: Final = "not scored"
Direction = Literal["better", "worse", "same score", "not scored"]
SIDES = ("RUN_A", "RUN_B")


@dataclass(frozen=True)
class Pair:
    """The same question in both runs."""

    first: AnsweredQuestion
    second: AnsweredQuestion

    @property
    def question(self) -> str | None:
        """The text of the user, or None if neither run has it."""
        return next((text for text in map(question_text, (self.first, self.second)) if text is not None), None)

    @property
    def is_changed(self) -> bool:
        """Whether the answers differ."""
        return self.first.answer != self.second.answer

    @property
    def cluster(self) -> Hashable:
        """Key of the image. Questions about the same image depend on each other."""
        for sample in (self.first, self.second):
            if sample.asked is not None and sample.asked.image_sha256 is not None:
                return sample.asked.image_sha256
        return self.first.image or self.second.image or ("question", self.first.doc_id)

    def direction(self, metrics: Sequence[str]) -> Direction:
        """
        Return how the score of the first metric that this question has in both runs has changed.

        Args:
            metrics: the metrics in order of preference.
        """
        for metric in metrics:
            if metric in self.first.scores and metric in self.second.scores:
                difference = self.second.scores[metric] - self.first.scores[metric]
                return BETTER if difference > 0 else WORSE if difference < 0 else SAME
        return UNKNOWN


@dataclass(frozen=True)
class MetricComparison:
    """
    One metric of a task in both runs.

    Attributes:
        metric: the name of the metric in lmms-eval.
        figures: the values that the runs report. None if they report none, or for other questions.
        test: the comparison of the scores of single questions, in lmms-eval's unit.
    """

    metric: str
    figures: tuple[float | None, float | None]
    test: PairedTest


@dataclass(frozen=True)
class TaskComparison:
    """
    One task in both runs.

    Attributes:
        task: the name of the task.
        pairs: the questions that both runs have.
        alone: how many questions only the first run has, and how many only the second.
        metrics: the metrics by which both runs score questions.
        notes: what readers need to know, in sentences.
    """

    task: str
    pairs: Sequence[Pair]
    alone: tuple[int, int]
    metrics: Sequence[MetricComparison]
    notes: Sequence[str]

    @property
    def changed(self) -> list[Pair]:
        """The questions whose answers differ."""
        return [pair for pair in self.pairs if pair.is_changed]

    def direction(self, pair: Pair) -> Direction:
        """
        Return how the score of a changed answer has changed.

        Args:
            pair: the question in both runs.
        """
        return pair.direction([metric.metric for metric in self.metrics])

    @property
    def directions(self) -> dict[Direction, int]:
        """The number of changed answers that score better, worse and the same."""
        return dict(Counter(map(self.direction, self.changed)))


def compare_runs(first: RunAnswers, second: RunAnswers, names: Sequence[str] | None = None) -> list[TaskComparison]:
    """
    Compare the tasks that two runs have in common.

    Args:
        first: the first run.
        second: the second run.
        names: the names of tasks to compare. None compares all.

    Raises:
        InputError: if there is no common task, or a task has different questions in the second run.
    """
    common = {name: (a, b) for name, a, b in _pair_tasks(first, second)}
    for name in names or ():
        if name not in common:
            raise InputError(f"--tasks must contain only names from {', '.join(common) or 'none'}, got {name!r}.")
    pairs = [(name, *common[name]) for name in (common if names is None else names)]
    compared = []
    for name, a, b in pairs:
        if a.reason is None and b.reason is None:
            compared.append(_compare_task(name, a, b, _record_notes(name, first, second)))
    if not compared:
        reasons = [f"{a.reason or b.reason} ({name})" for name, a, b in pairs]
        told = "; ".join(reasons) if reasons else f"{_listed(first)} and {_listed(second)}"
        raise InputError(f"The runs must have a scored task in common: {told}.")
    return compared


def missing_tasks(first: RunAnswers, second: RunAnswers) -> list[str]:
    """
    List the tasks that cannot be compared, with the reasons.

    Args:
        first: the first run.
        second: the second run.
    """
    paired = {name for name, _, _ in _pair_tasks(first, second)}
    lines = [
        f"{task.task} is only in {side}."
        for side, run in zip(SIDES, (first, second), strict=True)
        for task in run.tasks.values()
        if task.task and task.task not in paired
    ]
    for name, *tasks in _pair_tasks(first, second):
        failed = [(side, task.reason) for side, task in zip(SIDES, tasks, strict=True) if task.reason is not None]
        lines += [f"{name} cannot be compared: in {side} {reason}" for side, reason in failed]
    return lines


def _listed(run: RunAnswers) -> str:
    return ", ".join(run.tasks) or "nothing"


def _pair_tasks(first: RunAnswers, second: RunAnswers) -> Iterator[tuple[str, TaskAnswers, TaskAnswers]]:
    """Pair tasks of the same name. Answers without a task belong to the only task of the other run."""
    for name, task in first.tasks.items():
        others = second.tasks
        if name in others:
            yield name, task, others[name]
        elif not name and len(others) == 1:
            (other,) = others.values()
            yield other.task, task, other
        elif "" in others and len(first.tasks) == 1:
            yield name, task, others[""]


def _compare_task(name: str, first: TaskAnswers, second: TaskAnswers, notes: list[str]) -> TaskComparison:
    pairs, alone = _align(name, first, second)
    if any(alone):
        notes = [
            *notes,
            f"{alone[0]} questions are only in {SIDES[0]} and {alone[1]} only in {SIDES[1]}. They are left out.",
        ]
    pairs, scored_note = _with_scores(pairs)
    others = [pair for pair in pairs if _has_other_words(pair)]
    if others:
        notes = [*notes, f"{len(others)} questions have different wording in the two runs."]
    if not any(isinstance(pair.cluster, str) for pair in pairs):
        notes = [*notes, "Neither run says which questions share an image, so all count as independent."]
    metrics = [_compare_metric(metric, pairs, first, second, alone) for metric in _metric_names(name, pairs)]
    if not metrics:
        notes = [*notes, _why_not_scored(name, pairs)]
    return TaskComparison(name, pairs, alone, metrics, [*notes, *scored_note])


def _compare_metric(
    metric: str, pairs: Sequence[Pair], first: TaskAnswers, second: TaskAnswers, alone: tuple[int, int]
) -> MetricComparison:
    scored = [pair for pair in pairs if metric in pair.first.scores and metric in pair.second.scores]
    test = compare_scores(
        [pair.first.scores[metric] for pair in scored],
        [pair.second.scores[metric] for pair in scored],
        [pair.cluster for pair in scored],
    )
    figures = [None if lost else task.metrics.get(metric) for task, lost in zip((first, second), alone, strict=True)]
    return MetricComparison(metric, (figures[0], figures[1]), test)


def _metric_names(task: str, pairs: Sequence[Pair]) -> list[str]:
    """Return the metrics that both runs have: those of the published numbers for a benchmark, and all otherwise."""
    common = {
        name: None for pair in pairs for name in pair.first.scores if name in pair.second.scores
    }  # keeps their order
    benchmark = BENCHMARKS.get(task, VARIANTS.get(task))
    published = [] if benchmark is None else [metric.partition(",")[0] for metric in benchmark.metrics]
    return [name for name in published if name in common] or list(common)


def _why_not_scored(task: str, pairs: Sequence[Pair]) -> str:
    if not task:
        return "Files of answers have no scores, so only answers are compared. Give the right ones with --questions."
    sides = [
        side
        for side, scored in zip(
            SIDES, (any(p.first.scores for p in pairs), any(p.second.scores for p in pairs)), strict=True
        )
        if not scored
    ]
    if not sides:
        return "The runs use different metrics, so only answers are compared."
    return (
        f"{' and '.join(sides)} has no scores of single questions, so only answers are compared. Run `fusion-hf "
        "evaluate` again with the same command to write them. It reuses all answers."
    )


def _align(name: str, first: TaskAnswers, second: TaskAnswers) -> tuple[list[Pair], tuple[int, int]]:
    """
    Pair the questions of both runs, and count those that only one run has. Raise an InputError if the questions
    differ.
    """
    for keys in _key_choices(first, second):
        common = [key for key in keys[0] if key in keys[1]]
        if common:
            break
    else:
        raise InputError(f"The runs must have at least one question of {name} in common.")
    pairs = [Pair(keys[0][key], keys[1][key]) for key in common]
    for key, pair in zip(common, pairs, strict=True):
        contradiction = _contradiction(pair)
        if contradiction is not None:
            raise InputError(
                f"The runs must have the same questions of {name}, but question {key} has {contradiction}."
            )
    return pairs, (len(keys[0]) - len(common), len(keys[1]) - len(common))


def _key_choices(
    first: TaskAnswers, second: TaskAnswers
) -> Iterator[tuple[dict[str, AnsweredQuestion], dict[str, AnsweredQuestion]]]:
    """Yield samples by each possible key of questions: their number or, if the authors give ids, first the id."""
    if first.task and second.task:
        yield _by_number(first), _by_number(second)
        return
    ours, authors = (second, first) if second.task else (first, second)
    theirs = _by_id(authors)
    for own in (_by_id(ours), _by_number(ours) if ours.task else {}):
        yield (theirs, own) if ours is second else (own, theirs)


def _by_number(task: TaskAnswers) -> dict[str, AnsweredQuestion]:
    return {str(sample.doc_id): sample for sample in task.samples}


def _by_id(task: TaskAnswers) -> dict[str, AnsweredQuestion]:
    """Return samples by id, empty if questions have no ids of their own."""
    found = {str(sample.question_id): sample for sample in task.samples if sample.question_id is not None}
    return found if len(found) == len(task.samples) else {}


def _contradiction(pair: Pair) -> str | None:
    """Describe why a pair is not the same question, or return None."""
    targets = [None if sample.target is None else sample.target.strip() for sample in (pair.first, pair.second)]
    texts = [question_text(sample) for sample in (pair.first, pair.second)]
    if None not in targets:
        if targets[0] == targets[1]:
            return None
        return f"the target {short_name(repr(targets[0]))} and {short_name(repr(targets[1]))}"
    if None in texts or _is_within(str(texts[0]), str(texts[1])):
        return None
    return f"the words {short_name(repr(texts[0]))} and {short_name(repr(texts[1]))}"


def _is_within(first: str, second: str) -> bool:
    """Return whether one text contains the other, as a prompt with an instruction contains its question."""
    a, b = ("".join(text.split()).lower() for text in (first, second))
    return a in b or b in a


def _has_other_words(pair: Pair) -> bool:
    texts = [question_text(sample) for sample in (pair.first, pair.second)]
    return None not in texts and texts[0] != texts[1]


def question_text(sample: AnsweredQuestion) -> str | None:
    """
    Return the text of the user, or None if the run does not have it.

    Args:
        sample: the answered question.
    """
    if sample.asked is None:
        return None
    blocks = [block for message in sample.asked.messages if message["role"] == "user" for block in message["content"]]
    return "\n".join(block["text"] for block in blocks if block["type"] == "text")


def _with_scores(pairs: list[Pair]) -> tuple[list[Pair], list[str]]:
    """
    Score a run without scores by exact match, if that reproduces all scores of the other run, and add a note
    about it.
    """
    scored = [any(pair.first.scores for pair in pairs), any(pair.second.scores for pair in pairs)]
    if all(scored) or not any(scored):
        return pairs, []
    known = [pair.first if scored[0] else pair.second for pair in pairs]
    metric = next((name for name in known[0].scores if _gives_exact_match(name, known)), None)
    if metric is None:
        return pairs, []
    made = []
    for pair, sample in zip(pairs, known, strict=True):
        other = pair.second if scored[0] else pair.first
        mended = AnsweredQuestion(**{**vars(other), "scores": {metric: exact_match(other.answer, sample.target)}})
        made.append(Pair(pair.first, mended) if scored[0] else Pair(mended, pair.second))
    side = SIDES[1] if scored[0] else SIDES[0]
    return made, [f"{side} is scored by exact match, which reproduces every {metric} of the other run."]


def _gives_exact_match(metric: str, samples: Sequence[AnsweredQuestion]) -> bool:
    return all(
        metric in sample.scores and sample.scores[metric] == exact_match(sample.answer, sample.target)
        for sample in samples
    )


def exact_match(answer: str, target: str | None) -> float:
    """
    Score an answer: 1 if it equals the right text apart from surrounding white space, and 0 otherwise.

    Args:
        answer: the answer.
        target: the right text.
    """
    return float(target is not None and answer.strip() == target.strip())


def _record_notes(name: str, first: RunAnswers, second: RunAnswers) -> list[str]:
    """Describe what the records say was done differently."""
    if first.record is None or second.record is None:
        return []
    notes = []
    if first.record.prompts != second.record.prompts:
        notes.append(f"The runs use different prompts: {first.record.prompts} and {second.record.prompts}.")
    judges = [_task_record(run, name).judge for run in (first, second)]
    if judges[0] != judges[1]:
        notes.append(f"The runs use different judges: {judges[0]} and {judges[1]}.")
    return notes


def _task_record(run: RunAnswers, name: str) -> TaskRecord:
    assert run.record is not None
    return next(task for task in run.record.tasks if task.task == name)
