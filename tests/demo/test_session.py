"""Sessions: right answers piece by piece, refusals, stopping, and no two calls of the model at once."""

import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fusion_hf.common.errors import InputError
from fusion_hf.demo import demo_model as demo_model_module
from fusion_hf.demo.demo_model import MAX_QUESTION, MAX_SHOWN_SIDE, DemoModel, Session, open_upload
from fusion_hf.demo.examples import draw_examples
from fusion_hf.inference import ChatModel, Conversation

QUESTIONS = ("what color is the shape?", "what shape is in the image?", "is there a blue shape?")
LONG_ANSWER = 200


def ask(demo_model: DemoModel, session: Session, question: str, query_len: int | None = None) -> str:
    """The last of what is shown."""
    *_, answer = demo_model.ask(session, question, demo_model.budget.query_len if query_len is None else query_len)
    return answer


def test_answers_are_those_of_a_conversation(demo_model, session, chat_model, red_circle):
    conversation = Conversation(chat_model, chat_model.open_image(str(red_circle)), demo_model.max_new_tokens)
    for question in QUESTIONS:
        assert ask(demo_model, session, question) == conversation.ask(question)
    assert [turn.question for turn in session.turns] == list(QUESTIONS)
    assert session.turns[0].answer == "red"


def test_the_answer_grows(demo_model, session):
    shown = list(demo_model.ask(session, QUESTIONS[0], demo_model.budget.query_len))
    assert shown[-1] == session.turns[-1].answer
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown))


