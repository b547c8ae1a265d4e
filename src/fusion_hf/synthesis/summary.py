"""Counts of records by category and step, with the models that made them and what they cost."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fusion_hf.synthesis.balance import Answers, count_answers, merge_answers
from fusion_hf.synthesis.choices import Choice, parse_choice
from fusion_hf.synthesis.synth_record import SynthRecord

SAMPLES = 4  # records to show for each category
EXAMPLES = 3  # reasons to show for each filter


@dataclass
class CategorySummary:
    """
    The counts of a category.

    Attributes:
        records: the number of records at the start.
        rejected: the number of rejected records by step.
        examples: the first reasons by step.
        turns: the number of turns of written records.
        words: the number of words in their answers.
        letters: the number of right answers by letter, for multiple choice.
        samples: the ids of the first written records.
        answers: the number of answers by form of question.
    """

    records: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    turns: int = 0
    words: int = 0
    letters: Counter[str] = field(default_factory=Counter)
    samples: list[str] = field(default_factory=list)
    answers: Answers = field(default_factory=dict)

    @property
    def written(self) -> int:
        """Number of written records."""
        return self.records - sum(self.rejected.values())

    def add(self, record: SynthRecord) -> None:
        """Count a record."""
        self.records += 1
        if record.rejection is not None:
            self.rejected[record.rejection.step] += 1
            reasons = self.examples.setdefault(record.rejection.step, [])
            if len(reasons) < EXAMPLES and record.rejection.reason not in reasons:
                reasons.append(record.rejection.reason)
            return
        self.turns += len(record.turns)
        self.words += sum(len(turn.answer.split()) for turn in record.turns)
        choices = [parse_choice(turn) for turn in record.turns]
        self.letters.update(choice.letter for choice in choices if isinstance(choice, Choice))
        for turn in record.turns:
            count_answers(self.answers, turn)
        if len(self.samples) < SAMPLES:
            self.samples.append(record.id)

    def merge(self, other: "CategorySummary") -> None:
        """
        Add the counts of another task.

        Args:
            other: the other counts.
        """
        self.records += other.records
        self.turns += other.turns
        self.words += other.words
        self.rejected.update(other.rejected)
        self.letters.update(other.letters)
        self.samples = [*self.samples, *other.samples][:SAMPLES]
        merge_answers(self.answers, other.answers)
        for step, reasons in other.examples.items():
            known = self.examples.get(step, [])
            self.examples[step] = list(dict.fromkeys([*known, *reasons]))[:EXAMPLES]


@dataclass
class Summary:
    """
    The counts of a run.

    Attributes:
        categories: the counts by category.
        models: the number of records by step and model.
        usage: the number of requests and tokens by step.
    """

    categories: dict[str, CategorySummary] = field(default_factory=lambda: defaultdict(CategorySummary))
    models: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    usage: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def add(self, record: SynthRecord, usage: Mapping[str, Mapping[str, int]]) -> None:
        """
        Count a written or rejected record.

        Args:
            record: the record.
            usage: its requests and tokens by step.
        """
        self.categories[record.category].add(record)
        for step, origin in record.origins.items():
            self.models[step][origin.model] += 1
        for step, amounts in usage.items():
            self.usage[step].update(amounts)

    def merge(self, other: "Summary") -> None:
        """
        Add the counts of another task.

        Args:
            other: the other counts.
        """
        for name, category in other.categories.items():
            self.categories[name].merge(category)
        for own, more in ((self.models, other.models), (self.usage, other.usage)):
            for step, counts in more.items():
                own[step].update(counts)

    @property
    def records(self) -> int:
        """Number of records at the start."""
        return sum(category.records for category in self.categories.values())

    @property
    def written(self) -> int:
        """Number of written records."""
        return sum(category.written for category in self.categories.values())

    def to_dict(self) -> dict[str, Any]:
        """Convert the counts to JSON values."""
        return {
            "categories": {name: dict(vars(category)) for name, category in sorted(self.categories.items())},
            "models": {step: dict(models) for step, models in sorted(self.models.items())},
            "usage": {step: dict(amounts) for step, amounts in sorted(self.usage.items())},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Summary":
        """
        Read what `to_dict` returned.

        Args:
            values: the JSON values.
        """
        summary = cls()
        for name, fields in values["categories"].items():
            counters = {key: Counter(fields[key]) for key in ("rejected", "letters")}
            # tasks that an earlier version finished lack these counts
            answers = {form: Counter(counts) for form, counts in fields.get("answers", {}).items()}
            summary.categories[name] = CategorySummary(**{**fields, **counters, "answers": answers})
        for key in ("models", "usage"):
            getattr(summary, key).update({step: Counter(amounts) for step, amounts in values[key].items()})
        return summary
