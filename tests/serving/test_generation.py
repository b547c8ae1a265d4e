"""Pieces of an answer, and how its tokens are drawn."""

import pytest
import torch

from fusion_hf.inference import ChatModel
from fusion_hf.serving.chat_requests import Sampling
from fusion_hf.serving.generation import AnswerText, SamplingLogitsProcessor

TEXT = " A rotten 苹果, naïve 🙂\n\n  and more.  \n"


class Pieces:
    """An answer of given ids, as it would be made."""

    def __init__(self, chat_model: ChatModel, ids: list[int], stops: tuple[str, ...] = ()):
        self.pieces: list[str] = []
        self.used = 0
        text = AnswerText(chat_model.processor.tokenizer, stops, self.pieces.append)
        text.put(torch.tensor([[1, 2, 3]]))
        for number in ids:
            text.put(torch.tensor([number]))
            self.used += 1
            if text.is_stopped:
                break
        text.end()
        self.text = "".join(self.pieces)


@pytest.fixture(scope="module")
def ids(chat_model: ChatModel) -> list[int]:
    return chat_model.processor.tokenizer(TEXT, add_special_tokens=False)["input_ids"]


def test_pieces_are_the_answer(chat_model: ChatModel, ids: list[int]):
    for end in range(len(ids) + 1):  # also within a character
        whole = chat_model.processor.decode(ids[:end], skip_special_tokens=True).strip()
        answer = Pieces(chat_model, ids[:end])
        assert answer.text == whole
    assert all(answer.pieces) and len(answer.pieces) > 10
    assert "\ufffd" not in answer.text


@pytest.mark.parametrize("stop", ["n", "rotten", "ten 苹", "🙂", "\n\n", "more.", ".  ", " and", "果, naïve 🙂\n\n "])
def test_stops(chat_model: ChatModel, ids: list[int], stop: str):
    answer = Pieces(chat_model, ids, ("never", stop, "nevermore"))
    assert answer.text == TEXT[: TEXT.index(stop)].strip()
    assert answer.used < len(ids) or TEXT.endswith(stop)


def test_stops_that_do_not_come(chat_model: ChatModel, ids: list[int]):
    whole = Pieces(chat_model, ids).text
    assert Pieces(chat_model, ids, ("never", "rotten tomato", "more. \n\n", "aa")).text == whole


def test_the_first_stop_counts(chat_model: ChatModel, ids: list[int]):
    assert Pieces(chat_model, ids, ("naïve", "rotten")).text == "A"


def test_draws_follow_the_distribution():
    """Of three tokens, with temperature; `top_p` leaves out the rare one."""
    logits = torch.tensor([[2.0, 1.0, -1.0]])

    def shares(sampling: Sampling) -> torch.Tensor:
        draw = SamplingLogitsProcessor(sampling)
        drawn = [int(draw(torch.empty(1, 0), logits).argmax()) for _ in range(4000)]
        return torch.bincount(torch.tensor(drawn), minlength=3) / len(drawn)

    for temperature in (0.5, 1.0, 2.0):
        expected = (logits[0] / temperature).softmax(-1)
        assert torch.allclose(shares(Sampling(temperature, seed=1)), expected, atol=0.03)
    cut = shares(Sampling(1.0, top_p=0.9, seed=1))
    assert cut[2] == 0
    assert torch.allclose(cut[:2], logits[0, :2].softmax(-1), atol=0.03)
    assert torch.equal(shares(Sampling(1.0, seed=5)), shares(Sampling(1.0, seed=5)))


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-45, 1e-38, 1e-30, 1e-10, 1e-3])
@pytest.mark.parametrize("top_p", [5e-324, 1e-38, 0.5, 1 - 2**-53, 1.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_extreme_settings_draw_the_most_likely(temperature: float, top_p: float, scale: float):
    logits = torch.tensor([[-2.0, float("-inf"), 1.0, 20.0, -1e3]]) * scale
    for dtype in (torch.float32, torch.bfloat16):
        scores = SamplingLogitsProcessor(Sampling(temperature, top_p, -(2**63)))(torch.empty(1, 0), logits.to(dtype))
        assert int(scores.argmax()) == 3
        assert scores.max() == 0 and scores.dtype == dtype


def test_tokens_that_are_equally_likely_stay_so():
    draw = SamplingLogitsProcessor(Sampling(1e-38, seed=1))
    drawn = {int(draw(torch.empty(1, 0), torch.tensor([[3.0, 1.0, 3.0]])).argmax()) for _ in range(100)}
    assert drawn == {0, 2}
