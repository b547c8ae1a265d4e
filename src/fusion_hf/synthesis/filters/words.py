"""English words as filters use them: tokens, singulars, numbers and colours."""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

_TOKEN = re.compile(r"\d+(?:[.,:/]\d+)*|[^\W\d_]+(?:'(?!s\b)[^\W\d_]+)?|'s\b|[^\w\s]")
_CACHE = 4096  # maximum number of cached texts, since several filters read each description

UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
UNITS += "seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBER_WORDS: dict[str, int] = {word: value for value, word in enumerate(UNITS)}
NUMBER_WORDS |= {word: 10 * (index + 2) for index, word in enumerate(TENS)}
NUMBER_WORDS |= {"none": 0, "single": 1, "both": 2, "pair": 2, "couple": 2, "trio": 3, "dozen": 12}
ARTICLES = frozenset({"a", "an", "another"})
DOZEN = "dozen"
MULTIPLES = {"hundred": 100, DOZEN: 12}
GROUPS = {"single": 1, "pair": 2, "couple": 2, "trio": 3, **MULTIPLES}  # words after an article

_IRREGULAR = {
    "people": "person", "persons": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse",
    "geese": "goose", "feet": "foot", "teeth": "tooth", "buses": "bus", "lenses": "lens", "gases": "gas",
    "leaves": "leaf", "shelves": "shelf", "knives": "knife", "loaves": "loaf", "wolves": "wolf", "halves": "half",
    "scarves": "scarf", "calves": "calf", "wives": "wife", "lives": "life", "grey": "gray", "greys": "gray",
    "potatoes": "potato", "tomatoes": "tomato", "heroes": "hero", "colour": "color", "colours": "color",
}  # fmt: skip

# The basic colours that a word may mean. Two words agree if they share one.
COLOR_FAMILIES: dict[str, frozenset[str]] = {
    word: frozenset(families.split())
    for families, words in {
        "red": "red reddish crimson scarlet ruby maroon burgundy cherry vermilion",
        "orange": "orange orangish tangerine",
        "orange yellow": "amber apricot",
        "yellow": "yellow yellowish gold golden lemon mustard blond blonde",
        "green": "green greenish emerald lime olive mint",
        "teal": "teal turquoise aquamarine aqua cyan",
        "blue": "blue bluish navy azure cobalt sapphire",
        "blue purple": "indigo",
        "purple": "purple purplish violet lavender lilac mauve plum",
        "purple pink": "magenta fuchsia",
        "pink": "pink pinkish rose rosy",
        "pink orange": "salmon coral peach",
        "brown": "brown brownish chestnut bronze chocolate rust rusty",
        "brown orange": "copper",
        "brown white": "beige cream khaki tan sandy",
        "gray": "gray grayish silver silvery slate",
        "gray black": "charcoal",
        "black": "black blackish ebony",
        "white": "white whitish ivory",
    }.items()
    for word in words.split()
}
# These words always mean a colour. The others are also names of fruits, flowers, metals and woods.
PLAIN_COLORS = frozenset(
    "red reddish crimson scarlet maroon orange yellow yellowish golden green greenish teal turquoise blue bluish "
    "cyan purple purplish violet lavender magenta pink pinkish brown brownish beige gray grayish black white "
    "whitish".split()
)
TONES = {"light": "light", "pale": "light", "dark": "dark", "deep": "dark"}

STOP_WORDS = frozenset(
    "a an the this that these those it its they them their there here he she his her him you your i we our is are was "
    "were be been being am do does did has have had can could will would should may might must of in on at to from "
    "with by for as into and or but not no what which who whom whose where when why how many much any some s't".split()
)
# Words that end a noun phrase, in addition to punctuation.
_PHRASE_ENDS = frozenset(
    "the this that these those it its they their there his her is are was were be been has have had do does did can "
    "of in on at to from with by for as into onto over under above below behind beside near between among around "
    "across along against inside outside through toward towards off up down out left right in and or but nor while "
    "who which where when stand stands standing stood sit sits sitting sat lie lies lying lay rest rests hang hangs "
    "hanging appear appears visible shown seen next not also each one a an wear wears wearing hold holds holding walk "
    "walks walking play plays playing look looks looking run runs running then than altogether total left".split()
)
LONGEST_PHRASE = 5  # maximum number of words


