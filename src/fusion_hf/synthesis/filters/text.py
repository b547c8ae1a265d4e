"""Check the language, lengths and number of turns, and reject repeated questions."""

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, TypeAlias

from fusion_hf.common.yaml_config import allow
from fusion_hf.synthesis.choices import plain, split_options
from fusion_hf.synthesis.filters.mentions import unquoted
from fusion_hf.synthesis.synth_record import RecordTurn, SynthRecord

# Words that are frequent in one of these languages and in none of the others.
FUNCTION_WORDS: dict[str, frozenset[str]] = {
    language: frozenset(words.split())
    for language, words in {
        "english": "the and is are of with there what how which has this that it its from they not by their who where",
        "german": "der das und ist ein eine einen mit auf dem den sind wie nicht welche farbe zwei auch bild im zu",
        "french": "le les et est une des du avec sur dans quelle quel sont il elle au aux combien qui deux couleur",
        "spanish": "el los las es y una del con en qué cuántos hay por está son su color al cuál para se un",
        "italian": "il gli è di che della con nel quale quanti sono una per del delle alla due colore lo ci",
        "portuguese": "o os é da uma com no na qual quantos há são em do das pelo dois ao para não",
        "dutch": "het een zijn van op welke hoeveel met er wat kleur deze niet aan naar bij twee staat ook de",
    }.items()
}
KEY_BYTES = 8  # length of a text's hash: a billion texts have a collision with a probability of 3%
LEAST_LETTERS = 0.9  # minimum share of Latin letters among all letters
LEAST_FUNCTION_WORDS = 3  # minimum number of another language's words to be significant
LEAST_WORDS, LEAST_SHARE = 25, 0.04  # a text with so many words must have this share of function words of its language


Language: TypeAlias = Annotated[str, allow(", ".join(FUNCTION_WORDS), FUNCTION_WORDS.__contains__)]
WordRange: TypeAlias = Annotated[
    tuple[int, ...],
    allow("a list of the least and the most words", lambda words: len(words) == 2 and 0 <= words[0] <= words[1]),
]


@dataclass(frozen=True)
class LanguageFilter:
    """
    Require that the descriptions, and all turns together, are in a language, judged by script and function words.

    Text in quotation marks is ignored, since signs may be in any language.

    Args:
        language: the language.
    """

    name: ClassVar[str] = "language"
    language: Language = "english"

    def check(self, record: SynthRecord) -> str | None:
        turns = "\n".join(f"{turn.question}\n{turn.answer}" for turn in record.turns)
        for name, text in (("the description", "\n".join(record.descriptions)), ("the conversation", turns)):
            problem = self._problem(unquoted(text))
            if problem is not None:
                return f"{name} is not {self.language}: {problem}"
        return None

    def _problem(self, text: str) -> str | None:
        letters = [character for character in text if character.isalpha()]
        foreign = sum(not _is_latin(character) for character in letters)
        if letters and foreign > (1 - LEAST_LETTERS) * len(letters):
            return f"{foreign} of {len(letters)} letters are not Latin"
        words = [word.strip(".,;:!?()\"'").lower() for word in text.split()]
        counts = {language: sum(word in known for word in words) for language, known in FUNCTION_WORDS.items()}
        most = max(counts, key=lambda language: counts[language])
        own = counts[self.language]
        if counts[most] >= LEAST_FUNCTION_WORDS and counts[most] > own:
            return f"{counts[most]} words are {most}, {own} are {self.language}"
        if len(words) >= LEAST_WORDS and own < LEAST_SHARE * len(words):
            return f"{own} of {len(words)} words are its most frequent ones"
        return None


def _is_latin(letter: str) -> bool:
    return letter.isascii() or unicodedata.name(letter, "").startswith("LATIN")


@dataclass(frozen=True)
class LengthFilter:
    """
    Check the number of words of questions (with options), answers and descriptions.

    Args:
        question: the minimum and maximum for a question.
        answer: the minimum and maximum for an answer.
        description: the minimum and maximum for a description.
    """

    name: ClassVar[str] = "length"
    question: WordRange = (1, 120)
    answer: WordRange = (1, 250)
    description: WordRange = (1, 300)

    def check(self, record: SynthRecord) -> str | None:
        for number, text in enumerate(record.descriptions, 1):
            if problem := _outside(text, self.description):
                return f"description {number} {problem}"
        for number, turn in enumerate(record.turns, 1):
            for name, bounds in (("question", self.question), ("answer", self.answer)):
                if problem := _outside(getattr(turn, name), bounds):
                    return f"turn {number}: the {name} {problem}"
        return None


def _outside(text: str, bounds: Sequence[int]) -> str | None:
    count = len(text.split())
    return None if bounds[0] <= count <= bounds[1] else f"has {count} words; allowed: {bounds[0]} to {bounds[1]}"


@dataclass(frozen=True)
class TurnCountFilter:
    """
    Require as many turns and descriptions as the category has, and that no text is empty.

    Args:
        least: the minimum number of turns.
        most: the maximum number of turns.
        images: the number of descriptions.
    """

    name: ClassVar[str] = "turns"
    least: int
    most: int
    images: int

    def check(self, record: SynthRecord) -> str | None:
        if not self.least <= len(record.turns) <= self.most:
            return f"it has {len(record.turns)} turns; allowed: {self.least} to {self.most}"
        if len(record.descriptions) != self.images:
            return f"it has {len(record.descriptions)} descriptions; allowed: {self.images}"
        texts = [*record.descriptions, *(text for turn in record.turns for text in (turn.question, turn.answer))]
        return None if all(text.strip() for text in texts) else "a text is empty"


@dataclass(frozen=True)
class RepeatedQuestionsFilter:
    """Reject conversations that repeat a question, ignoring case, punctuation and articles."""

    name: ClassVar[str] = "repeated_questions"

    def check(self, record: SynthRecord) -> str | None:
        seen: dict[str, int] = {}
        for number, turn in enumerate(record.turns, 1):
            first = seen.setdefault(question_key(turn), number)
            if first != number:
                return f"turn {number} asks what turn {first} asks"
        return None


def question_key(turn: RecordTurn) -> str:
    """
    Return a key of a question that ignores case, punctuation, articles and the order of options.

    Args:
        turn: the question and its answer.
    """
    stem, options = split_options(turn.question)
    return "|".join([_without_articles(stem), *sorted(_without_articles(option) for option in options)])


def _without_articles(text: str) -> str:
    words = plain(text.replace("colour", "color")).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def text_key(*texts: str) -> bytes:
    """
    Hash texts to a few bytes.

    Args:
        *texts: the texts.
    """
    return hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()


class DuplicateQuestionsFilter:
    """
    Reject a record that repeats a question about the same scene.

    A task holds a hash of each question of its records. The first record with a question is kept.
    """

    name: ClassVar[str] = "duplicate_questions"

    def __init__(self) -> None:
        self.asked: set[bytes] = set()

    def check(self, record: SynthRecord) -> str | None:
        """
        Return the reason to reject the record, or None. A kept record is remembered.

        Args:
            record: the record.
        """
        scene = plain("\n".join(record.descriptions) or record.caption)
        pairs = [text_key(scene, question_key(turn)) for turn in record.turns]
        for number, pair in enumerate(pairs, 1):
            if pair in self.asked:
                return f"turn {number}: the question was asked about the same scene"
        self.asked.update(pairs)
        return None
