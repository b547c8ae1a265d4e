"""The requests to models about a record (to describe, to write, to judge), and the interpretation of their answers."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.inference.types import InferenceError

from fusion_hf.common.endpoints import data_uri
from fusion_hf.synthesis.category import MOST_SCORE, Category, ModelCheck, load_categories
from fusion_hf.synthesis.progress import Progress
from fusion_hf.synthesis.record_documents import TASK, USAGE, put_record, record_of
from fusion_hf.synthesis.run_config import EndpointSettings, ImageCheckSettings
from fusion_hf.synthesis.schemas import DESCRIBE_SCHEMAS, AnswerModel, answer_model
from fusion_hf.synthesis.structured_answers import Generate, ask_structured, hash_prompt, make_payload, usage_of
from fusion_hf.synthesis.synth_record import StepOrigin, SynthRecord

_JSON = re.compile(r"\{.*\}", re.DOTALL)
_SCORE = re.compile(
    rf"\bscore\b\W*([1-{MOST_SCORE}])(?!\d|\.\d)|\b([1-{MOST_SCORE}])\s*(?:/|out of)\s*{MOST_SCORE}\b", re.I
)
_ALONE = re.compile(rf"\W*([1-{MOST_SCORE}])\W*")
NANO = "nano"  # the name of the bundled model
ANSWER_TOKENS = 256  # maximum length of an answer of FUSION as a judge


class RecordRollout:
    """
    A rollout of `RequestStep` that asks about each record that is not rejected, and stores the usage.

    Args:
        endpoint: the endpoint to ask.
        progress: counts the records.
    """

    step: str

    def __init__(self, endpoint: EndpointSettings, progress: Progress):
        self.endpoint = endpoint
        self.progress = progress

    async def __call__(self, document: Document, generate: Generate) -> dict[str, int]:
        record = record_of(document)
        usage: dict[str, int] = {}
        if record.rejection is None:
            record, usage = await self.ask(record, generate)
            put_record(document, record)
            document.metadata[USAGE][self.step] = usage
        self.progress.count(document.metadata[TASK], record)
        return usage

    async def ask(self, record: SynthRecord, generate: Generate) -> tuple[SynthRecord, dict[str, int]]:
        """
        Ask about a record.

        Args:
            record: the record.
            generate: sends a request.

        Returns:
            The changed record, and the number of requests and tokens.
        """
        raise NotImplementedError


class WriterRollout(RecordRollout):
    """
    Ask the writer, and store the model, the hash of the prompt and the seed. A record without a valid answer is
    rejected.
    """

    fills: str  # the field of the record to fill

    async def ask(self, record: SynthRecord, generate: Generate) -> tuple[SynthRecord, dict[str, int]]:
        prompt, model = self.request(load_categories()[record.category], record)
        made = await ask_structured(generate, self.endpoint, prompt, model, record.seed)
        if made.reason is not None:
            return record.rejected(self.step, made.reason), made.usage
        origin = StepOrigin(self.endpoint.model, hash_prompt(prompt), made.seed)
        made_fields = {self.fills: made.answer.content(), "origins": {**record.origins, self.step: origin}}
        return replace(record, **made_fields), made.usage

    def request(self, category: Category, record: SynthRecord) -> tuple[str, type[AnswerModel]]:
        """
        Return the prompt, and the pydantic model of its answer.

        Args:
            category: the category of the record.
            record: the record.
        """
        raise NotImplementedError


class DescribeRollout(WriterRollout):
    """Expand a caption into one description per image."""

    step, fills = "describe", "descriptions"

    def request(self, category: Category, record: SynthRecord) -> tuple[str, type[AnswerModel]]:
        return category.describe(record.caption), DESCRIBE_SCHEMAS[category.pictures]


class WriteTurnsRollout(WriterRollout):
    """Write the turns of a conversation about the descriptions."""

    step, fills = "write_qa", "turns"

    def request(self, category: Category, record: SynthRecord) -> tuple[str, type[AnswerModel]]:
        model = answer_model(category.schema, *category.turns)
        return category.ask(record.descriptions, record.seed), model


class Verdict(NamedTuple):
    """A score from 1 to 5, and the reason for it."""

    score: int
    reason: str


def parse_verdict(answer: str) -> Verdict | None:
    """
    Find the score in the answer of a judge: in a JSON object, as "score: 4" or "4/5", or as a single digit.

    Args:
        answer: the answer.

    Returns:
        The verdict, or None if there is no score.
    """
    if (found := _JSON.search(answer)) is not None:
        try:
            values = json.loads(found.group())
        except (ValueError, RecursionError):
            values = None
        if isinstance(values, dict):
            score = values.get("score")
            if isinstance(score, str) and score.strip().isascii() and score.strip().isdigit():
                score = int(score)
            if isinstance(score, (int, float)) and not isinstance(score, bool) and score in range(1, MOST_SCORE + 1):
                return Verdict(int(score), str(values.get("reason", "")))
            return None
    found = _SCORE.search(answer) or _ALONE.fullmatch(answer)
    if found is None:
        return None
    return Verdict(int(next(group for group in found.groups() if group)), answer.strip())


def fill_rubric(rubric: ModelCheck, record: SynthRecord) -> str:
    """
    Write the prompt that asks to score a record. For a pair, it says which description belongs to which image.

    Args:
        rubric: the check.
        record: the record.
    """
    descriptions = "\n".join(record.descriptions)
    if len(record.descriptions) > 1:
        sides = zip(("left", "right"), record.descriptions, strict=True)
        descriptions = "\n".join(f"The {side} picture: {text}" for side, text in sides)
    turns = "\n".join(f"Question: {turn.question}\nAnswer: {turn.answer}" for turn in record.turns)
    return Template(rubric.prompt).substitute(description=descriptions, conversation=turns)


def verdict_problem(rubric: ModelCheck, answer: str) -> str | None:
    """
    Return the reason why the answer of a judge rejects a record, or None if the record is kept.

    Args:
        rubric: the check.
        answer: the answer.
    """
    verdict = parse_verdict(answer)
    if verdict is None:
        return f"the answer has no score: {answer.strip()[:80]!r}"
    if verdict.score < rubric.least_score:
        return f"score {verdict.score}; allowed: {rubric.least_score} or more ({verdict.reason[:200]})"
    return None


class JudgeRollout(RecordRollout):
    """Ask for a score of the record, and reject the record if the score is missing or too low."""

    step = "judge"

    async def ask(self, record: SynthRecord, generate: Generate) -> tuple[SynthRecord, dict[str, int]]:
        usage: dict[str, int] = {}
        try:
            result = await generate(make_payload(self.endpoint, self.content(record), record.seed))
            usage = usage_of(result)
            reason = verdict_problem(self.rubric(record), result.text)
        except InferenceError as error:
            reason = f"refused: {error.error}"
        return record if reason is None else record.rejected(self.step, reason), usage

    def rubric(self, record: SynthRecord) -> ModelCheck:
        """
        Return the check of the record's category that has the name of this step.

        Args:
            record: the record.
        """
        rubric: ModelCheck = getattr(load_categories()[record.category], self.step)
        return rubric

    def content(self, record: SynthRecord) -> str | list[dict[str, Any]]:
        """
        Return the content of the message.

        Args:
            record: the record.
        """
        return fill_rubric(self.rubric(record), record)


class ImageJudgeRollout(JudgeRollout):
    """
    Ask for a score of the record, and send its image with the request.

    Args:
        endpoint: the endpoint to ask.
        progress: counts the records.
        images: the folder of the records' images.
    """

    step = "image_check"

    def __init__(self, endpoint: EndpointSettings, progress: Progress, images: Path):
        super().__init__(endpoint, progress)
        self.images = images

    def content(self, record: SynthRecord) -> list[dict[str, Any]]:
        uri = data_uri((self.images / record.images[0]).read_bytes(), "image/png")
        image = {"type": "image_url", "image_url": {"url": uri}}
        return [image, {"type": "text", "text": fill_rubric(self.rubric(record), record)}]


class FusionImageCheck(PipelineStep):
    """
    Score records with their images like `ImageJudgeRollout`, with a FUSION model in this process.

    Args:
        settings: the settings of the model.
        images: the folder of the records' images.
        progress: counts the records.
    """

    name = "Look with FUSION"
    type = "Filter"

    def __init__(self, settings: ImageCheckSettings, images: Path, progress: Progress):
        super().__init__()
        self.settings, self.images, self.progress = settings, images, progress

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        from fusion_hf.inference.chat_model import ChatModel
        from fusion_hf.inference.conversation import Conversation

        name = None if self.settings.fusion == NANO else self.settings.fusion
        chat_model = ChatModel.load(name, self.settings.device, self.settings.dtype)
        for document in data:
            record = record_of(document)
            if record.rejection is None:
                rubric = load_categories()[record.category].image_check
                with self.track_time():
                    image = chat_model.open_image(str(self.images / record.images[0]))
                    conversation = Conversation(chat_model, image, max_new_tokens=ANSWER_TOKENS)
                    reason = verdict_problem(rubric, conversation.ask(fill_rubric(rubric, record)))
                record = record if reason is None else record.rejected(ImageJudgeRollout.step, reason)
                put_record(document, record)
            self.progress.count(document.metadata[TASK], record)
            yield document
        self.progress.flush()