class NumberToken(NamedTuple):
    """A number at a position, and the number of tokens that it takes."""

    value: float
    size: int


@lru_cache(maxsize=_CACHE)
def tokens(text: str) -> tuple[str, ...]:
    """
    Split a text into lower-case words, numbers and punctuation. `'s` is one token.

    Args:
        text: the text.
    """
    normal = unicodedata.normalize("NFKC", text).replace("’", "'").replace("‘", "'").lower()
    return tuple(_TOKEN.findall(normal))


@lru_cache(maxsize=_CACHE)
def singular(word: str) -> str:
    """
    Return the singular of a noun or a colour by rules. Other words may change, but always in the same way.

    Args:
        word: the word.
    """
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) <= 3 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("xes", "ches", "shes", "sses", "zzes")):
        return word[:-2]
    return word[:-1]


def is_word(token: str) -> bool:
    """
    Return whether a token is a word.

    Args:
        token: the token.
    """
    return token[0].isalpha()


def content(text: str) -> list[str]:
    """
    Return the meaningful words of a text in order, as singulars and with numbers as digits.

    Args:
        text: the text.
    """
    found, place, parts = [], 0, tokens(text)
    while place < len(parts):
        number = number_at(parts, place)
        if number is not None:
            found.append(f"{number.value:g}")
            place += number.size
            continue
        token = parts[place]
        if (is_word(token) and token not in STOP_WORDS) or token[0].isdigit():
            found.append(singular(token))
        place += 1
    return found


def token_at(parts: Sequence[str], place: int) -> str:
    """
    Return the token at a position, or an empty text outside the text.

    Args:
        parts: the tokens.
        place: the position.
    """
    return parts[place] if 0 <= place < len(parts) else ""


def number_at(parts: Sequence[str], place: int) -> NumberToken | None:
    """
    Parse a number in digits or words that starts at a position, except ordinals, times and dates.

    Args:
        parts: the tokens.
        place: the position.
    """
    token, following = parts[place], token_at(parts, place + 1)
    if token[0].isdigit():
        plain = token.replace(",", "")
        return NumberToken(float(plain), 1) if re.fullmatch(r"\d+(\.\d+)?", plain, re.ASCII) else None
    if token == "half" and following in ARTICLES and token_at(parts, place + 2) == DOZEN:
        return NumberToken(NUMBER_WORDS[DOZEN] / 2, 3)
    if token in ARTICLES and following in GROUPS:
        return NumberToken(GROUPS[following], 2)
    if token not in NUMBER_WORDS:
        return None
    value, size = NUMBER_WORDS[token], 1
    if token in TENS:
        follow = place + (2 if following == "-" else 1)
        unit = token_at(parts, follow)
        if unit in UNITS[1:10]:
            value, size = value + NUMBER_WORDS[unit], follow + 1 - place
    multiple = token_at(parts, place + size)
    if multiple in MULTIPLES:
        return NumberToken(value * MULTIPLES[multiple], size + 1)
    return NumberToken(value, size)


def color_of(token: str, plain: bool = False) -> frozenset[str]:
    """
    Return the basic colours that a word means, empty for other words.

    Args:
        token: the word.
        plain: whether to accept only words that always mean a colour. "oranges" are fruits.
    """
    if token == "oranges":
        return frozenset()
    word = singular(token)
    if plain and word not in PLAIN_COLORS:
        return frozenset()
    return COLOR_FAMILIES.get(word, frozenset())


def phrase(parts: Sequence[str], place: int) -> tuple[str, ...]:
    """
    Return the singulars of the words from a position to the end of the noun phrase. The last one is the noun.

    Args:
        parts: the tokens.
        place: the position.
    """
    words: list[str] = []
    for token in parts[place : place + LONGEST_PHRASE + 2]:
        if token == "-" or (token == "'s" and words):
            continue
        if not is_word(token) or token in _PHRASE_ENDS or len(words) == LONGEST_PHRASE:
            break
        words.append(singular(token))
    return tuple(words)
