"""Measure how the answers to each form of question are distributed, that is, what a model could guess without the
image.
"""

from collections import Counter
from collections.abc import Mapping

from fusion_hf.synthesis.choices import plain, plain_turn
from fusion_hf.synthesis.filters.mentions import (
    asked_color,
    asked_counts,
    color_mentions,
    count_mentions,
    quoted,
    unquoted,
)
from fusion_hf.synthesis.filters.words import ARTICLES, color_of, is_word, number_at, tokens
from fusion_hf.synthesis.synth_record import RecordTurn

FORM_WORDS = 3  # number of first words that make the form of a question
SHORT_FORMS = (("how", "many"), ("is", "there"), ("are", "there"))  # forms whose next word is the thing in question
VALUE = "..."  # replaces a colour, a number or quoted text
ANSWER_WORDS = 4  # maximum length of an answer that is counted verbatim
CONCLUSION = "Answer:"  # follows the steps to a number
LONGER, OTHER = "(longer)", "(other)"
MOST_FORMS, MOST_ANSWERS = (
    64,
    24,
)  # limits per category and per form, since language models may write a new one for each record

Answers = dict[str, Counter[str]]


def question_form(question: str) -> str:
    """
    Return the form of a question: its first words, which questions about the same property share.

    Colours, numbers and quoted text become `...`, and articles are removed.

    Args:
        question: the question.

    Returns:
        Up to three words, for example "which shape is" for "Which shape is left of the red circle?".
    """
    words = []
    parts = tokens(unquoted(question, f" {VALUE[0]} "))
    if parts[:2] in SHORT_FORMS:
        return " ".join(parts[:2])
    for place, token in enumerate(parts):
        is_value = token == VALUE[0] or number_at(parts, place) is not None or bool(color_of(token))
        if is_value:
            words.append(VALUE)
        elif is_word(token) and token not in (*ARTICLES, "the"):
            words.append(token)
        if len(words) == FORM_WORDS:
            break
    return " ".join(words)


def answer_value(turn: RecordTurn) -> str:
    """
    Return the value of an answer in a normal form, so that a word, a phrase and a sentence with the same answer
    agree.

    Args:
        turn: the question and its answer.

    Returns:
        "yes" or "no", a number in digits, a colour, a short answer in lower case, or `LONGER`.
    """
    plain_text = plain_turn(turn)
    question, answer = plain_text.question, plain_text.answer
    parts = tokens(answer)
    if parts[:1] in (("yes",), ("no",)) and not asked_counts(question):
        return parts[0]
    if asked_counts(question):
        numbers = count_mentions(answer.rpartition(CONCLUSION)[2], articles=True)
        return f"{numbers[0].value:g}" if numbers else LONGER
    if asked_color(question) is not None and (colors := color_mentions(answer, plain=True)):
        return colors[0].word
    texts = quoted(answer)
    if len(texts) == 1:
        return plain(texts[0])
    words = plain(answer).split()
    words = words[1:] if words[:1] in (["a"], ["an"], ["the"]) else words
    sentence = answer.endswith(".") and len(words) > 1
    return " ".join(words) if 0 < len(words) <= ANSWER_WORDS and not sentence else LONGER


def count_answers(found: Answers, turn: RecordTurn) -> None:
    """
    Add the answer of a turn to the counts of its form.

    Args:
        found: the counts, changed in place.
        turn: the question and its answer.
    """
    merge_answers(found, {question_form(plain_turn(turn).question): {answer_value(turn): 1}})


def merge_answers(found: Answers, more: Mapping[str, Mapping[str, int]]) -> None:
    """
    Add the counts of another task.

    Entries above the limits count as `OTHER`, which bounds the size of a summary.

    Args:
        found: the counts, changed in place.
        more: the counts of the other task.
    """
    for form, values in more.items():
        for value, count in values.items():
            counts = found.setdefault(form if form in found or len(found) < MOST_FORMS else OTHER, Counter())
            counts[value if value in counts or len(counts) < MOST_ANSWERS else OTHER] += count
