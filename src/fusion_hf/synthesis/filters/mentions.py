"""Find numbers and colours in a text, with the things that they describe."""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from fusion_hf.synthesis.filters.words import (
    ARTICLES,
    LONGEST_PHRASE,
    TONES,
    color_of,
    is_word,
    number_at,
    phrase,
    token_at,
    tokens,
)

_QUOTED = re.compile(r"[\"“”«»„][^\"“”«»„\n]{0,200}[\"“”«»„]|(?<!\w)'[^'\n]{1,80}'(?!\w)")
_COPULAS = frozenset({"is", "are", "was", "were", "looks", "look", "appears", "appear", "painted", "colored", "dyed"})
_BETWEEN = frozenset(  # words between a copula and its colour
    "a an very mostly all both entirely completely mainly solid plain bright vivid clear in painted colored deep dark "
    "light pale shade of also".split()
)
_BEFORE_ASKED = frozenset(
    "is are was were of does do did has have the a an his her its their this that these those 's you see".split()
)
_ENUMERATED = re.compile(r"(?m)^\s*(?:step\s+)?\d+[.):]\s", re.IGNORECASE)  # numbered steps
_CACHE = 4096  # maximum number of cached texts


class CountMention(NamedTuple):
    """
    A number, the singulars of the words for its things (empty if unknown), and whether an article stands for the
    number.
    """

    value: float
    words: tuple[str, ...]
    by_article: bool = False


class ColorMention(NamedTuple):
    """A colour word, its basic colours, its tone (possibly empty), and the words for the thing that has the colour."""

    word: str
    colors: frozenset[str]
    tone: str
    words: tuple[str, ...]


def unquoted(text: str, instead: str = " ") -> str:
    """
    Remove text in quotation marks, since written text says nothing about colours and numbers.

    Args:
        text: the text.
        instead: the replacement.
    """
    return _QUOTED.sub(instead, text.replace("’s", "'s"))


def quoted(text: str) -> list[str]:
    """
    Return the texts in quotation marks.

    Args:
        text: the text.
    """
    return [found.group()[1:-1] for found in _QUOTED.finditer(text)]


@lru_cache(maxsize=_CACHE)
def count_mentions(text: str, articles: bool = False) -> tuple[CountMention, ...]:
    """
    Find numbers of things in order, except ordinals, times, step numbers and numbers in quotation marks.

    Args:
        text: the text.
        articles: whether "a" and "an" count as one, and "no" as zero.
    """
    parts = tokens(_ENUMERATED.sub(" ", unquoted(text)))
    found, place = [], 0
    while place < len(parts):
        number = number_at(parts, place)
        if number is None:
            if articles and parts[place] in (*ARTICLES, "no") and (words := _counted(parts, place + 1)):
                found.append(CountMention(int(parts[place] != "no"), words, by_article=True))
            place += 1
            continue
        after = place + number.size
        compound = token_at(parts, after) == "-" and is_word(token_at(parts, after + 1) or "-")  # "three-legged"
        if not compound:
            found.append(CountMention(number.value, _counted(parts, after)))
        place = after
    return tuple(found)


def _counted(parts: Sequence[str], place: int) -> tuple[str, ...]:
    """Return the noun phrase after a number, skipping "of the"."""
    while token_at(parts, place) in ("of", "the", "these", "those", "them"):
        place += 1
    words = list(phrase(parts, place))
    place += len(words)
    while words and color_of(words[-1]) and token_at(parts, place) in ("and", ","):  # "two red and blue balls"
        more = phrase(parts, place + 1)
        if not more or not color_of(more[0]):
            break
        words += more
        place += 1 + len(more)
    return tuple(words)


@lru_cache(maxsize=_CACHE)
def color_mentions(text: str, plain: bool = False) -> tuple[ColorMention, ...]:
    """
    Find colours in order.

    Args:
        text: the text.
        plain: whether to accept only words that always mean a colour. This is used for claims.
    """
    return tuple(_color_mentions(tokens(unquoted(text)), plain))


