"""The step in which a FUSION model of this process looks at the images."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from fusion_hf.synthesis.category import load_categories
from fusion_hf.synthesis.progress import Progress
from fusion_hf.synthesis.record_documents import TASK, put_record, record_of
from fusion_hf.synthesis.rollouts import ImageJudgeRollout
from fusion_hf.synthesis.run_config import ImageCheckSettings
from fusion_hf.synthesis.verdicts import fill_rubric, verdict_problem

NANO = "nano"  # stands for the bundled model
ANSWER_TOKENS = 256


class FusionImageCheck(PipelineStep):
    """
    As `ImageJudgeRollout`, without an endpoint.

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
