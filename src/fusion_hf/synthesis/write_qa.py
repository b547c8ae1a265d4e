"""The step from descriptions to questions and answers."""

from dataclasses import replace
from typing import Any

from fusion_hf.synthesis.category import load_categories
from fusion_hf.synthesis.describe import Writing
from fusion_hf.synthesis.record import SynthRecord
from fusion_hf.synthesis.schemas import turns_of


class WriteQA(Writing):
    """Asks for the turns of a conversation."""

    step = "write_qa"

    def request(self, record: SynthRecord) -> tuple[str, Any]:
        category = load_categories()[record.category]
        return category.ask(record.descriptions, record.seed), category.answer_model()

    def take(self, record: SynthRecord, answer: Any) -> SynthRecord:
        return replace(record, turns=turns_of(answer))
