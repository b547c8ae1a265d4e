"""Reject numbers, colours and written text in answers that the descriptions do not contain."""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar, NamedTuple

from fusion_hf.synthesis.choices import plain_turn
from fusion_hf.synthesis.filters.mentions import (
    ColorMention,
    CountMention,
    asked_color,
    asked_counts,
    asked_yes_no,
    color_mentions,
    count_mentions,
    quoted,
)
from fusion_hf.synthesis.filters.words import content, singular, tokens
from fusion_hf.synthesis.synth_record import RecordTurn, SynthRecord

MOST_SUMMED = 12  # maximum number of mentions for which all sums are computed
WRITING = frozenset({"word", "text", "writing", "lettering", "letter", "number"})
WHOLES, PAIR = frozenset({"picture", "image"}), 2  # "both pictures" refers to the two described images
GENERIC = frozenset({"shape", "thing", "object", "item", "figure", "one"})  # words that can refer to anything
_SIDES = re.compile(r"\b(left|right|first|second) (?:picture|image)\b", re.IGNORECASE)
_EDGES = " .,;:!?"  # stripped from written text
DENIALS = ("no", "not", "none", "neither")


@dataclass(frozen=True)
class CountsFilter:
    """
    Require that a number in an answer is one that the descriptions give for the same things, or a sum of such
    numbers.

    If the descriptions give no number for these things, any of their numbers or sums is accepted. The answer "yes"
    claims the numbers in the question.

    Args:
        derived: whether differences and products of two numbers are accepted as well.
    """

    name: ClassVar[str] = "counts"
    derived: bool = False

    def check(self, record: SynthRecord) -> str | None:
        for number, turn in enumerate(map(plain_turn, record.turns), 1):
            texts = _texts_for(record, turn)
            for claim in _count_claims(turn, last=self.derived):
                if claim.value == PAIR == len(record.descriptions) and any(
                    words[-1] in WHOLES for words in claim.things
                ):
                    continue
                if not any(self._supported(claim, count_mentions(text, articles=True), text) for text in texts):
                    things = " and ".join(" ".join(words) for words in claim.things)
                    said_of = f"{claim.value:g} {things}".rstrip()
                    return f"turn {number}: the description does not contain {said_of}"
        return None

    def _supported(self, claim: "_CountClaim", known: Sequence[CountMention], text: str) -> bool:
        heads = {words[-1] for words in claim.things}
        about = [mention for mention in known if heads & set(mention.words)]
        if not about and claim.value <= 1:
            # a described thing exists at least once
            return claim.value == 1 or not heads & {singular(token) for token in tokens(text)}
        if not claim.asked and claim.value in _written_numbers(text):
            return True
        values = _values_of(claim, about, known)
        if self.derived and (claim.asked or not about):
            values |= _derived({mention.value for mention in known})
        return claim.value in values


def _values_of(claim: "_CountClaim", about: list[CountMention], known: Sequence[CountMention]) -> set[float]:
    """Return the possible numbers of the things of a claim. `about` holds the mentions of its nouns."""
    exact = [mention for mention in about if any(set(words) <= set(mention.words) for words in claim.things)]
    # "two dogs, one brown and one black": how many dogs are brown?
    parts = {m.value for m in known if m.words and not m.by_article and set(m.words) <= claim.condition}
    if exact or not about:
        return parts | _values(exact or known, subsets=not about or len(claim.things) > 1)
    qualities = set(claim.things[0][:-1])
    alike = [mention for mention in known if qualities and qualities <= set(mention.words)]
    if alike and {words[-1] for words in claim.things} <= GENERIC:
        # "how many red things?" with "a red ball and two red cups" is not answered by the number of all things
        return parts | _values(alike, subsets=False)
    return parts | _values(about, subsets=True) | _values(alike, subsets=False)


class _CountClaim(NamedTuple):
    """A claimed number with its things, whether the question asks for it, and what else is said about the things."""

    value: float
    things: tuple[tuple[str, ...], ...]
    asked: bool
    condition: frozenset[str]


