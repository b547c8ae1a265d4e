"""Numbers and colours of the answers that the descriptions do not contain."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar, NamedTuple

from fusion_hf.synthesis.filters.base import Said, said, where
from fusion_hf.synthesis.filters.mentions import (
    ColorMention,
    CountMention,
    asked_color,
    asked_count,
    asked_yes_no,
    color_mentions,
    count_mentions,
    quoted,
)
from fusion_hf.synthesis.filters.words import content, singular, tokens
from fusion_hf.synthesis.record import SynthRecord

MOST_SUMMED = 12  # mentions of which all sums are made
DENIALS = ("no", "not", "none", "neither")


@dataclass(frozen=True)
class Counts:
    """
    A number in an answer is one that the descriptions give for the same things, or the sum of such.

    Where the descriptions give no number for these things, any of their numbers, or a sum of some, will do. "Yes" says
    the question's numbers.

    Args:
        derived: differences and products of two numbers are allowed as well.
    """

    name: ClassVar[str] = "counts"
    derived: bool = False

    def __post_init__(self) -> None:
        if type(self.derived) is not bool:
            raise ValueError(f"derived is {self.derived!r}; allowed: true, false")

    def check(self, record: SynthRecord) -> str | None:
        text = "\n".join(record.descriptions)
        known = count_mentions(text, articles=True)
        for index, turn in enumerate(record.turns):
            for claim in _count_claims(said(turn)):
                if not self._supported(claim, known, text):
                    things = f" {' '.join(claim.words)}" if claim.words else ""
                    return f"{where(index)}: the description does not contain {claim.value:g}{things}"
        return None

    def _supported(self, claim: "_CountClaim", known: Sequence[CountMention], text: str) -> bool:
        head = claim.words[-1] if claim.words else None
        about = [mention for mention in known if head in mention.words]
        exact = [mention for mention in about if set(claim.words) <= set(mention.words)]
        if claim.value == 0 and not about:
            return head is None or head not in {singular(token) for token in tokens(text)}
        if claim.value == 1 and not about:
            return True  # what is described is there at least once
        qualified = bool(about) and not exact
        if not claim.asked and claim.value in _written_numbers(text):
            return True
        values = _values(exact or about or known, subsets=qualified or not about)
        if qualified:  # "how many red things?" of "a red ball and two red cups"
            values |= _values([m for m in known if set(claim.words[:-1]) <= set(m.words)], subsets=False)
        # "two dogs, one brown and one black": how many dogs are brown?
        values |= {m.value for m in known if m.words and not m.by_article and set(m.words) <= claim.condition}
        if self.derived:
            values |= _derived({mention.value for mention in known})
        return claim.value in values


class _CountClaim(NamedTuple):
    """A number that is said, of what, whether the question asks for it, and what else it says about the things."""

    value: float
    words: tuple[str, ...]
    asked: bool
    condition: frozenset[str]


def _count_claims(turn: Said) -> Iterator[_CountClaim]:
    asked = asked_count(turn.question)
    parts = tokens(turn.answer)
    claims = list(count_mentions(turn.answer))
    if parts[:1] == ("yes",) and asked is None:
        claims += [claim for claim in count_mentions(turn.question) if claim.value != 1]
    if asked is not None and not claims and parts[:1] == ("no",):
        claims.append(CountMention(0, asked))
    denied = {claim.value for claim in count_mentions(turn.question)} if set(parts) & set(DENIALS) else set()
    for number, claim in enumerate(claims):
        words = claim.words
        condition: frozenset[str] = frozenset()
        if claim.value in denied:
            continue
        wanted = asked is not None and number == 0
        if wanted and asked is not None:
            # "how many red balls?" - "3 balls", "three"
            words = asked if not words or words[-1] in asked else words
            condition = frozenset(content(turn.question)) - set(asked)
        elif claim.value == 1 or (claim.value == 0 and not words):
            continue  # "one" alone is mostly a pronoun
        yield _CountClaim(claim.value, words, wanted, condition)


def _written_numbers(text: str) -> set[float]:
    """Those in quotation marks."""
    return {mention.value for part in quoted(text) for mention in count_mentions(part)}


def _values(mentions: Iterable[CountMention], subsets: bool) -> set[float]:
    """Each number, the sum of all, and with `subsets` that of any; a thing that is described twice counts once."""
    mentions = list(mentions)
    numbers = [mention.value for mention in mentions]
    once = [value for value, _ in {(mention.value, mention.words): None for mention in mentions}]
    sums = {*numbers, sum(numbers), sum(once)}
    if subsets:
        sums |= _subset_sums([value for value in once if value][:MOST_SUMMED])
    return sums


def _subset_sums(values: list[float]) -> set[float]:
    sums: set[float] = {0}
    for value in values:
        sums |= {value + other for other in sums}
    return sums - {0}


def _derived(values: set[float]) -> set[float]:
    pairs = list(combinations(values, 2))
    sums = _subset_sums(sorted(values)[:MOST_SUMMED])
    return {abs(a - b) for a, b in pairs} | {a * b for a, b in pairs} | {a * a for a in values} | sums


@dataclass(frozen=True)
class Colors:
    """
    A colour in an answer is one that the descriptions give to the same thing.

    Where they give none to this thing, any of their colours will do. Words for the same basic colour agree, light and
    dark do not. "Yes" says the question's colours.
    """

    name: ClassVar[str] = "colors"

    def check(self, record: SynthRecord) -> str | None:
        known = [mention for text in record.descriptions for mention in color_mentions(text)]
        for index, turn in enumerate(record.turns):
            for claim in _color_claims(said(turn)):
                if not _color_supported(claim, known):
                    things = f" for {' '.join(claim.words)}" if claim.words else ""
                    return f"{where(index)}: the description does not contain {claim.word}{things}"
        return None


def _color_claims(turn: Said) -> Iterator[ColorMention]:
    asked = asked_color(turn.question)
    parts = tokens(turn.answer)
    claims = list(color_mentions(turn.answer, plain=True))
    asked_colors = color_mentions(turn.question, plain=True)
    if parts[:1] == ("yes",):
        about = asked_yes_no(turn.question)
        claims += [claim if claim.words else claim._replace(words=about) for claim in asked_colors]
    denied = {singular(claim.word) for claim in asked_colors} if set(parts) & set(DENIALS) else set()
    for claim in claims:
        if singular(claim.word) in denied:
            continue
        yield claim._replace(words=asked) if asked and not claim.words else claim


def _color_supported(claim: ColorMention, known: Sequence[ColorMention]) -> bool:
    head = claim.words[-1] if claim.words else None
    about = [mention for mention in known if head in mention.words]
    return any(
        claim.colors & mention.colors and not (claim.tone and mention.tone and claim.tone != mention.tone)
        for mention in about or known
    )
