"""Read images that are in no file again from the data of their task."""

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from fusion_hf.evaluation.run_record import RunRecord

UNREADABLE = (ArithmeticError, AttributeError, ImportError, LookupError, OSError, TypeError, ValueError)


class TaskImages:
    """
    Read the images of a run's questions with lmms-eval, as the run did.

    Args:
        record: the record of the run. Its tasks are prepared again, since files next to a record may hold untrusted
            code.
    """

    def __init__(self, record: RunRecord | None):
        self.record = record
        self._folder = tempfile.TemporaryDirectory()
        self._tasks: dict[str, Any] = {}

    def find(self, name: str, doc_id: int) -> Image.Image | None:
        """
        Find the image of a question.

        Args:
            name: the name of the task.
            doc_id: the number of the question.

        Returns:
            The first image of the question. None if lmms-eval or the data is missing, or the question has no image.
        """
        if self.record is None or name not in [task.task for task in self.record.tasks]:
            return None
        if find_spec("lmms_eval") is None:
            return None
        try:
            shown = self._read(name, doc_id)
        except UNREADABLE:
            return None
        return next((image for image in shown if isinstance(image, Image.Image)), None)

    def _read(self, name: str, doc_id: int) -> list[Any]:
        from loguru import logger

        from fusion_hf.evaluation.benchmark_data import silence

        logger.disable("lmms_eval")
        with silence():
            task = self._load(name)
            return task.doc_to_visual(task.eval_docs[doc_id]) or []

    def _load(self, name: str) -> Any:
        from fusion_hf.evaluation.benchmark_data import load_task, prepare_tasks

        if name not in self._tasks:
            assert self.record is not None
            root = None if self.record.data_root is None else Path(self.record.data_root)
            (prepared,) = prepare_tasks([name], self.record.prompts, root, Path(self._folder.name))
            self._tasks[name] = load_task(prepared)
        return self._tasks[name]
