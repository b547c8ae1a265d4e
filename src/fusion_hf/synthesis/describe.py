"""The step from a caption to what the picture is to show: one description for each picture."""

from dataclasses import replace
from typing import Any

from datatrove.data import Document

from fusion_hf.synthesis.category import load_categories
from fusion_hf.synthesis.config import Endpoint
from fusion_hf.synthesis.documents import TASK, add_usage, put_record, record_of
from fusion_hf.synthesis.progress import Progress
from fusion_hf.synthesis.record import Origin, SynthRecord
from fusion_hf.synthesis.requests import Generate, Structured, ask_structured, hash_prompt
from fusion_hf.synthesis.schemas import descriptions_of


class Writing:
    """
    A rollout of `Requests` that asks the writer once for each record, and notes who wrote, from which prompt and seed.
    A record that cannot be written is rejected with the reason.
    """

    step: str

    def __init__(self, endpoint: Endpoint, progress: Progress):
        self.endpoint = endpoint
        self.progress = progress

    async def __call__(self, document: Document, generate: Generate) -> dict[str, Any]:
        record = record_of(document)
        usage: dict[str, int] = {}
        if record.rejection is None:
            prompt, model = self.request(record)
            made = await ask_structured(generate, self.endpoint, prompt, model, self.seed(record))
            usage = made.usage
            record = self._written(record, prompt, made)
            put_record(document, record)
            add_usage(document, self.step, usage)
        self.progress.count(document.metadata[TASK], record)
        return usage

    def request(self, record: SynthRecord) -> tuple[str, Any]:
        """The prompt, and the pydantic model of its answer."""
        raise NotImplementedError

    def take(self, record: SynthRecord, answer: Any) -> SynthRecord:
        """The record with what was answered."""
        raise NotImplementedError

    def seed(self, record: SynthRecord) -> int:
        """Of the request."""
        return record.seed

    def _written(self, record: SynthRecord, prompt: str, made: Structured) -> SynthRecord:
        if made.reason is not None:
            return record.rejected(self.step, made.reason)
        origin = Origin(self.endpoint.model, hash_prompt(prompt), made.seed)
        return replace(self.take(record, made.answer), origins={**record.origins, self.step: origin})


class Describe(Writing):
    """Expands a caption."""

    step = "describe"

    def request(self, record: SynthRecord) -> tuple[str, Any]:
        category = load_categories()[record.category]
        return category.describe(record.caption), category.describe_model()

    def take(self, record: SynthRecord, answer: Any) -> SynthRecord:
        return replace(record, descriptions=descriptions_of(answer))
