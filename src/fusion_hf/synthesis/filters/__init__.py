"""The filters of the data engine. Each one says in words what is wrong with a record."""

from typing import Any, ClassVar, Protocol

from fusion_hf.common.errors import InputError
from fusion_hf.common.yaml_config import make_dataclass
from fusion_hf.synthesis.category import Category
from fusion_hf.synthesis.filters.contrast import ContrastFilter
from fusion_hf.synthesis.filters.grounded import ColorsFilter, CountsFilter, WrittenTextFilter
from fusion_hf.synthesis.filters.leakage import LeakageFilter
from fusion_hf.synthesis.filters.options import OptionsFilter
from fusion_hf.synthesis.filters.safety import PersonalDataFilter, UnsafeFilter
from fusion_hf.synthesis.filters.self_reference import MetaTalkFilter
from fusion_hf.synthesis.filters.text import LanguageFilter, LengthFilter, RepeatedQuestionsFilter, TurnCountFilter
from fusion_hf.synthesis.synth_record import SynthRecord

# The order in which filters are applied: cheap ones and those with the most specific reasons come first.
_RULES = (LengthFilter, LanguageFilter, MetaTalkFilter, UnsafeFilter, PersonalDataFilter, OptionsFilter)
_MORE_RULES = (RepeatedQuestionsFilter, LeakageFilter, ContrastFilter, WrittenTextFilter, CountsFilter, ColorsFilter)
RULES: dict[str, Any] = {rule.name: rule for rule in (*_RULES, *_MORE_RULES)}

__all__ = ["RULES", "Filter", "build_filters", "first_problem"]


class Filter(Protocol):
    """A check of a single record. Its settings are the fields of its dataclass."""

    name: ClassVar[str]

    def check(self, record: SynthRecord) -> str | None:
        """
        Return the reason to reject the record, or None to keep it.

        Args:
            record: the record.
        """


def build_filters(category: Category) -> list[Filter]:
    """
    Build the filters of a category's rules. They need only one record and no model.

    Args:
        category: the category.

    Raises:
        InputError: if a rule or a setting is unknown.
    """
    for name in category.rules:
        if name not in RULES:
            raise InputError(
                f"{category.name}: `rules` must contain only filters from {', '.join(RULES)}, got {name!r}."
            )
    least, most = category.turns
    turns = TurnCountFilter(least, most, category.pictures)
    chosen = [name for name in RULES if name in category.rules]
    return [turns, *(make_dataclass(RULES[name], category.rules[name], f"{category.name}: {name}") for name in chosen)]


def first_problem(record: SynthRecord, filters: list[Filter]) -> SynthRecord:
    """
    Reject a record by the first filter that gives a reason. A record that is rejected already is returned
    unchanged.

    Args:
        record: the record.
        filters: the filters.
    """
    if record.rejection is not None:
        return record
    for rule in filters:
        reason = rule.check(record)
        if reason is not None:
            return record.rejected(rule.name, reason)
    return record
