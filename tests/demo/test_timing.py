"""The streamer of the page, fed by hand."""

import time

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from fusion_hf.demo.timing import AnswerStream, AnswerTimes, StoppedError
from fusion_hf.inference import ChatModel

TEXT = "a red circle left of a blue triangle."
PAUSE = 0.02  # seconds


@pytest.fixture
def tokenizer(chat_model: ChatModel) -> PreTrainedTokenizerBase:
    return chat_model.processor.tokenizer


def test_text_comes_in_pieces(tokenizer):
    stream = AnswerStream(tokenizer)
    stream.put(tokenizer("a prompt", return_tensors="pt")["input_ids"])
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    pieces = [piece for piece in stream if piece]
    assert "".join(pieces) == TEXT
    assert len(pieces) > 2
    assert stream.times().tokens == len(ids)


def test_times(tokenizer):
    stream = AnswerStream(tokenizer)
    stream.put(torch.tensor([[1, 2]]))
    for token in (7, 8, 9):
        time.sleep(PAUSE)
        stream.put(torch.tensor([token]))
    times = stream.times()
    assert times.first_token >= PAUSE
    assert times.decoding >= 2 * PAUSE
    assert times.tokens == 3


def test_speed_is_of_the_tokens_behind_the_first():
    assert AnswerTimes(first_token=3.0, tokens=5, decoding=2.0).tokens_per_second == 2.0
    assert AnswerTimes(first_token=3.0, tokens=1, decoding=0.0).tokens_per_second is None


def test_stop(tokenizer):
    stream = AnswerStream(tokenizer)
    stream.put(torch.tensor([[1, 2]]))
    stream.put(torch.tensor([7]))
    stream.stop()
    with pytest.raises(StoppedError):
        stream.put(torch.tensor([8]))


def test_close_ends_an_iteration_that_nothing_else_ends(tokenizer):
    stream = AnswerStream(tokenizer)
    stream.close()
    assert list(stream) == []
