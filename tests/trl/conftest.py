"""TRL's trainers on fusion-nano, whose placeholders are in the vocabulary, and on tiny models, whose are behind it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from tests.helpers.chat_models import FORMATS, load_chat_model, write_chat_model
from tests.helpers.gradients import KeepGradients

import fusion_hf
from fusion_hf import FusionForConditionalGeneration, FusionProcessor

KINDS = ("nano", *FORMATS)
# questions and answers of unequal lengths
CHATS = (
    ("red", "what color is the circle ?", "red"),
    ("blue", "how many shapes are there in the picture ?", "two and one more"),
    ("green", "is it red ?", "no"),
    ("black", "what is this shape called by people who know it ?", "a circle"),
)
TEXT_ONLY, LATER_TURN = 1, 3  # numbers of chats
# an adapter of the language model of every kind
LORA = {"r": 4, "lora_alpha": 8, "target_modules": r".*language_model.*\.(q_proj|v_proj|qkv_proj)"}
# of every trainer: one step on the CPU, nothing written, gradients as they are
ONE_STEP = {
    "max_steps": 1,
    "per_device_train_batch_size": len(CHATS),
    "max_grad_norm": 0.0,
    "report_to": "none",
    "use_cpu": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "bf16": False,
    "gradient_checkpointing": False,
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """TRL sends a message to the Hub for each trainer that is made, but not in continuous integration."""
    monkeypatch.setenv("CI", "1")


@dataclass
class Subject:
    """A model's folder, loaded anew for each training."""

    kind: str
    folder: Path

    def load(self) -> tuple[FusionForConditionalGeneration, FusionProcessor]:
        return load_chat_model(self.folder)


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("trl")
    nano = Path(fusion_hf.__file__).parent / "checkpoints" / "fusion-nano"
    return {"nano": nano} | {kind: write_chat_model(root / kind, kind) for kind in FORMATS}


@pytest.fixture(params=KINDS)
def subject(request, folders) -> Subject:
    return Subject(request.param, folders[request.param])


def image(color: str) -> Image.Image:
    return Image.new("RGB", (40, 30), color)


def ask(question: str) -> dict[str, str]:
    return {"role": "user", "content": question}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def step_of(trainer: Callable[..., Any], model: Any, arguments: Any, rows: list[dict[str, Any]], **kwargs: Any) -> Any:
    """Train one step; returns the trainer, the loss that it logged, and the gradients."""
    keep = KeepGradients()
    made = trainer(
        model=model, args=arguments, train_dataset=datasets.Dataset.from_list(rows), callbacks=[keep], **kwargs
    )
    made.train()
    return made, made.state.log_history[0]["loss"], keep.gradients


@dataclass
class Pass:
    """What a model was asked in one pass with TRL's fused head, and what it gave."""

    input_ids: torch.Tensor  # (B, S)
    attention_mask: torch.Tensor  # (B, S)
    log_probs: torch.Tensor  # (B, S - 1)
    label_mask: torch.Tensor  # (B, S - 1)
    has_gradient: bool

    def rows(self) -> list[tuple[list[int], torch.Tensor]]:
        """Of each row, the ids without padding and the log-probabilities of its labelled tokens, which end it."""
        return [
            (ids[mask.bool()].tolist(), log_probs[labelled])
            for ids, mask, log_probs, labelled in zip(
                self.input_ids, self.attention_mask, self.log_probs, self.label_mask, strict=True
            )
        ]


def record_passes(model: torch.nn.Module) -> list[Pass]:
    """Record the passes that a model makes from now on with TRL's fused head."""
    passes: list[Pass] = []

    def record(module, args, kwargs, outputs):
        if outputs.get("log_probs") is not None:
            ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
            log_probs = outputs.log_probs.detach().clone()
            passes.append(Pass(ids, mask, log_probs, outputs.label_mask, outputs.log_probs.requires_grad))

    model.register_forward_hook(record, with_kwargs=True)
    return passes


def with_image(messages: list[dict[str, Any]], image: Image.Image | None) -> list[dict[str, Any]]:
    """The messages with the image in the first question, as the processor reads them."""
    if image is None:
        return messages
    first = next(number for number, message in enumerate(messages) if message["role"] == "user")
    content = [{"type": "image", "image": image}, {"type": "text", "text": messages[first]["content"]}]
    return [*messages[:first], {**messages[first], "content": content}, *messages[first + 1 :]]


@dataclass
class Prompt:
    """One prompt, and the model's own forward on it with some completion: what all trainers are compared with."""

    processor: FusionProcessor
    messages: list[dict[str, Any]]
    image: Image.Image | None = None

    def __post_init__(self) -> None:
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
        self.inputs = dict(self.processor.apply_chat_template(with_image(self.messages, self.image), **options))

    @property
    def ids(self) -> list[int]:
        return self.inputs["input_ids"][0].tolist()

    def conversation(self, text: str) -> dict[str, torch.Tensor]:
        """The processor's features of the prompt with an answer."""
        messages = with_image([*self.messages, answer(text)], self.image)
        return self.processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")

    def log_probs(self, model: FusionForConditionalGeneration, completion: list[int]) -> torch.Tensor:
        """Log-probabilities of a completion's tokens, `(n,)`, with the turns and questions that the processor gave."""
        ids = torch.tensor([[*self.ids, *completion]])
        inputs = self.inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logits = model(**inputs, logits_to_keep=len(completion) + 1).logits[0, :-1]  # (n, vocabulary)
        return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def prompts_of(processor: FusionProcessor, has_images: bool = True) -> list[Prompt]:
    """
    Prompts of unequal lengths. One of those with images has none, and one is a later turn.

    The system message is short, so that the large vocabularies of real tokenizers are asked at few positions.
    """
    prompts = []
    for number, (color, question, _) in enumerate(CHATS):
        turns = [ask("hello ?"), answer("yes")] if number == LATER_TURN else []
        shown = image(color) if has_images and number != TEXT_ONLY else None
        messages = [{"role": "system", "content": "see"}, *turns, ask(question)]
        prompts.append(Prompt(processor, messages, shown))
    return prompts


def columns_of(prompt: Prompt, has_images: bool = True) -> dict[str, Any]:
    """The columns of a prompt in TRL's data sets."""
    columns: dict[str, Any] = {"prompt": prompt.messages}
    return columns | {"images": [prompt.image] if prompt.image else []} if has_images else columns


def mapping_loss(model: FusionForConditionalGeneration, prompts: list[Prompt]) -> torch.Tensor:
    """Of one batch of these prompts, weighted as in the loss of `FusionTrainer`."""
    chats = [with_image(prompt.messages, prompt.image) for prompt in prompts]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    batch = prompts[0].processor.apply_chat_template(chats, **options)
    return model.config.mapping_loss_weight * model.model(**batch, output_mapping_loss=True).mapping_loss


def prompt_of(ids: list[int], prompts: list[Prompt]) -> Prompt:
    """The prompt that a row begins with."""
    return next(prompt for prompt in prompts if ids[: len(prompt.ids)] == prompt.ids)


def assert_own_log_probs(passed: Pass, model: FusionForConditionalGeneration, prompts: list[Prompt]) -> None:
    """Every row of a batch is what the model gives for the row alone."""
    for ids, log_probs in passed.rows():
        prompt = prompt_of(ids, prompts)
        with torch.no_grad():
            expected = prompt.log_probs(model, ids[len(prompt.ids) :])
        torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=0)


def another_model(subject: Subject) -> FusionForConditionalGeneration:
    """A model that differs a little from the subject's."""
    model, _ = subject.load()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + 0.02 * torch.randn_like(weight))
    return model
