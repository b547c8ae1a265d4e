"""Find where two runs start to differ, by rebuilding both and exchanging one stage at a time."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from fusion_hf.common.errors import InputError
from fusion_hf.evaluation.rebuilt_run import RebuiltRun, conversation
from fusion_hf.evaluation.run_comparison import SIDES, Pair, TaskComparison
from fusion_hf.evaluation.run_settings import SettingDifference, differing_settings
from fusion_hf.evaluation.stage_comparison import (
    DECODING,
    FEATURES,
    IDS,
    LOGITS,
    PIXELS,
    PROMPT,
    SCORING,
    STAGES,
    StageComparison,
    Value,
    compare_stage,
    first_difference,
)
from fusion_hf.evaluation.staged_model import Features, StagedQuestion, WrittenPrompt

QUESTIONS = 3  # number of questions to rebuild
EXCHANGED = (PROMPT, IDS, PIXELS, FEATURES, LOGITS, DECODING)
UNFIT = (ValueError, RuntimeError, IndexError)  # raised by a stage that gets values of a model with different sizes


@dataclass(frozen=True)
class QuestionStages:
    """
    One question at all stages.

    Attributes:
        doc_id: the number of the question.
        stages: the comparison of each stage, which both runs compute from the first run's values of earlier stages.
        recorded: the answers of both runs as recorded.
        rebuilt: the answers of both runs as computed now.
        exchanged: for each stage that differs, the first run's answer with this stage taken from the second run.
    """

    doc_id: int
    stages: Sequence[StageComparison]
    recorded: tuple[str, str]
    rebuilt: tuple[str, str]
    exchanged: Mapping[str, str]


@dataclass(frozen=True)
class StageReport:
    """
    Where two runs start to differ in a task.

    Attributes:
        task: the name of the task.
        settings: the settings that differ between the records.
        questions: the questions that were rebuilt.
        scoring: the comparison of the scores of all equal answers.
        notes: what readers need to know, in sentences.
    """

    task: str
    settings: Sequence[SettingDifference]
    questions: Sequence[QuestionStages]
    scoring: StageComparison
    notes: Sequence[str]

    @property
    def first(self) -> StageComparison | None:
        """The first stage that differs in any question, or None."""
        return first_difference([*(stage for each in self.questions for stage in each.stages), self.scoring])

    @property
    def is_reproduced(self) -> bool:
        """Whether both models reproduce the recorded answers."""
        return all(each.recorded == each.rebuilt for each in self.questions)

    @property
    def differing(self) -> list[str]:
        """All stages that differ on equal inputs, in order."""
        found = {stage.stage for each in self.questions for stage in each.stages if stage.differs}
        found |= {SCORING} if self.scoring.differs else set()
        return [stage for stage in STAGES if stage in found]


def compare_run_stages(
    first: RebuiltRun, second: RebuiltRun, task: TaskComparison, questions: int = QUESTIONS
) -> StageReport:
    """
    Find the first stage at which two runs differ in a task.

    Args:
        first: the first run, with its model.
        second: the second run, with its model.
        task: the comparison of the task by `compare_runs`.
        questions: the number of questions to rebuild. Those with different answers are preferred.

    Raises:
        InputError: if no question can be rebuilt.
    """
    chosen = [pair for pair in (task.changed or task.pairs) if _can_be_rebuilt(pair)]
    rebuilt: list[QuestionStages] = []
    reasons = []
    for pair in chosen:
        if len(rebuilt) == questions:
            break
        try:
            rebuilt.append(_Exchange(first, second, task.task, pair).run())
        except InputError as error:
            reasons.append(str(error))
    if not rebuilt:
        told = reasons[0] if reasons else "the records do not say how questions were asked. Run the evaluations again"
        raise InputError(f"No question of {task.task} can be rebuilt: {told}.")
    return StageReport(
        task.task,
        differing_settings(first.run, second.run),
        rebuilt,
        compare_scoring(task.pairs),
        _notes(first, second, rebuilt),
    )


def _can_be_rebuilt(pair: Pair) -> bool:
    return all(
        sample.asked is not None and sample.asked.generation is not None for sample in (pair.first, pair.second)
    )


def compare_scoring(pairs: Sequence[Pair]) -> StageComparison:
    """
    Check whether equal answers have equal scores.

    Args:
        pairs: the questions of both runs.
    """
    equal = [pair for pair in pairs if not pair.is_changed]
    for pair in equal:
        for metric in pair.first.scores:
            own, other = pair.first.scores[metric], pair.second.scores.get(metric)
            if other is not None and own != other:
                count = sum(each.first.scores != each.second.scores for each in equal)
                answer = f"question {pair.first.doc_id}, {pair.first.answer[:40]!r}: {metric} {own:g} and {other:g}"
                return StageComparison(SCORING, True, f"{count} equal answers have different scores; {answer}")
    return StageComparison(SCORING, False)


def _notes(first: RebuiltRun, second: RebuiltRun, questions: Sequence[QuestionStages]) -> list[str]:
    notes = []
    for place, run in enumerate((first, second)):
        if not run.is_local:
            notes.append(f"{run.name} asked a server. This package's model stands in for the stages on the server.")
        lost = [each for each in questions if each.recorded[place] != each.rebuilt[place]]
        if lost:
            notes.append(
                f"{run.name}: {len(lost)} of {len(questions)} recorded answers were not reproduced, such as "
                f"{lost[0].recorded[place]!r}, which became {lost[0].rebuilt[place]!r}. The run may have used "
                "another engine, device or release."
            )
    return notes


FIRST: Mapping[str, int] = dict.fromkeys(EXCHANGED, 0)  # maps each stage to the run that computes it
SECOND: Mapping[str, int] = dict.fromkeys(EXCHANGED, 1)


@dataclass(frozen=True, eq=False)
class _Made:
    """The results of the stages. A question without an image has neither pixels nor features."""

    prompt: WrittenPrompt
    row: StagedQuestion
    features: Features | None
    tokens: list[int]
    answer: str


class _Exchange:
    """One question whose stages can be computed by either run."""

    def __init__(self, first: RebuiltRun, second: RebuiltRun, task: str, pair: Pair):
        self.pair = pair
        self.samples = (pair.first, pair.second)
        self.asked = [sample.asked for sample in self.samples if sample.asked is not None]
        self.images = [
            first.open_image(task, pair.first, pair.second),
            second.open_image(task, pair.second, pair.first),
        ]
        runs = (first, second)
        self.staged = [run.staged for run in runs]
        self.decodings = [run.decoding_of(sample) for run, sample in zip(runs, self.samples, strict=True)]
        self.batches = [run.rows(run.batch_of(task, sample)) for run, sample in zip(runs, self.samples, strict=True)]

    def run(self) -> QuestionStages:
        """Compare all stages, and exchange those that differ."""
        base = self._make(FIRST)
        stages = [self._compare(stage, base) for stage in EXCHANGED]
        exchanged = {}
        for stage in (each.stage for each in stages if each.differs):
            with suppress(*UNFIT):  # the comparison reports it then
                exchanged[stage] = self._make({**FIRST, stage: 1}).answer
        return QuestionStages(
            self.pair.first.doc_id,
            stages,
            (self.pair.first.answer, self.pair.second.answer),
            (base.answer, self._make(SECOND).answer),
            exchanged,
        )

    def _make(self, by: Mapping[str, int]) -> _Made:
        """Answer the question, with each stage computed by the run that `by` names."""
        prompt = self._write(by[PROMPT])
        row = StagedQuestion(self.staged[by[IDS]].tokenize(prompt), self._preprocess(by[PIXELS]))
        features = self._encode(by[FEATURES], row)
        decoding, model = self.decodings[by[DECODING]], by[LOGITS]
        tokens = self.staged[model].generate(row, features, decoding, self.batches[model])
        answer = self.staged[by[DECODING]].decode(tokens, decoding.wanted)
        return _Made(prompt, row, features, tokens, answer)

    def _write(self, run: int) -> WrittenPrompt:
        return self.staged[run].write_prompt(conversation(self.asked[run], self.images[run]))

    def _preprocess(self, run: int) -> torch.Tensor | None:
        image = self.images[run]
        return None if image is None else self.staged[run].preprocess(image)

    def _encode(self, run: int, row: StagedQuestion) -> Features | None:
        return None if row.pixels is None else self.staged[run].encode(row, self.batches[run])

    def _compare(self, stage: str, base: _Made) -> StageComparison:
        """Compare one stage of both runs, computed from the first run's values of earlier stages."""
        try:
            if stage == IDS:
                return self._compare_ids(base)
            return compare_stage(stage, self._value(stage, 0, base), self._value(stage, 1, base))
        except UNFIT as error:
            return StageComparison(stage, True, f"{SIDES[1]} cannot process the values of {SIDES[0]}: {error}")

    def _value(self, stage: str, run: int, base: _Made) -> Value:
        if stage == PROMPT:
            return self._write(run).text
        if stage == PIXELS:
            return self._preprocess(run)
        if stage == FEATURES:
            features = self._encode(run, base.row)
            return None if features is None else features.parts
        if stage == LOGITS:
            return self.staged[run].compute_logits(base.row, base.features, base.tokens, self.batches[run])
        return self._make({**FIRST, DECODING: run}).answer

    def _compare_ids(self, base: _Made) -> StageComparison:
        """
        Compare the ids of the prompt and, if they are equal, those of the question for the vision tower and the
        turn ends.
        """
        own, other = base.row.ids, self.staged[1].tokenize(base.prompt)
        compared = [compare_stage(IDS, list(vars(own)[name]), list(vars(other)[name])) for name in vars(own)]
        return next((each for each in compared if each.differs), compared[0])
