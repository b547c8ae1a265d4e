"""What models are asked about a record: to describe, to write questions and answers, to judge text and image."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.inference.types import InferenceError

from fusion_hf.common.endpoints import data_uri
from fusion_hf.synthesis.category import ModelCheck, load_categories
from fusion_hf.synthesis.progress import Progress
from fusion_hf.synthesis.record_documents import TASK, USAGE, put_record, record_of
from fusion_hf.synthesis.run_config import EndpointSettings, ImageCheckSettings
from fusion_hf.synthesis.schemas import DESCRIBE_SCHEMAS, AnswerModel, answer_model
from fusion_hf.synthesis.structured_answers import Generate, ask_structured, hash_prompt, make_payload, usage_of
from fusion_hf.synthesis.synth_record import StepOrigin, SynthRecord
from fusion_hf.synthesis.verdicts import fill_rubric, verdict_problem

NANO = "nano"  # stands for the bundled model
ANSWER_TOKENS = 256  # of FUSION as a judge


class RecordRollout:
    """
    A rollout of `RequestStep`: asks about each record that is not rejected yet, and notes what that took.

    Args:
        endpoint: who is asked.
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
        """Ask about a record; returns it after the request, and the requests and tokens of that."""
        raise NotImplementedError


class WriterRollout(RecordRollout):
    """
    Asks the writer, and notes who wrote, from which prompt and seed. A record that cannot be written is rejected with
    the reason.
    """

    fills: str  # field of the record

    async def ask(self, record: SynthRecord, generate: Generate) -> tuple[SynthRecord, dict[str, int]]:
        prompt, model = self.request(record)
        made = await ask_structured(generate, self.endpoint, prompt, model, record.seed)
        if made.reason is not None:
            return record.rejected(self.step, made.reason), made.usage
        origin = StepOrigin(self.endpoint.model, hash_prompt(prompt), made.seed)
        made_fields = {self.fills: made.answer.content(), "origins": {**record.origins, self.step: origin}}
        return replace(record, **made_fields), made.usage

    def request(self, record: SynthRecord) -> tuple[str, type[AnswerModel]]:
        """Make the prompt, and the model of its answer."""
        raise NotImplementedError


class DescribeRollout(WriterRollout):
    """Expands a caption to what the image is to show: one description for each image."""

    step, fills = "describe", "descriptions"

    def request(self, record: SynthRecord) -> tuple[str, type[AnswerModel]]:
        category = load_categories()[record.category]
        return category.describe(record.caption), DESCRIBE_SCHEMAS[category.pictures]


class WriteTurnsRollout(WriterRollout):
    """Asks for the turns of a conversation about the descriptions."""

    step, fills = "write_qa", "turns"

    def request(self, record: SynthRecord) -> tuple[str, type[AnswerModel]]:
        category = load_categories()[record.category]
        model = answer_model(category.schema, category.turns.least, category.turns.most)
        return category.ask(record.descriptions, record.seed), model


class JudgeRollout(RecordRollout):
    """Asks for a score of the record, and rejects it if that is too low, or if the answer holds none."""

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
        """Find what is scored."""
        return load_categories()[record.category].judge

    def content(self, record: SynthRecord) -> str | list[dict[str, Any]]:
        """Make the content of the message."""
        return fill_rubric(self.rubric(record), record)


class ImageJudgeRollout(JudgeRollout):
    """
    The same with the image, which goes along in the request.

    Args:
        images: the folder that the records' file names are relative to.
    """

    step = "image_check"

    def __init__(self, endpoint: EndpointSettings, progress: Progress, images: Path):
        super().__init__(endpoint, progress)
        self.images = images

    def rubric(self, record: SynthRecord) -> ModelCheck:
        return load_categories()[record.category].image_check

    def content(self, record: SynthRecord) -> list[dict[str, Any]]:
        uri = data_uri((self.images / record.images[0]).read_bytes(), "image/png")
        image = {"type": "image_url", "image_url": {"url": uri}}
        return [image, {"type": "text", "text": fill_rubric(self.rubric(record), record)}]


class FusionImageCheck(PipelineStep):
    """
    As `ImageJudgeRollout`, by a FUSION model of this process.

    Args:
        images: the folder that the records' file names are relative to.
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