def _count_claims(turn: RecordTurn, last: bool) -> Iterator[_CountClaim]:
    """
    Yield the numbers that a turn claims. If `last`, the requested number follows the steps to it, and precedes
    them otherwise.
    """
    asked = asked_counts(turn.question)
    parts = tokens(turn.answer)
    claims = list(count_mentions(turn.answer))
    if parts[:1] == ("yes",) and not asked:
        claims += [claim for claim in count_mentions(turn.question) if claim.value != 1]
    if asked and not claims and parts[:1] == ("no",):
        claims.append(CountMention(0, ()))
    denied = {claim.value for claim in count_mentions(turn.question)} if set(parts) & set(DENIALS) else set()
    names = {word for words in asked for word in words}
    for number, claim in enumerate(claims):
        if claim.value in denied:
            continue
        things: tuple[tuple[str, ...], ...] = (claim.words,) if claim.words else ()
        if asked and number == (len(claims) - 1 if last else 0):
            # "how many red balls?" - "3 balls", "three"
            if not claim.words or claim.words[-1] in names:
                things = tuple(words for words in asked if words)
            yield _CountClaim(claim.value, things, True, frozenset(content(turn.question)) - names)
        elif claim.value > 1 or (claim.value == 0 and claim.words):  # "one" alone is usually a pronoun
            yield _CountClaim(claim.value, things, False, frozenset())


def _texts_for(record: SynthRecord, turn: RecordTurn) -> list[str]:
    """Return the texts that can support a turn: for a pair those of the side that it names, or either side."""
    if len(record.descriptions) < 2:
        return list(record.descriptions)
    asked, named = (_SIDES.findall(text.lower()) for text in (turn.question, turn.answer))
    sides = {*asked, *named}
    if asked and (sides <= {"left", "first"} or sides <= {"right", "second"}):
        return [record.descriptions[int(bool(sides & {"right", "second"}))]]
    return list(record.descriptions)


def _written_numbers(text: str) -> set[float]:
    """Return the numbers in quotation marks."""
    return {mention.value for part in quoted(text) for mention in count_mentions(part)}


def _values(mentions: Iterable[CountMention], subsets: bool) -> set[float]:
    """
    Return each number, the sum of all, and with `subsets` all other sums. A thing that is described twice counts
    once.
    """
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
class ColorsFilter:
    """
    Require that a colour in an answer is one that the descriptions give to the same thing.

    If they give no colour to this thing, any of their colours is accepted. Words for the same basic colour agree, but
    light and dark do not. The answer "yes" claims the colours in the question.
    """

    name: ClassVar[str] = "colors"

    def check(self, record: SynthRecord) -> str | None:
        for number, turn in enumerate(map(plain_turn, record.turns), 1):
            known = [mention for text in _texts_for(record, turn) for mention in color_mentions(text)]
            for claim in _color_claims(turn):
                if not _color_supported(claim, known):
                    things = f" for {' '.join(claim.words)}" if claim.words else ""
                    return f"turn {number}: the description does not contain {claim.word}{things}"
        return None


def _color_claims(turn: RecordTurn) -> Iterator[ColorMention]:
    asked = asked_color(turn.question)
    parts = tokens(turn.answer)
    claims = list(color_mentions(turn.answer, plain=True))
    asked_colors = color_mentions(turn.question, plain=True)
    if parts[:1] == ("yes",):
        about = asked_yes_no(turn.question)
        claims += [claim if claim.words else claim._replace(words=about) for claim in asked_colors]
    denied = [claim.colors for claim in asked_colors] if set(parts) & set(DENIALS) else []
    for claim in claims:
        if any(colors & claim.colors for colors in denied):
            continue
        yield claim._replace(words=asked) if asked and not claim.words else claim


def _color_supported(claim: ColorMention, known: Sequence[ColorMention]) -> bool:
    head = claim.words[-1] if claim.words else None
    heads = WRITING if head in WRITING else {head}
    about = [mention for mention in known if heads & set(mention.words)]
    return any(
        claim.colors & mention.colors and not (claim.tone and mention.tone and claim.tone != mention.tone)
        for mention in about or known
    )


@dataclass(frozen=True)
class WrittenTextFilter:
    """
    Require that quoted text in answers is written in the image, letter by letter.

    Args:
        same_case: whether upper and lower case must agree.
    """

    name: ClassVar[str] = "written"
    same_case: bool = True

    def check(self, record: SynthRecord) -> str | None:
        known = [self._plain(text) for description in record.descriptions for text in quoted(description)]
        if not known:
            return "the description has no text in quotation marks"
        # a text may be split into parts, or several may be joined
        together = " ".join(known)
        for number, turn in enumerate(map(plain_turn, record.turns), 1):
            for text in quoted(turn.answer):
                plain = self._plain(text)
                if plain and f" {plain} " not in f" {together} ":
                    return f"turn {number}: the description does not contain the text {text[:60]!r}"
        return None

    def _plain(self, text: str) -> str:
        normal = " ".join(unicodedata.normalize("NFKC", text).replace("’", "'").split()).strip(_EDGES)
        return normal if self.same_case else normal.lower()
