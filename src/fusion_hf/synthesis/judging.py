"""The steps that ask a model about a finished record: a judge who reads it, and one who sees its picture."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.inference.types import InferenceError

from fusion_hf.common.endpoints import data_uri
from fusion_hf.synthesis.category import load_categories
from fusion_hf.synthesis.config import Endpoint
from fusion_hf.synthesis.config import ImageCheck as ImageCheckSettings
from fusion_hf.synthesis.documents import TASK, add_usage, put_record, record_of
from fusion_hf.synthesis.filters.judge import ImageCheck, Judge
from fusion_hf.synthesis.progress import Progress
from fusion_hf.synthesis.record import SynthRecord
from fusion_hf.synthesis.requests import Generate, make_payload, usage_of

NANO = "nano"  # stands for the bundled model
ANSWER_TOKENS = 256


class AskJudge:
    """A rollout of `Requests`: one request for each record that is not rejected yet."""

    step = Judge.name

    def __init__(self, endpoint: Endpoint, progress: Progress):
        self.endpoint = endpoint
        self.progress = progress

    async def __call__(self, document: Document, generate: Generate) -> dict[str, Any]:
        record = record_of(document)
        usage: dict[str, int] = {}
        if record.rejection is None:
            try:
                result = await generate(make_payload(self.endpoint, self.content(record), record.seed))
                usage = usage_of(result)
                reason = self.rule(record, result.text).check(record)
            except InferenceError as error:
                reason = f"refused: {error.error}"
            record = record if reason is None else record.rejected(self.step, reason)
            put_record(document, record)
            add_usage(document, self.step, usage)
        self.progress.count(document.metadata[TASK], record)
        return usage

    def rule(self, record: SynthRecord, answer: str = "") -> Judge:
        """What reads the answer, and makes the prompt."""
        return Judge(lambda prompt, picture: answer, load_categories()[record.category].judge)

    def content(self, record: SynthRecord) -> str | list[dict[str, Any]]:
        """Of the message."""
        return self.rule(record).prompt(record)


class AskViewer(AskJudge):
    """
    The same with the picture, which goes along in the request.

    Args:
        pictures: the folder that the records' file names are relative to.
    """

    step = ImageCheck.name

    def __init__(self, endpoint: Endpoint, progress: Progress, pictures: Path):
        super().__init__(endpoint, progress)
        self.pictures = pictures

    def rule(self, record: SynthRecord, answer: str = "") -> Judge:
        rubric = load_categories()[record.category].image_check
        return ImageCheck(lambda prompt, picture: answer, rubric, self.pictures)

    def content(self, record: SynthRecord) -> str | list[dict[str, Any]]:
        uri = data_uri((self.pictures / record.images[0]).read_bytes(), "image/png")
        picture = {"type": "image_url", "image_url": {"url": uri}}
        return [picture, {"type": "text", "text": self.rule(record).prompt(record)}]


class LookWithFusion(PipelineStep):
    """A FUSION model of this process looks at the pictures."""

    name = "Look with FUSION"
    type = "Filter"

    def __init__(self, settings: ImageCheckSettings, pictures: Path, progress: Progress):
        super().__init__()
        self.settings, self.pictures, self.progress = settings, pictures, progress

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        from fusion_hf.inference.chat_model import ChatModel
        from fusion_hf.inference.conversation import Conversation

        name = None if self.settings.fusion == NANO else self.settings.fusion
        chat_model = ChatModel.load(name, self.settings.device, self.settings.dtype)

        def ask(prompt: str, picture: Path | None) -> str:
            conversation = Conversation(chat_model, chat_model.open_image(str(picture)), max_new_tokens=ANSWER_TOKENS)
            return conversation.ask(prompt)

        for document in data:
            record = record_of(document)
            if record.rejection is None:
                rule = ImageCheck(ask, load_categories()[record.category].image_check, self.pictures)
                with self.track_time():
                    reason = rule.check(record)
                record = record if reason is None else record.rejected(rule.name, reason)
                put_record(document, record)
            self.progress.count(document.metadata[TASK], record)
            yield document
        self.progress.flush()
