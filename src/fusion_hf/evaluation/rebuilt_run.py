"""Rebuild a run of `fusion-hf evaluate` from its record: its model, and its questions as they were asked."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from fusion_hf.common.errors import InputError
from fusion_hf.evaluation.local import LocalModel
from fusion_hf.evaluation.prompting import EvaluationPrompt, Generation, Messages, Request
from fusion_hf.evaluation.run_answers import RunAnswers
from fusion_hf.evaluation.sample_log import AnsweredQuestion, AskedQuestion
from fusion_hf.evaluation.staged_model import Decoding, StagedModel, StagedQuestion
from fusion_hf.evaluation.task_images import TaskImages
from fusion_hf.hub.folders import nano_path
from fusion_hf.inference.devices import AUTO, DTYPES, choose_device
from fusion_hf.inference.image_digests import hash_image

CHECKED = (
    "image_processor",
    "generation_config",
    "chat_template",
    "tokenizer_sha256",
)  # settings that a revision does not cover


@dataclass(eq=False)
class RebuiltRun:
    """
    A run whose model is loaded.

    Attributes:
        name: RUN_A or RUN_B, for errors.
        run: the answers of the run.
        model: the model, with the batch size of the run.
        task_images: images that are in no file.
        images: the images opened so far, by file or question.
    """

    name: str
    run: RunAnswers
    model: LocalModel
    task_images: TaskImages
    images: dict[str, Image.Image] = field(default_factory=dict)

    @classmethod
    def load(cls, name: str, run: RunAnswers, folder: str | None = None) -> "RebuiltRun":
        """
        Load the model of a run with the settings of the run.

        Args:
            name: RUN_A or RUN_B, for errors.
            run: a run of `fusion-hf evaluate`.
            folder: the folder of the model if it is not where the record says.

        Raises:
            InputError: if the record does not name the model, or the model has changed.
        """
        record = run.record
        if record is None:
            raise InputError(
                f"{name} must be a record of `fusion-hf evaluate`, since other runs do not say how to rebuild them."
            )
        option = f"--model-{name[-1].lower()}"
        settings = record.model.settings or {}
        if folder is None and record.model.url is not None:
            raise InputError(f"{name} asked a server. Give the folder of its model with {option}.")
        place = folder or settings.get("folder") or record.model.name
        if folder is None and place == Path(nano_path()).name and not Path(place).is_dir():
            place = nano_path()
        budget = {"query_len": record.model.query_len, "image_token_grid": record.model.image_token_grid}
        dtype = record.model.dtype if record.model.dtype in DTYPES else AUTO  # a server may not report its dtype
        model = LocalModel.load(place, _device_of(record.model.device), dtype, batch_size=record.batch_size, **budget)
        side = cls(name, run, model, TaskImages(record))
        side._check_model(place, option)
        return side

    def _check_model(self, place: str, option: str) -> None:
        """Raise an InputError if the folder differs from what the record says."""
        assert self.run.record is not None
        recorded = self.run.record.model
        found, wanted = (one.revision.rpartition("@")[2] for one in (self.model.info, recorded))
        if self.is_known and found != wanted:
            raise InputError(
                f"The revision of {place} must be {wanted}, as in the record of {self.name}, got {found}. Give the "
                f"right folder with {option}."
            )
        settings = self.model.describe().settings or {}
        for name in CHECKED:
            if recorded.settings is not None and recorded.settings.get(name) != settings[name]:
                raise InputError(f"{place} has changed since {self.name}: {name} differs from the record.")

    @property
    def staged(self) -> StagedModel:
        """The model of the run, ready to run stage by stage."""
        return StagedModel(self.model.chat_model, self.model.budget)

    def decoding_of(self, sample: AnsweredQuestion) -> Decoding:
        """
        Return how the tokens of an answer are chosen.

        Args:
            sample: the answered question.
        """
        return Decoding(self.model.chat_model.model.generation_config, wanted_of(sample))

    def open_image(
        self, task: str, sample: AnsweredQuestion, other: AnsweredQuestion | None = None
    ) -> Image.Image | None:
        """
        Open the image of a question.

        Args:
            task: the task of the question.
            sample: the question in this run.
            other: the question in the other run, which may know the file.

        Returns:
            The image, or None if the question has none.

        Raises:
            InputError: if neither a file nor the data has the image, or the image has changed.
        """
        asked = sample.asked
        if asked is None or asked.image_sha256 is None:
            return None
        path = sample.image or (None if other is None else other.image)
        source = self.task_images.find(task, sample.doc_id) if path is None else path
        if source is None:
            raise InputError(
                f"the image of question {sample.doc_id} was not found: no record names its file, and lmms-eval does "
                "not find it in the data"
            )
        key = path or f"{task} {sample.doc_id}"
        if key not in self.images:
            self.images[key] = self.model.chat_model.open_image(source)
        image = self.images[key]
        if self.is_local and hash_image(image) != asked.image_sha256:
            raise InputError(f"the image of question {sample.doc_id} has changed since {self.name}: {key}")
        return image

    @property
    def is_known(self) -> bool:
        """Whether the record identifies the weights. Servers may not report them."""
        return self.run.record is not None and self.run.record.model.dtype in DTYPES

    @property
    def is_local(self) -> bool:
        """Whether the run had its model in its own process. Servers open images in another way."""
        return self.run.record is not None and self.run.record.model.url is None

    def batch_of(self, task: str, sample: AnsweredQuestion) -> list[EvaluationPrompt]:
        """
        Return the other questions that the run answered in the same batch, empty if it used no batches.

        Args:
            task: the task of the question.
            sample: the question.
        """
        if self.model.batch_size == 1 or not self.is_local:
            return []
        samples = list(self.run.tasks[task].samples)
        begin = samples.index(sample) // self.model.window * self.model.window
        prompts: dict[str, EvaluationPrompt] = {}
        own = None
        for each in samples[begin : begin + self.model.window]:
            if each.asked is None or each.asked.generation is None:
                continue
            prompt = self._prompt(task, each)
            prompts.setdefault(prompt.key, prompt)
            own = prompt.key if each is sample else own
        batches = self.model.plan(list(prompts.values()))
        together = next(batch for batch in batches if own in [prompt.key for prompt in batch])
        return [prompt for prompt in together if prompt.key != own]

    def _prompt(self, task: str, sample: AnsweredQuestion) -> EvaluationPrompt:
        assert sample.asked is not None
        messages = conversation(sample.asked, self.open_image(task, sample), "url")
        return self.model.reader.prompt(Request(task, sample.doc_id, lambda: messages, wanted_of(sample)))

    def rows(self, prompts: Sequence[EvaluationPrompt]) -> list[StagedQuestion]:
        """
        Convert prompts to questions for the staged model.

        Args:
            prompts: the prompts.
        """
        staged = self.staged
        return [
            StagedQuestion(
                staged.tokenize(staged.write_prompt(prompt.messages)),
                None if prompt.image is None else staged.preprocess(prompt.image),
            )
            for prompt in prompts
        ]


def _device_of(name: str) -> str:
    """Return the device of a run, or the best one if this machine has no such device."""
    try:
        choose_device(name)
    except InputError:
        return AUTO
    return name


def conversation(asked: AskedQuestion, image: Image.Image | None, key: str = "image") -> Messages:
    """
    Return a recorded conversation with its image.

    Args:
        asked: the recorded question.
        image: its image, or None.
        key: the key of the image in its block.
    """
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image", key: image} if block["type"] == "image" else block for block in message["content"]
            ],
        }
        for message in asked.messages
    ]


def wanted_of(sample: AnsweredQuestion) -> Generation:
    """
    Return how a question must be answered.

    Args:
        sample: the answered question.

    Raises:
        InputError: if the record has invalid settings.
    """
    assert sample.asked is not None and sample.asked.generation is not None
    settings = dict(sample.asked.generation)
    try:
        return Generation(**{**settings, "until": tuple(settings["until"])})
    except (KeyError, TypeError) as error:
        raise InputError(f"Question {sample.doc_id} must have valid generation settings, got {settings}.") from error
