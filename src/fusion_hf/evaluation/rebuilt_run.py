"""A run of `fusion-hf evaluate` made anew from its record: its model as it ran, its questions as they were asked."""

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

CHECKED = ("image_processor", "generation_config", "chat_template", "tokenizer_sha256")  # not in a revision


@dataclass(eq=False)
class RebuiltRun:
    """
    One run, whose model is loaded.

    Attributes:
        name: For errors: RUN_A or RUN_B.
        run: Its answers.
        model: Its model, with the batch size of the run.
        task_images: Those that are in no file.
        images: Opened so far, by their files or questions.
    """

    name: str
    run: RunAnswers
    model: LocalModel
    task_images: TaskImages
    images: dict[str, Image.Image] = field(default_factory=dict)

    @classmethod
    def load(cls, name: str, run: RunAnswers, folder: str | None = None) -> "RebuiltRun":
        """
        Load the model of a run as the run had it.

        Args:
            name: For errors.
            run: Of `fusion-hf evaluate`.
            folder: The model's, where it is not where the record says.

        Raises:
            InputError: If the record does not say which model it was, or it is another one by now.
        """
        record = run.record
        if record is None:
            raise InputError(f"{name} is no record of `fusion-hf evaluate`, which says how to rebuild its answers.")
        option = f"--model-{name[-1].lower()}"
        settings = record.model.settings or {}
        if folder is None and record.model.url is not None:
            raise InputError(f"{name} asked a server; give its model's folder with {option}.")
        place = folder or settings.get("folder") or record.model.name
        if folder is None and place == Path(nano_path()).name and not Path(place).is_dir():
            place = nano_path()
        budget = {"query_len": record.model.query_len, "image_token_grid": record.model.image_token_grid}
        dtype = record.model.dtype if record.model.dtype in DTYPES else AUTO  # a server may not say
        model = LocalModel.load(place, _device_of(record.model.device), dtype, batch_size=record.batch_size, **budget)
        side = cls(name, run, model, TaskImages(record))
        side._check_model(place, option)
        return side

    def _check_model(self, place: str, option: str) -> None:
        """An InputError if the folder has not what the record says."""
        assert self.run.record is not None
        recorded = self.run.record.model
        found, wanted = (one.revision.rpartition("@")[2] for one in (self.model.info, recorded))
        if self.is_known and found != wanted:
            raise InputError(
                f"{place} is not the model of {self.name} any more: its revision is {found}, of the record {wanted}; "
                f"give the right folder with {option}."
            )
        settings = self.model.describe().settings or {}
        for name in CHECKED:
            if recorded.settings is not None and recorded.settings.get(name) != settings[name]:
                raise InputError(f"{place} has changed since {self.name}: {name} is another one than in the record.")

    @property
    def staged(self) -> StagedModel:
        return StagedModel(self.model.chat_model, self.model.budget)

    def decoding_of(self, sample: AnsweredQuestion) -> Decoding:
        """How the tokens of an answer are chosen."""
        return Decoding(self.model.chat_model.model.generation_config, wanted_of(sample))

    def open_image(
        self, task: str, sample: AnsweredQuestion, other: AnsweredQuestion | None = None
    ) -> Image.Image | None:
        """
        Open the image of a question.

        Args:
            task: The question is of this one.
            sample: This run's.
            other: The other run's, which may know the file where this one does not.

        Returns:
            The image; None for a question without one.

        Raises:
            InputError: If neither a file nor the data have it, or it is another image by now.
        """
        asked = sample.asked
        if asked is None or asked.image_sha256 is None:
            return None
        path = sample.image or (None if other is None else other.image)
        source = self.task_images.find(task, sample.doc_id) if path is None else path
        if source is None:
            raise InputError(
                f"no record names the file of the image of question {sample.doc_id}, and it is not found in the data "
                "by lmms-eval"
            )
        key = path or f"{task} {sample.doc_id}"
        if key not in self.images:
            self.images[key] = self.model.chat_model.open_image(source)
        image = self.images[key]
        if self.is_local and hash_image(image) != asked.image_sha256:
            raise InputError(f"the image of question {sample.doc_id} is not that of {self.name} any more: {key}")
        return image

    @property
    def is_known(self) -> bool:
        """Whether the record says which weights they were; those of an unknown server it does not."""
        return self.run.record is not None and self.run.record.model.dtype in DTYPES

    @property
    def is_local(self) -> bool:
        """Whether the run had its model in its own process: servers open images otherwise."""
        return self.run.record is not None and self.run.record.model.url is None

    def batch_of(self, task: str, sample: AnsweredQuestion) -> list[EvaluationPrompt]:
        """The other questions that the run answered together with one; empty without batches."""
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
        """Questions as the model computes them."""
        staged = self.staged
        return [
            StagedQuestion(
                staged.tokenize(staged.write_prompt(prompt.messages)),
                None if prompt.image is None else staged.preprocess(prompt.image),
            )
            for prompt in prompts
        ]


def _device_of(name: str) -> str:
    """The device of a run or, where this machine has none like it, its best."""
    try:
        choose_device(name)
    except InputError:
        return AUTO
    return name


def conversation(asked: AskedQuestion, image: Image.Image | None, key: str = "image") -> Messages:
    """A recorded conversation with its image; `key` names it in its block."""
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
    """How a question is to be answered."""
    assert sample.asked is not None and sample.asked.generation is not None
    settings = dict(sample.asked.generation)
    try:
        return Generation(**{**settings, "until": tuple(settings["until"])})
    except (KeyError, TypeError) as error:
        raise InputError(f"The generation of question {sample.doc_id} is {settings}, which is none.") from error
