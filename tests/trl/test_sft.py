"""TRL's SFTTrainer against a forward pass written by hand on the same rows: loss, gradients, mapping loss included."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tests.helpers.gradients import assert_same_gradients, gradients_of
from tests.helpers.hub_folder import run
from tests.trl.conftest import CHATS, ONE_STEP, Subject, answer, ask, image, step_of

from fusion_hf.training import FusionDataCollator, FusionTrainer, FusionTrainingArguments

pytestmark = pytest.mark.trl
TOLERANCE = 1e-5
SMOOTHING = 0.1
ASK = """
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
inputs = processor.apply_chat_template(
    messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
ids = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1]:]
print(processor.decode(ids, skip_special_tokens=True))
"""
Rows = list[dict[str, Any]]


def rows_of(with_image: bool = True, as_completion: bool = False) -> Rows:
    rows = []
    for color, question, text in CHATS:
        row = {"images": [image(color)]} if with_image else {}
        if as_completion:
            rows.append(row | {"prompt": [ask(question)], "completion": [answer(text)]})
        else:
            rows.append(row | {"messages": [ask(question), answer(text)]})
    return rows


def train(subject: Subject, tmp_path, rows: Rows, **settings: Any):
    from trl import SFTConfig, SFTTrainer

    model, processor = subject.load()
    trainer_settings = {name: settings.pop(name) for name in ("data_collator", "peft_config") if name in settings}
    arguments = SFTConfig(str(tmp_path), **{**ONE_STEP, "max_length": None, **settings})
    return step_of(SFTTrainer, model, arguments, rows, processing_class=processor, **trainer_settings)


def label_everything(batch: dict[str, Any]) -> dict[str, Any]:
    """Labels of prompts too, as TRL has them by default."""
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def by_hand(subject: Subject, rows: Rows, label_prompts: bool = False):
    model, processor = subject.load()
    batch = FusionDataCollator(processor)(copy.deepcopy(rows))
    outputs = model.train()(**(label_everything(batch) if label_prompts else batch))
    outputs.loss.backward()
    return outputs, gradients_of(model)


@pytest.mark.parametrize("with_image", [True, False], ids=["image", "text"])
@pytest.mark.parametrize("loss_type", [None, "nll", "chunked_nll"])
def test_messages_train_as_by_hand(subject, tmp_path, loss_type, with_image):
    settings = {} if loss_type is None else {"loss_type": loss_type}
    rows = rows_of(with_image)
    _, loss, gradients = train(subject, tmp_path, rows, **settings)
    expected, expected_gradients = by_hand(subject, rows, label_prompts=True)
    assert expected.mapping_loss > 0.1
    assert loss == pytest.approx(expected.language_loss.item(), abs=TOLERANCE)
    assert_same_gradients(gradients, expected_gradients)


@pytest.mark.parametrize("with_image", [True, False], ids=["image", "text"])
def test_answers_alone_train_as_by_hand(subject, tmp_path, with_image):
    rows = rows_of(with_image)
    _, loss, gradients = train(subject, tmp_path, rows, assistant_only_loss=True)
    expected, expected_gradients = by_hand(subject, rows)
    assert loss == pytest.approx(expected.language_loss.item(), abs=TOLERANCE)
    assert_same_gradients(gradients, expected_gradients)


def test_own_collator_trains_as_fusion_trainer(subject, tmp_path):
    rows = rows_of()
    _, processor = subject.load()
    collator = FusionDataCollator(processor)
    _, _, gradients = train(subject, tmp_path, rows, data_collator=collator, remove_unused_columns=False)
    model, _ = subject.load()
    steps = {name: value for name, value in ONE_STEP.items() if name != "gradient_checkpointing"}
    arguments = FusionTrainingArguments(str(tmp_path / "own"), **steps)
    _, _, expected = step_of(FusionTrainer, model, arguments, rows, data_collator=collator)
    assert_same_gradients(gradients, expected)


def test_completions_train_as_by_hand(subject, tmp_path):
    """TRL also labels what the template writes behind an answer's end: one line break in two of the formats."""
    rows = rows_of(as_completion=True)
    trainer, loss, gradients = train(subject, tmp_path, rows)
    batch = trainer.data_collator(copy.deepcopy(rows))
    model, processor = subject.load()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "labels")}
    expected = model.train()(**inputs)
    expected.loss.backward()
    assert loss == pytest.approx(expected.language_loss.item(), abs=TOLERANCE)
    assert_same_gradients(gradients, gradients_of(model))
    chats = [row["prompt"] + row["completion"] for row in rows]
    texts = processor.apply_chat_template([[{**chat[0], "content": with_block(chat)}, *chat[1:]] for chat in chats])
    whole = processor(text=texts, images=[row["images"] for row in rows])
    kept = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert kept == whole["input_ids"]


def with_block(chat: Rows) -> Rows:
    return [{"type": "image"}, {"type": "text", "text": chat[0]["content"]}]


