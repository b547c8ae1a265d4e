"""What the language model answers: pydantic models, whose JSON schemas go with the request."""

from functools import cache
from typing import Annotated, Any

from fusion_hf.synthesis.choices import LETTERS, Choice
from fusion_hf.synthesis.synth_record import RecordTurn

try:
    from pydantic import BaseModel, ConfigDict, Field, StringConstraints, create_model, model_validator
except ModuleNotFoundError as error:
    raise ImportError("The data engine requires pydantic. Install the extra `synth`.") from error

LEAST_OPTIONS, MOST_OPTIONS = 3, 6

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class AnswerModel(BaseModel):
    """Base of all: unknown fields are errors, and strict endpoints get `additionalProperties: false`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def content(self) -> tuple[Any, ...]:
        """Return what becomes part of the record: a description for each picture, or turns as they are trained on."""
        raise NotImplementedError


class SceneDescription(AnswerModel):
    """What the picture is to show."""

    description: Text

    def content(self) -> tuple[str, ...]:
        return (self.description,)


class DescriptionPair(AnswerModel):
    """Two pictures that are alike but for one thing."""

    first: Text
    second: Text
    difference: Text

    @model_validator(mode="after")
    def _two(self) -> "DescriptionPair":
        if self.first == self.second:
            raise ValueError("first and second are the same text")
        return self

    def content(self) -> tuple[str, ...]:
        return (self.first, self.second)


class QuestionAnswer(AnswerModel):
    """One turn."""

    question: Text
    answer: Text

    def content(self) -> tuple[RecordTurn, ...]:
        return (RecordTurn(self.question, self.answer),)


class ChoiceQuestion(AnswerModel):
    """One turn of multiple choice; `answer` is the letter of the right option."""

    question: Text
    options: Annotated[list[Text], Field(min_length=LEAST_OPTIONS, max_length=MOST_OPTIONS)]
    answer: Annotated[str, StringConstraints(pattern=f"^[{LETTERS[:MOST_OPTIONS]}]$")]

    @model_validator(mode="after")
    def _among_options(self) -> "ChoiceQuestion":
        if LETTERS.index(self.answer) >= len(self.options):
            raise ValueError(f"answer is {self.answer}, but there are {len(self.options)} options")
        return self

    def content(self) -> tuple[RecordTurn, ...]:
        return (Choice(self.question, tuple(self.options), LETTERS.index(self.answer)).turn(),)


class ConversationAnswer(AnswerModel):
    """Several turns about one picture, or about a pair."""

    turns: list[QuestionAnswer]

    def content(self) -> tuple[RecordTurn, ...]:
        return tuple(turn for asked in self.turns for turn in asked.content())


class ChoiceConversation(ConversationAnswer):
    """Several turns of multiple choice."""

    turns: list[ChoiceQuestion]  # type: ignore[assignment]


class ReasonedAnswer(AnswerModel):
    """One question, the steps to its answer, and the answer."""

    question: Text
    reasoning: Annotated[list[Text], Field(min_length=2, max_length=8)]
    answer: Text

    def content(self) -> tuple[RecordTurn, ...]:
        return (RecordTurn(self.question, "\n".join([*self.reasoning, f"Answer: {self.answer}"])),)


SCHEMAS: dict[str, type[AnswerModel]] = {  # by the names that categories have for them
    "Conversation": ConversationAnswer, "ChoiceConversation": ChoiceConversation, "ReasonedAnswer": ReasonedAnswer,
}  # fmt: skip
DESCRIBE_SCHEMAS: dict[int, type[AnswerModel]] = {1: SceneDescription, 2: DescriptionPair}  # by number of pictures


@cache
def answer_model(name: str, least: int, most: int) -> type[AnswerModel]:
    """
    Make the pydantic model of an answer, with limits on the number of its turns if it has several.

    Args:
        name: the name of the schema.
        least: the minimum number of turns.
        most: the maximum number of turns.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in SCHEMAS:
        raise ValueError(f"`schema` must be one of {', '.join(SCHEMAS)}, got {name!r}.")
    model = SCHEMAS[name]
    if "turns" not in model.model_fields:
        return model
    kind: Any = model.model_fields["turns"].annotation
    return create_model(name, __base__=model, turns=(kind, Field(min_length=least, max_length=most)))
