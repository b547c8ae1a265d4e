"""Two runs of the same questions: which is better, what that is worth, and which answers changed."""

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
        """The user's words; None if no run knows them."""
        return next((text for text in map(question_text, (self.first, self.second)) if text is not None), None)

    @property
    def is_changed(self) -> bool:
        """Whether the answers differ."""
        return self.first.answer != self.second.answer

    @property
    def cluster(self) -> Hashable:
        """What questions that depend on each other have in common: the image."""
        for sample in (self.first, self.second):
            if sample.asked is not None and sample.asked.image_sha256 is not None:
                return sample.asked.image_sha256
        return self.first.image or self.second.image or ("question", self.first.doc_id)

    def direction(self, metrics: Sequence[str]) -> Direction:
        """What the change did to the score: to the first of the metrics that this question has in both runs."""
        for metric in metrics:
            if metric in self.first.scores and metric in self.second.scores:
                difference = self.second.scores[metric] - self.first.scores[metric]
                return BETTER if difference > 0 else WORSE if difference < 0 else SAME
        return UNKNOWN


@dataclass(frozen=True)
class MetricComparison:
    """
    A metric of a task in both runs.

    Attributes:
        metric: Its name in lmms-eval.
        figures: What the runs report; None where they do not, or of other questions than these.
        test: Of the scores of single questions, in lmms-eval's unit.
    """

    metric: str
    figures: tuple[float | None, float | None]
    test: PairedTest


@dataclass(frozen=True)
class TaskComparison:
    """
    A task in both runs.

    Attributes:
        pairs: The questions that both runs have.
        alone: How many questions only the first run has, and only the second.
        metrics: What both runs score each question by.
        notes: What a reader has to know, in sentences.
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
        """What the change of an answer did to its score."""
        return pair.direction([metric.metric for metric in self.metrics])

    @property
    def directions(self) -> dict[Direction, int]:
        """How many changed answers score better, worse, the same."""
        return dict(Counter(map(self.direction, self.changed)))


def compare_runs(first: RunAnswers, second: RunAnswers, names: Sequence[str] | None = None) -> list[TaskComparison]:
    """
    Compare the tasks that two runs have in common.

    Args:
        first, second: The runs.
        names: Of the tasks; None: all.

    Raises:
        InputError: If they have no task in common, or a task has other questions in the second run.
    """
    common = {name: (a, b) for name, a, b in _pair_tasks(first, second)}
    for name in names or ():
        if name not in common:
            raise InputError(f"--tasks has {name!r}; allowed: {', '.join(common) or 'none'}.")
    pairs = [(name, *common[name]) for name in (common if names is None else names)]
    compared = []
    for name, a, b in pairs:
        if a.reason is None and b.reason is None:
            compared.append(_compare_task(name, a, b, _record_notes(name, first, second)))
    if not compared:
        reasons = [f"{a.reason or b.reason} ({name})" for name, a, b in pairs]
        told = "; ".join(reasons) if reasons else f"{_listed(first)} and {_listed(second)}"
        raise InputError(f"The runs have no scored task in common: {told}.")
    return compared


def missing_tasks(first: RunAnswers, second: RunAnswers) -> list[str]:
    """Say which tasks cannot be compared, and why."""
    paired = {name for name, _, _ in _pair_tasks(first, second)}
    lines = [
        f"{task.task} is in {side} alone."
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
    """Tasks of the same name; the authors' answers, which belong to no task, are those of the other run's only one."""
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
        notes = [*notes, f"{alone[0]} questions are in {SIDES[0]} alone, {alone[1]} in {SIDES[1]} alone; left out."]
    pairs, scored_note = _with_scores(pairs)
    others = [pair for pair in pairs if _has_other_words(pair)]
    if others:
        notes = [*notes, f"{len(others)} questions are asked in other words."]
    if not any(isinstance(pair.cluster, str) for pair in pairs):
        notes = [*notes, "No run says which questions are about the same image: each counts as independent."]
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
    """What both runs score questions by: of a benchmark the metrics of its published figures, else all."""
    common = {
        name: None for pair in pairs for name in pair.first.scores if name in pair.second.scores
    }  # in their order
    benchmark = BENCHMARKS.get(task, VARIANTS.get(task))
    published = [] if benchmark is None else [metric.partition(",")[0] for metric in benchmark.metrics]
    return [name for name in published if name in common] or list(common)


def _why_not_scored(task: str, pairs: Sequence[Pair]) -> str:
    if not task:
        return "Answers alone have no scores: only the answers are compared. --questions names the right ones."
    sides = [
        side
        for side, scored in zip(
            SIDES, (any(p.first.scores for p in pairs), any(p.second.scores for p in pairs)), strict=True
        )
        if not scored
    ]
    if not sides:
        return "The runs score by other metrics: only the answers are compared."
    return (
        f"{' and '.join(sides)} has no scores of single questions: only the answers are compared. Run `fusion-hf "
        "evaluate` again with the same command: it writes them, and asks nothing twice."
    )


def _align(name: str, first: TaskAnswers, second: TaskAnswers) -> tuple[list[Pair], tuple[int, int]]:
    """The questions of both runs, and how many each has alone; an InputError if they are others."""
    for keys in _key_choices(first, second):
        common = [key for key in keys[0] if key in keys[1]]
        if common:
            break
    else:
        raise InputError(f"The runs have no question of {name} in common.")
    pairs = [Pair(keys[0][key], keys[1][key]) for key in common]
    for key, pair in zip(common, pairs, strict=True):
        contradiction = _contradiction(pair)
        if contradiction is not None:
            raise InputError(f"The runs have other questions of {name}: question {key} has {contradiction}.")
    return pairs, (len(keys[0]) - len(common), len(keys[1]) - len(common))


def _key_choices(
    first: TaskAnswers, second: TaskAnswers
) -> Iterator[tuple[dict[str, AnsweredQuestion], dict[str, AnsweredQuestion]]]:
    """Samples by what identifies a question: its number or, where the authors give ids, the benchmark's id first."""
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
    """Empty if questions have no ids of their own."""
    found = {str(sample.question_id): sample for sample in task.samples if sample.question_id is not None}
    return found if len(found) == len(task.samples) else {}


