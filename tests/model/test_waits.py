"""What a training step reads back from the device: each read would make the processor wait for a GPU."""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.helpers.tiny import QUERY_LEN, Sample, make_inputs, tiny_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from fusion_hf import FusionConfig, FusionForConditionalGeneration
from fusion_hf.model.configuration_fusion import TokenBudget
from fusion_hf.model.input_checks_fusion import check_prompt, is_consistent
from fusion_hf.model.modeling_fusion_base import LossCounts
from fusion_hf.model.turns_fusion import PromptTurns, as_padding_mask, complete_turns, order_prompt_ends
from fusion_hf.training.collator import find_loss_positions

HEADER = [7, 8]  # of the tiny prompts here, whose questions end with it
SCALAR = "aten::_local_scalar_dense"
# operations whose result has a size that depends on values, or is a number of Python
READS = {SCALAR, "aten::nonzero", "aten::unique_dim", "aten::masked_select", "aten::equal"}
READ_METHODS = ("tolist", "cpu", "numpy", "item")
READS_OF_MASKS = 3  # at most: two of the language model's mask, one of the tower's
READS_WITHOUT_MASK = 2  # at most: whether rows are packed, and that of the tower's mask


class ReadCounter(TorchDispatchMode):
    """Counts the operations of a pass that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        has_mask = name == "aten::index" and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in READS or has_mask:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Operations that read values, and methods of tensors that do."""
    counter = ReadCounter()
    for method in READ_METHODS:
        original = getattr(torch.Tensor, method)

        def call(self: torch.Tensor, *args: Any, original: Any = original, method: str = method, **kwargs: Any) -> Any:
            counter.counts[f"Tensor.{method}"] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, method, call)
    with counter:
        yield counter.counts
    monkeypatch.undo()


def label_answers(inputs: dict[str, Any]) -> torch.Tensor:
    """Labels of what is behind the last prompt's end."""
    positions = torch.arange(inputs["input_ids"].shape[1], device=inputs["input_ids"].device)
    is_answer = positions > inputs["prompt_end_positions"].amax(1, keepdim=True)
    return torch.where(is_answer & inputs["attention_mask"].bool(), inputs["input_ids"], -100)


def read_counts(
    monkeypatch: pytest.MonkeyPatch, model: FusionForConditionalGeneration, inputs: dict[str, Any], **given: Any
) -> Counter[str]:
    """Reads of a training pass and its backward pass."""
    labels = label_answers(inputs)
    model.train()
    with counted_reads(monkeypatch) as counts:
        model(**inputs, labels=labels, **given).loss.backward()
    return counts


BATCHES = {
    "padded": [Sample([5], [4], seed=1), Sample([3, 4], [2, 2], seed=2), Sample([6], [3], image=False, seed=3)],
    "equal": [Sample([5], [4], seed=1), Sample([5], [4], seed=2)],
    "text": [Sample([5], [4], image=False, seed=1)],
}


@pytest.mark.parametrize("samples", BATCHES.values(), ids=BATCHES)
def test_reads_of_a_training_step(monkeypatch: pytest.MonkeyPatch, samples: list[Sample]) -> None:
    """
    Without checks nothing is read but what transformers reads of masks: whether language model and tower may do
    without one. With checks, one value of the prompts is read, and one of the labels.
    """
    model = tiny_model(tiny_config())
    inputs = make_inputs(model.config, samples)
    of_masks = read_counts(monkeypatch, model, inputs, check_inputs=False)
    assert set(of_masks) <= {SCALAR} and of_masks[SCALAR] <= READS_OF_MASKS
    assert read_counts(monkeypatch, model, inputs) == of_masks + Counter({SCALAR: 2})


def test_reads_of_a_step_of_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """`FusionTrainer` gives no mask for padding on the right, and says where the labels are."""
    model = tiny_model(tiny_config())
    inputs = make_inputs(model.config, BATCHES["padded"])
    positions = find_loss_positions(label_answers(inputs))
    counts = LossCounts(*torch.ones(3))
    labels = label_answers(inputs)
    model.train()
    with counted_reads(monkeypatch) as reads:
        taken = {**inputs, "attention_mask": None}
        given = {"labels": labels, "loss_positions": positions, "loss_counts": counts, "check_inputs": False}
        model(**taken, **given).loss.backward()
    assert set(reads) <= {SCALAR} and reads[SCALAR] <= READS_WITHOUT_MASK


