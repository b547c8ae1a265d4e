"""What collators of other projects do to a batch leaves each row's loss as it is: padding, cutting, another order."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from PIL import Image
from tests.helpers.chat_models import SMALL_PARAMETERS, load_chat_model, write_chat_model

from fusion_hf import FusionForConditionalGeneration, FusionProcessor, nano_path
from fusion_hf.training import FusionDataCollator

CHATS = (
    ("red", (("what color is the circle ?", "red"),)),
    ("blue", (("how many shapes are there ?", "two and one more"), ("Is it so?", "yes"))),
    (None, (("is it red ?", "no"),)),
    ("green", (("", "a circle"),)),
)
ROUNDS = 12
TRAINERS = {"ids alone": False, "positions that were not moved": True}


@dataclass
class Rows:
    """What trainers know of a batch, `(B, S)` each, and what comes with a row without being moved."""

    input_ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    pixel_values: torch.Tensor
    prompt_end_positions: torch.Tensor
    instruct_input_ids: torch.Tensor
    origin: list[int]

    def columns(self, change: Callable[[torch.Tensor, int], torch.Tensor], pad: int) -> "Rows":
        """Change the sequences; `change` gets each tensor and what it is padded with."""
        changed = {name: change(getattr(self, name), fill) for name, fill in self.fills(pad).items()}
        return replace(self, **changed)

    def fills(self, pad: int) -> dict[str, int]:
        return {"input_ids": pad, "mask": 0, "labels": -100}

    def take(self, rows: list[int]) -> "Rows":
        index = torch.tensor(rows)
        names = [*self.fills(0), "pixel_values", "prompt_end_positions", "instruct_input_ids"]
        return replace(
            self, **{name: getattr(self, name)[index] for name in names}, origin=[self.origin[i] for i in rows]
        )


def pad_left(rows: Rows, pad: int, draw: random.Random) -> Rows:
    count = draw.randint(1, 9)
    return rows.columns(lambda t, fill: torch.nn.functional.pad(t, (count, 0), value=fill), pad)


def pad_right(rows: Rows, pad: int, draw: random.Random) -> Rows:
    count = draw.randint(1, 9)
    return rows.columns(lambda t, fill: torch.nn.functional.pad(t, (0, count), value=fill), pad)


def flush_left(rows: Rows, pad: int, draw: random.Random) -> Rows:
    """Padding of each row to its end, and columns without a token away, as TRL does."""
    order = (1 - rows.mask).argsort(dim=1, stable=True)
    longest = int(rows.mask.sum(1).max())
    return rows.columns(lambda t, fill: t.gather(1, order)[:, :longest], pad)


def flush_right(rows: Rows, pad: int, draw: random.Random) -> Rows:
    order = rows.mask.argsort(dim=1, stable=True)
    longest = int(rows.mask.sum(1).max())
    return rows.columns(lambda t, fill: t.gather(1, order)[:, -longest:], pad)


def repeat_interleave(rows: Rows, pad: int, draw: random.Random) -> Rows:
    return rows.take([row for row in range(len(rows.origin)) for _ in range(2)])


def reorder(rows: Rows, pad: int, draw: random.Random) -> Rows:
    return rows.take(draw.sample(range(len(rows.origin)), len(rows.origin)))


CHANGES = (pad_left, pad_right, flush_left, flush_right, repeat_interleave, reorder)


@pytest.fixture(scope="module", params=SMALL_PARAMETERS)
def pair(request, tmp_path_factory) -> tuple[FusionForConditionalGeneration, FusionProcessor]:
    if request.param == "nano":
        return load_chat_model(nano_path())
    return load_chat_model(write_chat_model(tmp_path_factory.mktemp("models") / request.param, request.param))


def make_rows(processor: FusionProcessor) -> Rows:
    records = []
    for color, turns in CHATS:
        messages = [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        record = {"messages": messages}
        records.append(record if color is None else record | {"image": Image.new("RGB", (30, 20), color)})
    batch = FusionDataCollator(processor)(records)
    names = ("labels", "pixel_values", "prompt_end_positions", "instruct_input_ids")
    origin = list(range(len(records)))
    return Rows(batch["input_ids"], batch["attention_mask"], *(batch[name] for name in names), origin)


def losses(model: FusionForConditionalGeneration, rows: Rows, with_turns: bool) -> torch.Tensor:
    """Sum of the cross entropy of each row's labels `(B,)`."""
    extra = {"prompt_end_positions": rows.prompt_end_positions, "instruct_input_ids": rows.instruct_input_ids}
    with torch.no_grad():
        hidden_states = model.model(
            input_ids=rows.input_ids,
            attention_mask=rows.mask,
            pixel_values=rows.pixel_values,
            **(extra if with_turns else {}),
        ).last_hidden_state[:, :-1]
        is_label = rows.labels[:, 1:] != -100
        logits = model.lm_head(hidden_states[is_label])
    entropies = torch.nn.functional.cross_entropy(logits, rows.labels[:, 1:][is_label], reduction="none")
    return torch.zeros(len(rows.origin)).index_add(0, is_label.nonzero()[:, 0], entropies)


@pytest.mark.parametrize("with_turns", TRAINERS.values(), ids=TRAINERS.keys())
def test_changes_of_a_batch_leave_each_rows_loss(pair, with_turns) -> None:
    model, processor = pair
    rows = make_rows(processor)
    pad = processor.tokenizer.pad_token_id
    expected = torch.cat([losses(model, rows.take([row]), with_turns=True) for row in rows.origin])
    for seed in range(ROUNDS):
        draw = random.Random(seed)
        changed = rows
        applied = draw.choices(CHANGES, k=4)
        for change in applied:
            changed = change(changed, pad, draw)
        names = [change.__name__ for change in applied]
        torch.testing.assert_close(
            losses(model, changed, with_turns), expected[changed.origin], rtol=1e-5, atol=1e-5, msg=str((seed, names))
        )


@pytest.mark.parametrize("with_turns", TRAINERS.values(), ids=TRAINERS.keys())
def test_cut_answers_leave_the_loss_of_what_is_left(pair, with_turns) -> None:
    """A batch is cut on its right: rows lose the end of their answers, each the same as if it were alone."""
    model, processor = pair
    rows = make_rows(processor).take([0, 3])
    first_label = int((rows.labels != -100).int().argmax(1).max())
    for length in (first_label + 1, first_label + 2):
        cut = rows.columns(lambda t, fill, length=length: t[:, :length], pad=0)
        alone = torch.cat([losses(model, cut.take([row]), with_turns=True) for row in range(2)])
        moved = flush_right(pad_left(cut, processor.tokenizer.pad_token_id, random.Random(0)), 0, random.Random(0))
        torch.testing.assert_close(losses(model, moved, with_turns), alone, rtol=1e-5, atol=1e-5)