def _color_mentions(parts: tuple[str, ...], plain: bool) -> Iterator[ColorMention]:
    for place, token in enumerate(parts):
        colors = color_of(token, plain) if is_word(token) else frozenset()
        if not colors or _is_denied(parts, place):
            continue
        words = [word for word in _colored(parts, place) if not color_of(word)]
        if subject := _subject(parts, place):
            words = [*subject, *words]
        before = token_at(parts, place - 2) if token_at(parts, place - 1) == "-" else token_at(parts, place - 1)
        yield ColorMention(token, colors, TONES.get(before, ""), tuple(words))


def _is_denied(parts: tuple[str, ...], place: int) -> bool:
    """Return whether a "no" applies to this colour: "no red or dark blue cars" gives no car a colour."""
    place -= 1
    while (
        token_at(parts, place) in ("and", "or") or token_at(parts, place) in TONES or color_of(token_at(parts, place))
    ):
        place -= 1
    return token_at(parts, place) == "no"


def _colored(parts: tuple[str, ...], place: int) -> tuple[str, ...]:
    """Return the noun phrase after a colour, skipping further colours and "and": "black and white cat"."""
    place += 1
    while True:
        ahead = place
        while token_at(parts, ahead) in ("and", "or", "-", ",") or token_at(parts, ahead) in TONES:
            ahead += 1
        if not color_of(token_at(parts, ahead) or "-"):
            return phrase(parts, place) if token_at(parts, place) != "," else ()
        place = ahead + 1


def _subject(parts: tuple[str, ...], place: int) -> tuple[str, ...]:
    """Return the words before a copula that leads to this colour: "the old car is dark red"."""
    back = place - 1
    while back >= 0 and _leads_on(parts[back]) and parts[back] not in _COPULAS - {"painted", "colored"}:
        back -= 1
    if token_at(parts, back) not in _COPULAS and token_at(parts, back + 1) not in _COPULAS:
        return ()
    end = back if token_at(parts, back) in _COPULAS else back + 1
    words: tuple[str, ...] = ()
    for begin in range(end - 1, max(0, end - LONGEST_PHRASE) - 1, -1):
        longer = phrase(parts[:end], begin)
        if len(longer) <= len(words):
            break
        words = longer
    return words


def asked_yes_no(question: str) -> tuple[str, ...]:
    """
    Return what a question such as "is the car red?" is about. Empty for other questions.

    Args:
        question: the question.
    """
    parts = tokens(question)
    if token_at(parts, 0) not in _COPULAS:
        return ()
    place = 2 if token_at(parts, 1) in _BEFORE_ASKED else 1
    words = phrase(parts, place)
    return tuple(word for word in words if not color_of(word))


def _leads_on(token: str) -> bool:
    return token in _BETWEEN or token.endswith("ly") or token in ("and", "-", ",") or bool(color_of(token))


def asked_counts(question: str) -> tuple[tuple[str, ...], ...]:
    """
    Return the noun phrases after "how many", two for "circles and squares". Empty for other questions.

    Args:
        question: the question.
    """
    parts = tokens(question)
    place = _behind(parts, ("how", "many"))
    if place is None:
        return ()
    found = [phrase(parts, place)]
    place += len(found[0])
    while token_at(parts, place) in ("and", "or", ",") and (more := phrase(parts, place + 1)):
        found.append(more)
        place += 1 + len(more)
    return tuple(found)


def asked_color(question: str) -> tuple[str, ...] | None:
    """
    Return the thing whose colour a question asks for, or None for other questions.

    Args:
        question: the question.
    """
    parts = tuple("color" if token == "colour" else token for token in tokens(question))
    if token_at(parts, 0) not in ("what", "which", "in", "name", "tell", "and"):
        return None
    place = _behind(parts, ("color",))
    return None if place is None else phrase(parts, place)


def _behind(parts: tuple[str, ...], marks: tuple[str, ...]) -> int | None:
    """Return the position of the thing that follows these question words, or None."""
    for place in range(len(parts)):
        if parts[place : place + len(marks)] == marks:
            place += len(marks)
            while token_at(parts, place) in _BEFORE_ASKED:
                place += 1
            return place
    return None
