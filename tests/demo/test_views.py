"""What is shown is what the session has."""

import numpy as np
from PIL import Image

from fusion_hf.demo.demo_model import DemoTurn
from fusion_hf.demo.timing import AnswerTimes, ImageTimes
from fusion_hf.demo.views import GAP, TILE_SIDE, answer_choices, chat_messages, draw_overlay, draw_tiles, times_table
from fusion_hf.maps.view import Word

RED_THEN_CIRCLE = [
    DemoTurn("what color?", "red", (Word("red", 0, 1),), 16, AnswerTimes(0.0614, 2, 0.01)),
    DemoTurn("what shape?", "circle", (Word("circle", 0, 1),), 16, AnswerTimes(0.0426, 1, 0.0)),
]


def test_tiles_are_in_their_places(session):
    overview, quarters = draw_tiles(session.tiles)
    shown = np.asarray(quarters)
    height, width = session.tiles.shape[1:3]
    factor = TILE_SIDE // width
    for index, tile in enumerate(session.tiles[:4]):
        row, column = divmod(index, 2)
        top, left = row * (TILE_SIDE + GAP), column * (TILE_SIDE + GAP)
        part = shown[top : top + TILE_SIDE : factor, left : left + TILE_SIDE : factor]
        assert np.array_equal(part[..., :3], tile) and (part[..., 3] == 255).all()
    assert (shown[TILE_SIDE : TILE_SIDE + GAP, :, 3] == 0).all()
    assert overview.size == quarters.size
    reduced = overview.resize((width, height), Image.Resampling.NEAREST)
    assert np.array_equal(np.asarray(reduced), session.tiles[4])


def test_large_tiles_keep_their_size():
    assert draw_tiles(np.zeros((5, 384, 384, 3), np.uint8)).quarters.size == (2 * 384 + GAP, 2 * 384 + GAP)


def test_chat(session):
    session.turns = RED_THEN_CIRCLE
    said = [(message["role"], message["content"]) for message in chat_messages(session, "how many?")]
    assert said == [
        ("user", "what color?"),
        ("assistant", "red"),
        ("user", "what shape?"),
        ("assistant", "circle"),
        ("user", "how many?"),
    ]
    assert chat_messages(session, "how many?", "1")[-1] == {"role": "assistant", "content": "1"}
    assert chat_messages(None) == []


def test_what_looks_like_html_is_text():
    (message,) = chat_messages(None, "<b>1</b> & 2 < 3?")
    assert message["content"] == "&lt;b&gt;1&lt;/b&gt; &amp; 2 &lt; 3?"


def test_names_of_answers():
    long = DemoTurn("what?", "a red circle left of a blue triangle", (), 16, AnswerTimes(1.0, 1, 0.0))
    assert answer_choices([RED_THEN_CIRCLE[0], long]) == [("1: red", 0), ("2: a red circle left of ...", 1)]


def test_times(session):
    session.times = ImageTimes(preprocessing=0.0051, encoding=0.0349)
    assert times_table(None) == ""
    assert times_table(session) == ("The image took 5 ms to preprocess and 35 ms to encode (its four tiles).")
    session.turns = RED_THEN_CIRCLE
    assert times_table(session).splitlines()[2:] == [
        "| answer | first token | tokens | tokens/s |",
        "|---:|---:|---:|---:|",
        "| 2 | 43 ms | 1 | – |",
        "| 1 | 61 ms | 2 | 100.0 |",
    ]


def test_overlays_are_brightest_where_the_map_is_strongest():
    image = Image.new("RGB", (64, 48), "white")
    heat = np.full((48, 64), 0.1)
    heat[10:20, 30:40] = 0.3
    overlay = draw_overlay(image, heat)
    assert (overlay.width % 64, overlay.height % 48) == (0, 0) and overlay.width >= 400
    brightness = np.asarray(overlay.convert("L").resize(image.size, Image.Resampling.BOX))
    assert brightness[12:18, 32:38].min() > brightness[30:].max() + 50


def test_a_map_that_is_the_same_everywhere_has_an_overlay():
    assert draw_overlay(Image.new("RGB", (640, 480)), np.zeros((480, 640))).size == (640, 480)