@pytest.fixture
def endless(chat_model: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model goes on with words where it would end."""
    specials = chat_model.processor.tokenizer.all_special_ids
    monkeypatch.setattr(chat_model.model.generation_config, "suppress_tokens", specials)


def test_an_answer_ends_at_the_maximum(endless, chat_model, red_circle):
    demo_model = DemoModel(chat_model, LONG_ANSWER)
    session = demo_model.open_session(red_circle)
    ask(demo_model, session, QUESTIONS[0])
    assert session.turns[0].times.tokens == LONG_ANSWER


def test_each_question_has_its_query_len(demo_model, session, chat_model, monkeypatch):
    lengths = []
    prepare = ChatModel.prepare
    monkeypatch.setattr(
        ChatModel,
        "prepare",
        lambda self, messages, length, *rest: lengths.append(length) or prepare(self, messages, length, *rest),
    )
    for length in demo_model.query_lens:
        ask(demo_model, session, QUESTIONS[0], length)
    assert lengths == demo_model.query_lens == chat_model.model.config.query_lens
    with pytest.raises(InputError, match="query_len is 9; allowed: 4, 16"):
        ask(demo_model, session, QUESTIONS[0], 9)


def test_a_length_of_the_caller_can_be_chosen(chat_model):
    demo_model = DemoModel(chat_model, 1, query_len=9)
    assert (demo_model.budget.query_len, demo_model.query_lens) == (9, [4, 9, 16])


def test_a_smaller_grid_reaches_the_conversation(chat_model, red_circle):
    session = DemoModel(chat_model, 1, image_token_grid=3).open_session(red_circle)
    assert session.conversation.budget.image_token_grid == 3


@pytest.mark.parametrize(
    ("question", "part"),
    [("", "empty"), (" \n", "empty"), ("x" * (MAX_QUESTION + 1), f"{MAX_QUESTION + 1} characters")],
)
def test_questions_that_are_refused(demo_model, session, question, part):
    with pytest.raises(InputError, match=part):
        ask(demo_model, session, question)
    assert session.turns == []


def test_a_conversation_longer_than_the_model_reads(demo_model, session):
    ask(demo_model, session, QUESTIONS[0])
    with pytest.raises(InputError, match="tokens"):
        ask(demo_model, session, "why? " * (MAX_QUESTION // 5))
    assert [turn.question for turn in session.turns] == [QUESTIONS[0]]
    assert ask(demo_model, session, QUESTIONS[1]) == "circle"


def test_closing_stops_the_model_and_leaves_the_session(endless, chat_model, red_circle):
    demo_model = DemoModel(chat_model, LONG_ANSWER)
    session = demo_model.open_session(red_circle)
    tokens = []
    handle = chat_model.model.lm_head.register_forward_hook(lambda *_: tokens.append(1))
    answers = demo_model.ask(session, QUESTIONS[0], demo_model.budget.query_len)
    next(answers)
    answers.close()
    handle.remove()
    assert 0 < len(tokens) < LONG_ANSWER
    assert session.turns == [] and session.conversation.messages == []


def test_reset(demo_model, session):
    ask(demo_model, session, QUESTIONS[0])
    session.reset()
    assert session.turns == [] and session.conversation.messages == []


def test_sessions_do_not_mix_and_calls_do_not_overlap(demo_model, chat_model, tmp_path):
    examples = draw_examples()
    paths = [tmp_path / f"{index}.png" for index in range(len(examples))]
    for path, example in zip(paths, examples, strict=True):
        example.image.save(path)
    running, together = [], []
    forward = chat_model.model.register_forward_pre_hook(
        lambda *_: running.append(threading.get_ident()) or together.append(len(running))
    )
    after = chat_model.model.register_forward_hook(lambda *_: running.pop() and None)
    sessions = [demo_model.open_session(path) for path in paths]
    answers: dict[int, str] = {}

    def visit(index: int) -> None:
        answers[index] = ask(demo_model, sessions[index], examples[index].question)

    threads = [threading.Thread(target=visit, args=(index,)) for index in range(len(examples))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    forward.remove()
    after.remove()
    assert [answers[index] for index in range(len(examples))] == ["red", "3", "left", "fish"]
    assert set(together) == {1}


def test_times_are_of_this_image_and_answer(demo_model, session):
    ask(demo_model, session, QUESTIONS[0])
    times = session.turns[0].times
    assert session.times.preprocessing > 0 and session.times.encoding > 0
    assert times.first_token > 0 and times.tokens == 2  # the word and the end
    assert times.tokens_per_second == pytest.approx(1 / times.decoding)


def test_tiles_are_those_that_the_model_reads(session, chat_model, red_circle):
    (pixels,) = chat_model.preprocess([chat_model.open_image(str(red_circle))])
    read = ((pixels.numpy() * 0.5 + 0.5) * 255).round().astype(np.uint8)
    assert np.array_equal(session.tiles, read.transpose(0, 2, 3, 1))


def test_a_session_keeps_a_small_image(demo_model, tmp_path):
    path = tmp_path / "large.jpg"
    Image.new("RGB", (4 * MAX_SHOWN_SIDE, MAX_SHOWN_SIDE), "red").save(path)
    assert demo_model.open_session(path).image.size == (MAX_SHOWN_SIDE, MAX_SHOWN_SIDE // 4)


class TestUploads:
    """Images that are refused, in a line that does not name the server's folders."""

    @staticmethod
    def refused(chat_model: ChatModel, path: Path) -> str:
        with pytest.raises(InputError) as info:
            open_upload(chat_model, path)
        assert str(path.parent) not in str(info.value)
        assert path.name in str(info.value)
        return str(info.value)

    @pytest.mark.parametrize(
        "content", [b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n"]
    )
    def test_no_image(self, chat_model, tmp_path, content):
        path = tmp_path / "image.png"
        path.write_bytes(content)
        assert "it is none of BMP, GIF" in self.refused(chat_model, path)

    def test_truncated(self, chat_model, tmp_path, red_circle):
        path = tmp_path / "truncated.png"
        path.write_bytes(red_circle.read_bytes()[:200])
        assert "cannot be decoded" in self.refused(chat_model, path)

    def test_too_many_pixels(self, chat_model, tmp_path, red_circle, monkeypatch):
        monkeypatch.setattr(demo_model_module, "MAX_PIXELS", 64 * 64 - 1)
        path = tmp_path / "large.png"
        path.write_bytes(red_circle.read_bytes())
        assert "64 x 64 = 4096 pixels, more than max_image_pixels = 4095" in self.refused(chat_model, path)

    def test_bomb(self, chat_model, tmp_path):
        path = tmp_path / "bomb.png"
        Image.new("1", (20_000, 20_000)).save(path)
        assert "decompression bomb" in self.refused(chat_model, path)

    def test_too_many_bytes(self, chat_model, tmp_path, red_circle, monkeypatch):
        monkeypatch.setattr(demo_model_module, "MAX_UPLOAD_BYTES", 700)
        path = tmp_path / "many.png"
        path.write_bytes(red_circle.read_bytes())
        assert f"has {path.stat().st_size} bytes, more than the limit of 700" in self.refused(chat_model, path)