def _contradiction(pair: Pair) -> str | None:
    """What shows that a pair is not the same question; None if nothing does."""
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
    """Whether one text has the other in it, as where a prompt has an instruction behind the question."""
    a, b = ("".join(text.split()).lower() for text in (first, second))
    return a in b or b in a


def _has_other_words(pair: Pair) -> bool:
    texts = [question_text(sample) for sample in (pair.first, pair.second)]
    return None not in texts and texts[0] != texts[1]


def question_text(sample: AnsweredQuestion) -> str | None:
    """The user's words; None where a run does not know them."""
    if sample.asked is None:
        return None
    blocks = [block for message in sample.asked.messages if message["role"] == "user" for block in message["content"]]
    return "\n".join(block["text"] for block in blocks if block["type"] == "text")


def _with_scores(pairs: list[Pair]) -> tuple[list[Pair], list[str]]:
    """
    Score a run that has no scores by exact match, if that gives every score of the other run; and the note on it.
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
    return made, [f"{side} is scored here by exact match, which gives every {metric} of the other run."]


def _gives_exact_match(metric: str, samples: Sequence[AnsweredQuestion]) -> bool:
    return all(
        metric in sample.scores and sample.scores[metric] == exact_match(sample.answer, sample.target)
        for sample in samples
    )


def exact_match(answer: str, target: str | None) -> float:
    """Score an answer: 1 where it is the right text, white space around it aside."""
    return float(target is not None and answer.strip() == target.strip())


def _record_notes(name: str, first: RunAnswers, second: RunAnswers) -> list[str]:
    """What the records say was done otherwise."""
    if first.record is None or second.record is None:
        return []
    notes = []
    if first.record.prompts != second.record.prompts:
        notes.append(f"The prompts are those of {first.record.prompts} and of {second.record.prompts}.")
    judges = [_task_record(run, name).judge for run in (first, second)]
    if judges[0] != judges[1]:
        notes.append(f"The judges are {judges[0]} and {judges[1]}.")
    return notes


def _task_record(run: RunAnswers, name: str) -> TaskRecord:
    assert run.record is not None
    return next(task for task in run.record.tasks if task.task == name)