def test_accumulated_batches_are_averaged(subject, tmp_path):
    rows = rows_of()
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": len(rows), "seed": 0}
    _, loss, gradients = train(subject, tmp_path, rows, assistant_only_loss=True, **settings)
    single = [by_hand(subject, [row]) for row in rows]
    assert loss == pytest.approx(sum(each.language_loss.item() for each, _ in single) / len(rows), abs=TOLERANCE)
    mean = {name: sum(each[name] for _, each in single) / len(rows) for name in single[0][1]}
    assert_same_gradients(gradients, mean)


def test_label_smoothing_trains_the_mapping_loss(subject, tmp_path):
    rows = rows_of()
    with pytest.warns(FutureWarning, match="label_smoothing_factor"):
        _, loss, gradients = train(subject, tmp_path, rows, assistant_only_loss=True, label_smoothing_factor=SMOOTHING)
    model, processor = subject.load()
    batch = FusionDataCollator(processor)(rows)
    outputs = model.train()(**batch)
    log_probs = outputs.logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    chosen = -log_probs.gather(2, labels.clamp(min=0)[..., None]).squeeze(2)[labels != -100].mean()
    expected = (1 - SMOOTHING) * chosen - SMOOTHING * log_probs.mean(2)[labels != -100].mean()
    assert loss == pytest.approx(expected.item(), abs=TOLERANCE)
    (expected + model.config.mapping_loss_weight * outputs.mapping_loss).backward()
    assert_same_gradients(gradients, gradients_of(model))


@pytest.mark.parametrize("settings", [{"packing": True, "max_length": 512}, {"padding_free": True}], ids=str)
def test_texts_in_one_row_train_as_one_by_one(subject, tmp_path, settings):
    rows = rows_of(with_image=False)
    _, loss, gradients = train(subject, tmp_path, rows, assistant_only_loss=True, **settings)
    expected, expected_gradients = by_hand(subject, rows)
    assert loss == pytest.approx(expected.language_loss.item(), abs=TOLERANCE)
    assert_same_gradients(gradients, expected_gradients)


def test_adapters_get_the_gradients_of_both_losses(subject, tmp_path):
    rows = rows_of()
    adapters = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    settings = {"peft_config": adapters, "assistant_only_loss": True, "gradient_checkpointing": True}
    torch.manual_seed(0)
    trainer, loss, gradients = train(subject, tmp_path, rows, learning_rate=0.0, **settings)
    _, processor = subject.load()
    trainer.model.zero_grad()
    inner = trainer.model.get_base_model()
    del inner.forward  # TRL's
    outputs = trainer.model.train()(**FusionDataCollator(processor)(rows))
    outputs.loss.backward()
    assert loss == pytest.approx(outputs.language_loss.item(), abs=TOLERANCE)
    assert any("vision_tower" in name for name in gradients)
    assert_same_gradients(gradients, gradients_of(trainer.model))


@pytest.mark.parametrize("as_completion", [False, True], ids=["messages", "completion"])
def test_a_prompt_cut_within_its_image_is_an_error(subject, tmp_path, as_completion):
    with pytest.raises(ValueError, match=r"image|max_length"):
        train(subject, tmp_path, rows_of(as_completion=as_completion), max_length=12)


def test_mixed_rows_with_and_without_image_train_as_by_hand(subject, tmp_path):
    rows = rows_of()
    rows[1]["images"] = []
    _, loss, gradients = train(subject, tmp_path, rows, assistant_only_loss=True)
    expected, expected_gradients = by_hand(subject, rows)
    assert loss == pytest.approx(expected.language_loss.item(), abs=TOLERANCE)
    assert_same_gradients(gradients, expected_gradients)


def test_several_turns_train_as_by_hand(subject, tmp_path):
    rows = rows_of()
    for row, (_, question, text) in zip(rows, reversed(CHATS), strict=True):
        row["messages"] += [ask(question), answer(text)]
    _, loss, gradients = train(subject, tmp_path, rows, assistant_only_loss=True)
    expected, expected_gradients = by_hand(subject, rows)
    assert loss == pytest.approx(expected.language_loss.item(), abs=TOLERANCE)
    assert_same_gradients(gradients, expected_gradients)


def test_what_it_saves_answers_in_a_fresh_process(folders, tmp_path):
    from trl import SFTConfig, SFTTrainer

    subject = Subject("nano", folders["nano"])
    model, processor = subject.load()
    arguments = SFTConfig(str(tmp_path), **{**ONE_STEP, "learning_rate": 0.0}, assistant_only_loss=True)
    trainer, _, _ = step_of(SFTTrainer, model, arguments, rows_of(), processing_class=processor)
    trainer.save_model(str(tmp_path / "saved"))
    (tmp_path / "cache").mkdir()
    assert run(ASK, tmp_path / "saved", cache=tmp_path / "cache")[-1] == "red"
