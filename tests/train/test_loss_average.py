"""What a step's loss is the mean of: all of its tokens, or its micro-batches; both against a computation by hand."""

import pytest
import torch
from PIL import Image
from tests.helpers.gradients import KeepGradients
from tests.helpers.training_runs import write_model
from torch.nn.functional import log_softmax

from fusion_hf import FusionForConditionalGeneration, FusionProcessor
from fusion_hf.training import FusionDataCollator, FusionTrainer, FusionTrainingArguments

QUERY_LEN = 4
MAX_LENGTH = 45  # leaves no room for an answer behind an image
LONG = "the circle is left of the square and the square is above the circle and there are two shapes in it"
# image, question, answer: micro-batches of two with 2, 23 and 0 images, and answers of very different lengths
RECORDS = [
    ("red", "what color is the circle ?", "red"),
    ("blue", "how many shapes are there in the picture ?", "two"),
    ("green", "is it red ?", LONG),
    (None, "what color is it ?", LONG),
    (None, "is it red ?", "no"),
    (None, "how many ?", "one two"),
]


def make_records() -> list[dict]:
    records = []
    for color, question, answer in RECORDS:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        records.append(
            {"messages": messages} | ({} if color is None else {"image": Image.new("RGB", (30, 20), color)})
        )
    return records


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


class InOrder(FusionTrainer):
    """Takes the records as they come, and keeps them."""

    def _get_train_sampler(self, train_dataset=None):
        return None

    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(self.train_dataset, batch_size=2, collate_fn=self.data_collator)


def step_of(folder, output, max_length=None, **settings) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, logged language loss and gradients of one step of three micro-batches."""
    arguments = FusionTrainingArguments(
        str(output),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_steps=1,
        max_grad_norm=0.0,
        learning_rate=0.0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        peak_tflops=1.0,
        **settings,
    )
    processor = FusionProcessor.from_pretrained(folder)
    collator = FusionDataCollator(processor, [QUERY_LEN], max_length=max_length, compact=True)
    kept = KeepGradients()
    model = FusionForConditionalGeneration.from_pretrained(folder)
    trainer = InOrder(model, arguments, collator, make_records(), callbacks=[kept])
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    return entry["loss"], entry["language_loss"], kept.gradients


def sum_of_losses(model, batch) -> tuple[torch.Tensor, int]:
    """-log p of the labelled tokens, added up, and their number."""
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    labels = batch["labels"][:, 1:]
    chosen = log_softmax(logits[:, :-1], -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return -(chosen * (labels != -100)).sum(), int((labels != -100).sum())


def by_hand(folder) -> dict[str, tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]:
    """Loss, language loss and gradients, of both kinds, from passes over the three micro-batches."""
    results = {}
    collator = FusionDataCollator(FusionProcessor.from_pretrained(folder), [QUERY_LEN])
    batches = [collator(make_records()[begin : begin + 2]) for begin in (0, 2, 4)]
    for average in ("tokens", "micro_batches"):
        # in evaluation, where logits do not bring the gradient of the mapping loss with them
        model = FusionForConditionalGeneration.from_pretrained(folder).eval()
        sums = [sum_of_losses(model, batch) for batch in batches]
        mapping_of_batches = [model(**batch).mapping_loss for batch in batches]
        if average == "tokens":
            language = sum(total for total, _ in sums) / sum(count for _, count in sums)
            mapping = model(**collator(make_records())).mapping_loss
        else:
            language = sum(total / count for total, count in sums) / 3
            mapping = sum(mapping_of_batches) / 3
        loss = language + model.config.mapping_loss_weight * mapping
        loss.backward()
        results[average] = loss, language, {name: weight.grad for name, weight in model.named_parameters()}
    return results


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def test_both_averages_are_those_by_hand(folder, tmp_path):
    expected = by_hand(folder)
    found = {name: step_of(folder, tmp_path / name, loss_average=name) for name in ("tokens", "micro_batches")}
    for name, (loss, language, gradients) in expected.items():
        assert found[name][0] == pytest.approx(loss.item(), rel=1e-5)
        assert found[name][1] == pytest.approx(language.item(), rel=1e-5)
        difference = flat(found[name][2]) - flat(gradients)
        assert float(difference.norm() / flat(gradients).norm()) < 1e-4
    heads = [found[name][2]["lm_head.weight"].flatten() for name in ("tokens", "micro_batches")]
    assert float(torch.cosine_similarity(*heads, dim=0)) < 0.95  # they are not the same
    assert step_of(folder, tmp_path / "default")[0] == found["tokens"][0]


def test_a_micro_batch_without_labels_counts_as_zero(folder, tmp_path):
    """The mean over no token is no number; the others' means stay what they are."""
    collator = FusionDataCollator(FusionProcessor.from_pretrained(folder), [QUERY_LEN], max_length=MAX_LENGTH)
    model = FusionForConditionalGeneration.from_pretrained(folder).train()
    sums = [sum_of_losses(model, collator(make_records()[begin : begin + 2])) for begin in (0, 2, 4)]
    assert [count > 0 for _, count in sums] == [False, True, True]
    expected = sum(total / count for total, count in sums if count) / 3
    _, language, gradients = step_of(folder, tmp_path, MAX_LENGTH, loss_average="micro_batches")
    assert language == pytest.approx(expected.item(), rel=1e-5)
    assert torch.isfinite(flat(gradients)).all()
