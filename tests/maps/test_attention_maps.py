"""Maps of the bundled model: the same answers, arrays of the right shapes, images that can be opened."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fusion_hf
from fusion_hf import AttentionMaps, attention_maps
from fusion_hf.common.errors import InputError
from fusion_hf.inference import ChatModel, Conversation, question_message
from fusion_hf.maps.drawing import draw_overlay, save_overlays

IMAGE = "docs/assets/red_circle.png"
QUESTION = "what color is the shape?"
HISTORY = [{"role": "user", "content": "how many shapes are there?"}, {"role": "assistant", "content": "one"}]


@pytest.fixture(scope="module")
def chat_model() -> ChatModel:
    return ChatModel.load(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def result(chat_model: ChatModel) -> AttentionMaps:
    return attention_maps(IMAGE, QUESTION, chat_model)


@pytest.mark.parametrize("question", [QUESTION, "is there a blue shape?", "how many shapes are there?"])
@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_answers_are_the_same(question: str, name: str):
    chat_model = ChatModel.load(device="cpu", dtype="float32")
    chat_model.model.set_attn_implementation(name)
    inputs = chat_model.prepare([question_message(question, chat_model.open_image(IMAGE))])
    ids = chat_model.generate(inputs, 16).sequences[0, inputs["input_ids"].shape[1] :]
    result = attention_maps(IMAGE, question, chat_model, max_new_tokens=16)
    assert result.answer_ids == tuple(ids.tolist())
    assert result.answer == chat_model.answer([question_message(question, chat_model.open_image(IMAGE))], 16)


def test_arrays(chat_model: ChatModel, result: AttentionMaps):
    config = chat_model.model.config
    patches = config.num_patches_per_side
    assert [word.text for word in result.question.words] == QUESTION.split()
    assert [word.text for word in result.answer_tokens.words] == [result.answer] == ["red"]
    assert result.question.values.shape == (3, result.question.words[-1].end, patches, patches)
    assert result.answer_tokens.values.shape == (4, len(result.answer_ids), patches, patches)
    side = round(config.query_len**0.5) * config.window_size
    assert result.latents.values.shape == (2, 1, side, side)
    assert [list(layers) for layers in result.latents.layers] == [[layer] for layer in config.sampler_layers]
    for maps in result.kinds().values():
        assert maps.values.dtype == np.float32 and len(maps.layers) == len(maps.values)
        assert maps.values.min() >= 0
        assert maps.on_image(maps.words[0]).shape == (len(maps.layers), 64, 64)
    assert result.latents.values.sum((2, 3)) == pytest.approx(config.query_len, rel=1e-5)
    for maps in (result.question, result.answer_tokens):
        assert 0 < maps.values.sum((2, 3)).max() <= 1


def test_turns_and_budgets(chat_model: ChatModel):
    result = attention_maps(
        IMAGE, QUESTION, chat_model, HISTORY, query_len=4, image_token_grid=3, layer_groups=2, max_new_tokens=1
    )
    assert result.latents.values.shape == (2, 2, 4, 4)
    assert [word.text for word in result.latents.words] == ["turn 1", "turn 2"]
    assert result.answer_tokens.values.shape == (2, 1, 3, 3)
    assert len(result.question.values) == 2
    assert " ".join(word.text for word in result.question.words).startswith("how many shapes")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"question": "  "}, "question.*not be empty"),
        ({"layer_groups": 0}, "layer_groups.*got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens.*got 0"),
        ({"query_len": 3}, "query_len.*got 3"),
        ({"image_token_grid": 7}, "image_token_grid.*got 7"),
        ({"dtype": "float32"}, "if `model` is a ChatModel"),
        ({"image": "nowhere.png"}, "nowhere.png"),
    ],
)
def test_wrong_arguments(chat_model: ChatModel, arguments: dict, message: str):
    with pytest.raises(InputError, match=message):
        attention_maps(**{"image": IMAGE, "question": QUESTION, "model": chat_model, **arguments})


def test_overlays(result: AttentionMaps, tmp_path: Path):
    image = Image.open(IMAGE).resize((128, 64))
    paths = save_overlays(result, image, tmp_path / "maps")
    names = [path.name for path in paths]
    assert names[:2] == ["question-01-what.png", "question-02-color.png"]
    assert names[-2:] == ["latents-01-turn-1.png", "answer-01-red.png"]
    assert sorted(names) == sorted(path.name for path in (tmp_path / "maps").iterdir())
    for path in paths:
        with Image.open(path) as drawn:
            drawn.load()
            assert drawn.width > drawn.height
            assert len(np.unique(np.asarray(drawn.convert("L")))) > 50


def test_an_overlay_is_bright_where_the_map_is(result: AttentionMaps):
    """In layer 2, the word red is chosen from the circle."""
    maps = result.answer_tokens
    figure = draw_overlay(Image.open(IMAGE).convert("RGB"), maps, maps.words[0], "title")
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == [f"layer {layer}" for layer in range(4)]
    shown = np.asarray(panels[2].images[1].get_array())
    row, column = np.unravel_index(shown.argmax(), shown.shape)
    # the circle of the demo's image
    assert (column / shown.shape[1] - 62 / 128) ** 2 + (row / shown.shape[0] - 66 / 128) ** 2 < (26 / 128) ** 2


def test_without_matplotlib_the_error_names_the_extra(result: AttentionMaps, monkeypatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("fusion_hf.common.extras.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'fusion_hf\[maps\]'"):
        save_overlays(result, Image.new("RGB", (8, 8)), tmp_path)
    assert not any(tmp_path.iterdir())


def test_it_is_a_public_name():
    assert fusion_hf.attention_maps is attention_maps
    assert {"AttentionMaps", "attention_maps"} <= set(fusion_hf.__all__)


@pytest.mark.parametrize("first", [HISTORY[0], question_message("how many shapes are there?")])
def test_a_history_is_read_as_in_a_conversation(chat_model: ChatModel, monkeypatch: pytest.MonkeyPatch, first: dict):
    read = []

    original = ChatModel.prepare

    def prepare(*args, **kwargs):
        read.append(original(*args, **kwargs))
        return read[-1]

    monkeypatch.setattr(ChatModel, "prepare", prepare)
    talk = Conversation(chat_model, chat_model.open_image(IMAGE), max_new_tokens=16)
    talk.messages = [question_message("how many shapes are there?", talk.image), HISTORY[1]]
    answer = talk.ask(QUESTION)
    assert attention_maps(IMAGE, QUESTION, chat_model, [first, HISTORY[1]]).answer == answer
    assert len(read) == 2 and read[0]["input_ids"].equal(read[1]["input_ids"])
