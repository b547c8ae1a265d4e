"""One image, many questions: what is computed once, and that the answers stay those of computing all of it anew."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import BatchFeature, DynamicCache, MistralConfig
from transformers.generation.streamers import BaseStreamer

from fusion_hf import FusionImageProcessor
from fusion_hf.inference.chat_model import ChatModel, question_message
from fusion_hf.inference.conversation import Conversation, _Memory

QUESTIONS = ("what color is the shape?", "what shape is in the image?", "is there a blue shape?")
TILES = 4
MOST = 16
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def chat_model(nano: Path) -> ChatModel:
    return ChatModel.load(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def image(chat_model: ChatModel, image_path: str) -> Image.Image:
    return chat_model.open_image(image_path)


class Watch:
    """What the model is given: tiles per call of the tower, tokens per pass, and the logits of the last of them."""

    def __init__(self, chat_model: ChatModel):
        self.tiles: list[int] = []
        self.tokens: list[int] = []
        self.logits: list[torch.Tensor] = []
        model = chat_model.model
        self.handles = [
            model.model.vision_tower.register_forward_pre_hook(lambda _, args: self.tiles.append(len(args[0]))),
            model.model.language_model.layers[0].register_forward_pre_hook(
                lambda _, args: self.tokens.append(args[0].shape[1])
            ),
            model.lm_head.register_forward_hook(lambda _, __, logits: self.logits.append(logits[:, -1])),
        ]

    def clear(self) -> None:
        for values in (self.tiles, self.tokens, self.logits):
            values.clear()


@pytest.fixture
def watch(chat_model: ChatModel) -> Iterator[Watch]:
    chat_model.image_cache.clear()
    watch = Watch(chat_model)
    yield watch
    for handle in watch.handles:
        handle.remove()


def whole_prompt(conversation: Conversation, messages: list[dict[str, Any]]) -> BatchFeature:
    """Messages as one prompt, whose overview is guided by the first question alone."""
    grid = conversation.budget.image_token_grid
    inputs = conversation.chat_model.prepare(messages, image_token_grid=grid)
    first = conversation.chat_model.prepare(messages[:1], image_token_grid=grid)
    return BatchFeature(
        {**inputs, **{name: first[name] for name in ("instruct_input_ids", "instruct_attention_mask")}}
    )


def test_questions_asked_by_themselves_share_the_tiles(chat_model: ChatModel, image: Image.Image, watch: Watch):
    together = list(chat_model.answer_each(image, QUESTIONS, MOST))
    assert watch.tiles == [TILES, 1, 1, 1]
    watch.clear()
    assert together == [chat_model.answer([question_message(question, image)], MOST) for question in QUESTIONS]
    assert watch.tiles == [1, TILES] * len(QUESTIONS)


@pytest.mark.parametrize("fast", [False, True])
def test_an_image_is_resized_once(
    chat_model: ChatModel, image: Image.Image, fast: bool, monkeypatch: pytest.MonkeyPatch
):
    sizes: list[tuple[int, int]] = []
    split_tiles = FusionImageProcessor.split_tiles

    def counted(image: Image.Image, *args: Any, **kwargs: Any) -> Any:
        sizes.append(image.size)
        return split_tiles(image, *args, **kwargs)

    monkeypatch.setattr(FusionImageProcessor, "split_tiles", staticmethod(counted))
    chat_model.image_cache.clear()
    conversation = Conversation(chat_model, image, MOST, fast=fast)
    for question in QUESTIONS:
        conversation.ask(question)
    assert sizes.count(image.size) == 1
    sizes.clear()
    list(chat_model.answer_each(image, QUESTIONS, MOST))
    assert sizes.count(image.size) == 1


def test_an_image_that_was_seen_before(chat_model: ChatModel, image: Image.Image, watch: Watch):
    """Its tiles are not encoded again, in either of two conversations."""
    (seen,) = chat_model.encode_tiles(chat_model.preprocess([image]))
    assert watch.tiles == [TILES]
    expected = chat_model.encode_image(image)
    assert torch.equal(seen.overview, expected.overview)
    assert torch.equal(seen.global_features, expected.global_features)
    watch.clear()
    answers = [Conversation(chat_model, image, MOST, image_features=seen).ask(question) for question in QUESTIONS[:2]]
    assert watch.tiles == [1, 1]
    assert answers == [Conversation(chat_model, image, MOST).ask(question) for question in QUESTIONS[:2]]


def test_two_conversations_share_the_tiles(chat_model: ChatModel, image: Image.Image, watch: Watch):
    again = image.copy()
    answers = [Conversation(chat_model, each, MOST).ask(QUESTIONS[0]) for each in (image, again)]
    assert watch.tiles == [TILES, 1, 1]
    assert answers == [chat_model.answer([question_message(QUESTIONS[0], image)], MOST)] * 2


@pytest.mark.parametrize("budget", [{}, {"query_len": 4}, {"image_token_grid": 3}], ids=str)
def test_a_conversation_is_encoded_with_all_its_questions(
    chat_model: ChatModel, image: Image.Image, watch: Watch, budget: dict[str, int]
):
    conversation = Conversation(chat_model, image, MOST, **budget)
    for question in QUESTIONS:
        answer = conversation.ask(question)
        logits = watch.logits[0]
        watch.clear()
        assert answer == chat_model.answer(conversation.messages[:-1], MOST, **budget)
        assert torch.equal(watch.logits[0], logits)
        watch.clear()
    conversation.ask(QUESTIONS[0])
    assert watch.tiles == [1]
    conversation.reset()
    conversation.ask(QUESTIONS[0])
    assert watch.tiles == [1, 1]


@torch.inference_mode()
@pytest.mark.parametrize("grid", [None, 3])
def test_fast_mode_continues_what_it_holds(chat_model: ChatModel, image: Image.Image, watch: Watch, grid: int | None):
    """Cache and logits are those of one pass over the conversation, whose overview the first question guides."""
    conversation = Conversation(chat_model, image, MOST, fast=True, image_token_grid=grid)
    for turn, question in enumerate(QUESTIONS):
        watch.clear()
        conversation.ask(question)
        given = watch.logits[0]
        assert watch.tiles == ([TILES, 1] if turn == 0 else [])
        prompt = whole_prompt(conversation, conversation.messages[:-1])
        read = conversation._memory
        assert read is not None
        assert turn == 0 or watch.tokens[0] < len(QUESTIONS[0].split()) + 40 < prompt["input_ids"].shape[1]
        torch.testing.assert_close(chat_model.model(**prompt).logits[:, -1], given, **CLOSE)

        followed = [*conversation.messages, question_message("and?")]
        ids = whole_prompt(conversation, followed)["input_ids"][0]
        assert torch.equal(ids[: len(read.ids)], read.ids)  # the template goes on where the model stopped
        whole = chat_model.model(**whole_prompt(conversation, followed), use_cache=True).past_key_values
        for ours, theirs in zip(read.cache.layers, whole.layers, strict=True):
            torch.testing.assert_close(ours.keys, theirs.keys[:, :, : len(read.ids)], **CLOSE)
            torch.testing.assert_close(ours.values, theirs.values[:, :, : len(read.ids)], **CLOSE)


def test_fast_and_faithful_begin_alike_and_differ_later(chat_model: ChatModel, image: Image.Image, watch: Watch):
    logits = []
    for fast in (False, True):
        conversation = Conversation(chat_model, image, MOST, fast=fast)
        turns = []
        for question in QUESTIONS[:2]:
            watch.clear()
            conversation.ask(question)
            turns.append(watch.logits[0])
        logits.append(turns)
    faithful, quick = logits
    assert torch.equal(faithful[0], quick[0])
    assert not torch.allclose(faithful[1], quick[1], **CLOSE)


def change_answer(messages: list[dict[str, Any]]) -> None:
    messages[-1] = {"role": "assistant", "content": "blue circle"}


def cut_answer(messages: list[dict[str, Any]]) -> None:
    messages[-1] = {"role": "assistant", "content": ""}


def change_question(messages: list[dict[str, Any]]) -> None:
    messages[0] = {"role": "user", "content": [messages[0]["content"][0], {"type": "text", "text": "how many?"}]}


@pytest.mark.parametrize(("change", "is_kept"), [(change_answer, True), (cut_answer, True), (change_question, False)])
@torch.inference_mode()
def test_a_cache_that_holds_other_tokens_is_cut_or_made_anew(
    chat_model: ChatModel, image: Image.Image, watch: Watch, change: Callable, is_kept: bool
):
    """As after an answer whose text is tokenised in another way than the model wrote it."""
    conversation = Conversation(chat_model, image, MOST, fast=True)
    conversation.ask(QUESTIONS[0])
    guide = conversation.messages[:1]
    change(conversation.messages)
    watch.clear()
    conversation.ask(QUESTIONS[1])
    given, tokens = watch.logits[0], watch.tokens[0]
    prompt = chat_model.prepare(conversation.messages[:-1])
    prompt.update(
        {name: chat_model.prepare(guide)[name] for name in ("instruct_input_ids", "instruct_attention_mask")}
    )
    assert (tokens < prompt["input_ids"].shape[1]) == is_kept
    torch.testing.assert_close(chat_model.model(**prompt).logits[:, -1], given, **CLOSE)


def test_a_sliding_cache_is_not_cut():
    config = MistralConfig(num_hidden_layers=1, sliding_window=8)
    cache = DynamicCache(config=config)
    memory = _Memory(torch.arange(6), cache)
    inputs = BatchFeature({"input_ids": torch.arange(9)[None], "prompt_end_positions": torch.tensor([[3, 8]])})
    assert memory.cache_before(inputs) is cache
    inputs["input_ids"][0, 5] = 50
    assert memory.cache_before(inputs) is None


class Interrupt(BaseStreamer):
    """Ctrl-C at the second token."""

    def __init__(self) -> None:
        self.count = 0

    def put(self, value: torch.Tensor) -> None:
        self.count += 1
        if self.count > 2:
            raise KeyboardInterrupt

    def end(self) -> None:
        pass


@pytest.mark.parametrize("at", [0, 1])
def test_an_interrupted_answer_leaves_nothing(chat_model: ChatModel, image: Image.Image, watch: Watch, at: int):
    results = []
    for is_interrupted in (False, True):
        conversation = Conversation(chat_model, image, MOST, fast=True)
        for question in QUESTIONS[:at]:
            conversation.ask(question)
        if is_interrupted:
            with pytest.raises(KeyboardInterrupt):
                conversation.ask("is there a red shape?", Interrupt())
        answers = []
        for question in QUESTIONS[at:]:
            watch.clear()
            answers.append((conversation.ask(question), watch.logits[0]))
        results.append(answers)
    for (expected, logits), (answer, others) in zip(*results, strict=True):
        assert answer == expected
        torch.testing.assert_close(others, logits, **CLOSE)


def test_reset_begins_anew_in_fast_mode(chat_model: ChatModel, image: Image.Image, watch: Watch):
    conversation = Conversation(chat_model, image, MOST, fast=True)
    conversation.ask(QUESTIONS[0])
    conversation.reset()
    watch.clear()
    conversation.ask(QUESTIONS[1])
    logits = watch.logits[0]
    watch.clear()
    Conversation(chat_model, image, MOST, fast=True).ask(QUESTIONS[1])
    assert torch.equal(watch.logits[0], logits)


def test_ask_answers_several_questions_in_a_line_each(run, chat_model, image, image_path):
    expected = list(chat_model.answer_each(image, QUESTIONS, MOST))
    more = [part for question in QUESTIONS[1:] for part in ("--also", question)]
    result = run("ask", image_path, QUESTIONS[0], *more, "--max-new-tokens", MOST)
    assert (result.returncode, result.stdout, result.stderr) == (0, "\n".join(expected) + "\n", "")

    result = run("ask", image_path, image_path, QUESTIONS[0], *more[:2], "--max-new-tokens", MOST)
    lines = [f"{image_path}: {answer}\n" for answer in expected[:2]] * 2
    assert (result.returncode, result.stdout, result.stderr) == (0, "".join(lines), "")


def test_a_further_question_may_not_be_empty(run_here, image_path):
    result = run_here("ask", image_path, QUESTIONS[0], "--also", " ")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_chat_in_fast_mode(run, chat_model, image, image_path):
    conversation = Conversation(chat_model, image, MOST, fast=True)
    expected = [conversation.ask(question) for question in QUESTIONS]
    result = run("chat", image_path, "--fast", "--max-new-tokens", MOST, stdin="\n".join(QUESTIONS))
    assert (result.returncode, result.stdout, result.stderr) == (0, "\n".join(expected) + "\n", "")