@pytest.mark.gpu
def test_a_gpu_is_waited_for_by_masks_alone() -> None:
    model = tiny_model(tiny_config()).cuda().train()
    inputs = make_inputs(model.config, BATCHES["padded"])
    inputs = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    labels = label_answers(inputs)
    model(**inputs, labels=labels, check_inputs=False).loss.backward()  # the first pass chooses kernels
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            model(**inputs, labels=labels, check_inputs=False).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing" in str(warning.message) for warning in caught) <= READS_OF_MASKS


# What is compared at once agrees with what is looked at row by row


def config_with_headers() -> FusionConfig:
    return tiny_config(assistant_header_ids=HEADER, turn_end_token_id=9)


def prompts(config: FusionConfig, seed: int) -> dict[str, Any]:
    """A random batch whose questions end with a header."""
    generator = torch.Generator().manual_seed(seed)

    def number(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=generator))

    samples = [
        Sample(questions, image=number(3) > 1, seed=seed * 10 + i)
        for i in range(number(3))
        for questions in ([number(5) for _ in range(number(3))],)
    ]
    for sample in samples:  # answers are between the questions, one fewer or as many
        sample.answers = [number(3) for _ in sample.questions][number(2) - 1 :]
    inputs = make_inputs(config, samples, QUERY_LEN, ("left", "right")[number(2) - 1])
    for row, ends in enumerate(inputs["prompt_end_positions"].tolist()):
        for end in ends:
            if end >= 0:
                inputs["input_ids"][row, end - 1 : end + 1] = torch.tensor(HEADER)
    return inputs


def damage(inputs: dict[str, Any], config: FusionConfig, seed: int) -> dict[str, Any]:
    """The batch with one random fault, which may do no harm."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}

    def place(name: str) -> tuple[int, int]:
        rows, columns = inputs[name].shape
        return (
            int(torch.randint(rows, (), generator=generator)),
            int(torch.randint(columns, (), generator=generator)),
        )

    kind = seed % 7
    if kind in (0, 1):
        tokens = (config.image_token_id, config.latent_token_id, 5, *HEADER)
        inputs["input_ids"][place("input_ids")] = tokens[seed // 7 % len(tokens)]
    elif kind == 2:
        inputs["prompt_end_positions"][place("prompt_end_positions")] += 1 - 2 * (seed // 7 % 2)
    elif kind == 3:
        inputs["prompt_end_positions"][place("prompt_end_positions")] = -1
    elif kind == 4:
        inputs["attention_mask"][place("attention_mask")] = 0
    elif kind == 5:
        inputs["instruct_input_ids"][place("instruct_input_ids")] = (-1, 60)[seed // 7 % 2]
    elif "pixel_values" in inputs:
        inputs["pixel_values"] = None if seed // 7 % 2 else torch.ones_like(inputs["pixel_values"])
    return inputs


@pytest.mark.parametrize("has_headers", [True, False])
def test_checks_agree(has_headers: bool) -> None:
    """All that is taken as right at once is right row by row, and what is right and whole is taken so."""
    config = config_with_headers() if has_headers else tiny_config()
    outcomes: Counter[tuple[bool, bool]] = Counter()
    for seed in range(700):
        whole = prompts(config, seed % 50)
        assert judged(config, whole) == (True, True)
        outcomes[judged(config, damage(whole, config, seed))] += 1
    assert outcomes[True, False] == 0
    assert outcomes[False, False] > 100
    assert outcomes[True, True] > 100


def judged(config: FusionConfig, inputs: dict[str, Any]) -> tuple[bool, bool]:
    """Whether a batch is right, at once and row by row."""
    ids, pixels = inputs["input_ids"], inputs.get("pixel_values")
    budget, mask = TokenBudget.of(config, inputs["query_len"]), as_padding_mask(inputs["attention_mask"], ids)
    given = PromptTurns(*(inputs[name] for name in PromptTurns._fields))
    given = given._replace(prompt_end_positions=order_prompt_ends(given.prompt_end_positions, ids))
    at_once = bool(is_consistent(config, ids, mask, pixels, given, budget))
    before = given.prompt_end_positions.clone()
    try:
        turns = complete_turns(config, ids, mask, pixels, given)
        check_prompt(config, ids, mask, pixels, turns.prompt_end_positions, budget)
    except ValueError:
        return at_once, False
    return at_once, torch.equal(turns.prompt_end_positions, before)
