"""transformers' own Trainer, with FUSION's collator and with one as notebooks write it, against a pass by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.helpers.chat_models import SMALL_PARAMETERS, load_chat_model, write_chat_model
from tests.helpers.gradients import KeepGradients, assert_same_gradients, gradients_of
from transformers import Trainer, TrainingArguments

from fusion_hf import FusionProcessor, nano_path
from fusion_hf.training import FusionDataCollator

CHATS = (
    ("red", "what color is the circle ?", "red"),
    ("blue", "how many shapes are there in the picture ?", "two and one more"),
    ("green", "is it red ?", "no"),
    ("black", "what is this shape called ?", "a circle"),
)
RECORDS = [
    {
        "image": Image.new("RGB", (40, 30), color),
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
    }
    for color, question, answer in CHATS
]
SETTINGS: dict[str, Any] = {
    "max_steps": 1,
    "max_grad_norm": 0.0,
    "report_to": "none",
    "use_cpu": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "remove_unused_columns": False,
}


class NotebookCollator:
    """As most examples write it: the ids are the labels, placeholders and padding included."""

    def __init__(self, processor: FusionProcessor):
        self.processor = processor

    def __call__(self, records: list[dict[str, Any]]) -> Any:
        chats = [
            [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question["content"]}]},
                answer,
            ]
            for question, answer in (record["messages"] for record in records)
        ]
        texts = [self.processor.apply_chat_template(chat) for chat in chats]
        images = [[record["image"]] for record in records]
        batch = self.processor(text=texts, images=images, return_tensors="pt", padding=True)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch


COLLATORS = (FusionDataCollator, NotebookCollator)


@pytest.fixture(scope="module", params=SMALL_PARAMETERS)
def folder(request, tmp_path_factory):
    if request.param == "nano":
        return nano_path()
    return write_chat_model(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.mark.parametrize("collator", COLLATORS)
@pytest.mark.parametrize("batch_size", [4, 1])
def test_a_step_is_that_by_hand(folder, tmp_path, collator, batch_size) -> None:
    """Also one record at a time: the gradients are then the mean of those of the single records."""
    model, processor = load_chat_model(folder)
    keep = KeepGradients()
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=len(RECORDS) // batch_size,
        **SETTINGS,
    )
    trainer = Trainer(model, arguments, collator(processor), RECORDS, callbacks=[keep])
    trainer.train()

    model, processor = load_chat_model(folder)
    ignored = torch.tensor([model.config.image_token_id, model.config.latent_token_id])
    losses = []
    for begin in range(0, len(RECORDS), batch_size):
        batch = collator(processor)(RECORDS[begin : begin + batch_size])
        batch["labels"] = batch["labels"].masked_fill(torch.isin(batch["labels"], ignored), -100)
        losses.append(model.train()(**batch).loss)
    loss = torch.stack(losses).mean()
    loss.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(keep.gradients, gradients_of(model))


@pytest.mark.parametrize("collator", COLLATORS)
def test_predictions_are_the_logits(folder, tmp_path, collator) -> None:
    model, processor = load_chat_model(folder)
    seen = {}

    def count(prediction: Any) -> dict[str, float]:
        seen["logits"] = prediction.predictions
        return {"rows": float(len(prediction.predictions))}

    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=4, **SETTINGS)
    trainer = Trainer(model, arguments, collator(processor), compute_metrics=count)
    result = trainer.predict(RECORDS)
    batch = collator(processor)(RECORDS)
    with torch.no_grad():
        expected = model(**batch).logits
    assert result.metrics["test_rows"] == len(RECORDS)
    np.testing.assert_allclose(seen["logits"], expected.numpy(), atol=1e-4)
