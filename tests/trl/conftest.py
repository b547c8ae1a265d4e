"""TRL's trainers on fusion-nano, whose placeholders are in the vocabulary, and on tiny models, whose are behind it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from tests.helpers.chat_models import FORMATS, load_chat_model, write_chat_model
from transformers import TrainerCallback

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
Gradients = dict[str, torch.Tensor]


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


@dataclass
class KeepGradients(TrainerCallback):
    """Keeps the gradients that the optimizer gets."""

    gradients: Gradients = field(default_factory=dict)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = gradients_of(model)


def gradients_of(model: torch.nn.Module) -> Gradients:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same_gradients(actual: Gradients, expected: Gradients, tolerance: float = 1e-5) -> None:
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        difference = (actual[name] - gradient).norm()
        assert difference <= tolerance * max(gradient.norm().item(), 1.0), name


def step_of(trainer: Callable[..., Any], model: Any, arguments: Any, rows: list[dict[str, Any]], **kwargs: Any) -> Any:
    """Train one step; returns the trainer, the loss that it logged, and the gradients."""
    keep = KeepGradients()
    made = trainer(
        model=model, args=arguments, train_dataset=datasets.Dataset.from_list(rows), callbacks=[keep], **kwargs
    )
    made.train()
    return made, made.state.log_history[0]["loss"], keep.gradients
