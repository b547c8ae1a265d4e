"""Maps of words are those of the answers that were given."""

import numpy as np

from fusion_hf.demo.demo_model import DemoModel
from fusion_hf.maps import attention_maps

QUESTIONS = ("what color is the shape?", "what shape is in the image?")


def test_the_first_answer_has_the_map_that_the_package_gives(demo_model, session, chat_model, red_circle):
    list(demo_model.ask(session, QUESTIONS[0], 4))
    expected = attention_maps(
        str(red_circle),
        QUESTIONS[0],
        chat_model,
        max_new_tokens=demo_model.max_new_tokens,
        query_len=4,
        layer_groups=1,
    ).answer_tokens
    (word,) = session.turns[0].words
    assert word == expected.words[0] and word.text == "red"
    shown = demo_model.word_map(session, 0, 0)
    assert shown.shape == (64, 64)
    assert np.allclose(shown, expected.on_image(word).mean(0), atol=1e-6)


def test_later_questions_do_not_change_a_map(demo_model: DemoModel, session, red_circle):
    list(demo_model.ask(session, QUESTIONS[0], demo_model.budget.query_len))
    before = demo_model.word_map(session, 0, 0)
    session.maps.clear()
    list(demo_model.ask(session, QUESTIONS[1], demo_model.budget.query_len))
    assert np.array_equal(demo_model.word_map(session, 0, 0), before)
    assert not np.allclose(demo_model.word_map(session, 1, 0), before)


def test_maps_are_read_once_and_forgotten_with_their_answers(demo_model, session, monkeypatch):
    reads = []
    read = DemoModel._read_attention
    monkeypatch.setattr(DemoModel, "_read_attention", lambda *arguments: reads.append(1) or read(*arguments))
    for _ in range(2):
        list(demo_model.ask(session, QUESTIONS[0], demo_model.budget.query_len))
        for _ in range(2):
            demo_model.word_map(session, 0, 0)
        session.reset()
    assert len(reads) == 2


def test_an_answer_without_words_has_no_maps(demo_model, session, monkeypatch):
    specials = demo_model.chat_model.processor.tokenizer.all_special_ids
    vocabulary = range(demo_model.chat_model.model.config.text_config.vocab_size)
    words = [token for token in vocabulary if token not in specials]
    monkeypatch.setattr(demo_model.chat_model.model.generation_config, "suppress_tokens", words)
    *_, answer = demo_model.ask(session, QUESTIONS[0], demo_model.budget.query_len)
    assert answer == "" and session.turns[0].words == ()
