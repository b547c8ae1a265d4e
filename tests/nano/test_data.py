"""The data of `fusion-nano`: drawn images, splits, conversations, tokenizer."""

import itertools
import random
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from fusion_hf.data import easy_vqa as easy_vqa_module
from fusion_hf.drawing.drawn_images import (
    CANVAS_SIDE,
    CATEGORIES,
    COLORS,
    COUNT_MARGIN,
    DIRECTIONS,
    IMAGE_SIDE,
    MAX_COUNT,
    SHAPES,
    SPATIAL_GAP,
    SPATIAL_SLOPE,
    SPLITS,
    WORDS,
    DrawnImage,
    DrawnShape,
    direction,
    draw_spec,
)
from fusion_hf.drawing.drawn_questions import (
    DrawnQuestion,
    casual,
    compatible,
    drawn_caption,
    drawn_questions,
    easy_vqa_caption,
    parse_easy_vqa,
)
from fusion_hf.nano.training_records import (
    STAGES,
    DrawnMixture,
    NanoRecord,
    draw_images,
    easy_vqa_images,
    evaluation_records,
    group_turns,
    stage_records,
    training_texts,
)
from fusion_hf.nano.training_records import test_records as final_records
from fusion_hf.nano.word_tokenizer import MAX_VOCABULARY, SPECIAL_TOKENS, build_tokenizer

SMALL = DrawnMixture(single=60, count=60, spatial=60, text=200)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(training_texts(mixture=DrawnMixture(single=300, count=300, spatial=300, text=900)))


def specs(category, amount=200, split="train"):
    return [draw_spec(category, split, index) for index in range(amount)]


# --- images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_seed_names_one_image(category):
    first, again = draw_spec(category, "train", 7, seed=3), draw_spec(category, "train", 7, seed=3)
    assert first == again
    assert first.render().tobytes() == again.render().tobytes()
    others = [
        draw_spec(category, "train", 8, 3),
        draw_spec(category, "train", 7, 4),
        draw_spec(category, "test", 7, 3),
    ]
    assert all(other != first for other in others)


@pytest.mark.parametrize("category", CATEGORIES)
def test_images_are_rgb_with_a_light_background(category):
    for spec in specs(category, 20):
        image = spec.render()
        assert (image.mode, image.size) == ("RGB", (IMAGE_SIDE, IMAGE_SIDE))
        pixels = np.asarray(image).reshape(-1, 3)
        assert (pixels == spec.background).all(axis=1).mean() > 1 / 3
        assert not (pixels == spec.background).all()


@pytest.mark.parametrize("category", CATEGORIES)
def test_splits_share_no_image(category):
    drawn = {split: set(specs(category, 300, split)) for split in SPLITS}
    for first, second in itertools.combinations(SPLITS, 2):
        assert not drawn[first] & drawn[second]


def test_unknown_category_and_split_are_named():
    with pytest.raises(ValueError, match=r"category.*single, count, spatial, text, got 'photo'"):
        draw_spec("photo", "train", 0)
    with pytest.raises(ValueError, match=r"split.*train, validation, test, got 'dev'"):
        draw_spec("text", "dev", 0)


def test_shapes_lie_inside_the_image():
    for category in ("single", "count", "spatial"):
        for spec in specs(category):
            for shape in spec.shapes:
                assert min(shape.left, shape.top) >= 0
                assert max(shape.left + shape.width, shape.top + shape.height) <= CANVAS_SIDE + 1


@pytest.mark.parametrize("category", ("single", "count"))
def test_pixels_show_the_spec(category):
    """Every shape's colour is at its centre, and the number of separate blobs is the number of shapes."""
    for spec in specs(category, 100):
        pixels = np.asarray(spec.render())
        for shape in spec.shapes:
            x, y = (int(value / 2) for value in shape.center)
            assert tuple(pixels[y, x]) == COLORS[shape.color]
        far_from_background = np.abs(pixels.astype(int) - spec.background).sum(axis=2) > 150
        assert count_blobs(far_from_background) == len(spec.shapes)


def count_blobs(mask):
    """Number of 4-connected areas of a boolean mask (H, W)."""
    waiting, blobs = set(zip(*np.nonzero(mask), strict=True)), 0
    while waiting:
        blobs += 1
        front = [waiting.pop()]
        while front:
            y, x = front.pop()
            for neighbour in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if neighbour in waiting:
                    waiting.remove(neighbour)
                    front.append(neighbour)
    return blobs


def test_counted_shapes_keep_apart_and_all_counts_occur():
    drawn = specs("count", 300)
    assert {len(spec.shapes) for spec in drawn} == set(range(1, MAX_COUNT + 1))
    for spec in drawn:
        for a, b in itertools.combinations(spec.shapes, 2):
            horizontal = max(a.left, b.left) - min(a.left + a.width, b.left + b.width)
            vertical = max(a.top, b.top) - min(a.top + a.height, b.top + b.height)
            assert max(horizontal, vertical) > COUNT_MARGIN


def test_the_answer_of_a_spatial_image_is_unambiguous():
    seen_answers = set()
    for spec in specs("spatial", 400):
        first, second = spec.shapes
        assert first.kind != second.kind and first.color != second.color
        answer = direction(first, second)
        seen_answers.add(answer)
        opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
        assert direction(second, first) == opposite[answer]
        axis = 0 if answer in ("left", "right") else 1
        offsets = [a - b for a, b in zip(first.center, second.center, strict=True)]
        assert (offsets[axis] < 0) == (answer in ("left", "above"))
        assert abs(offsets[1 - axis]) <= SPATIAL_SLOPE * abs(offsets[axis])
        start, size = (("left", "width"), ("top", "height"))[axis]
        low, high = sorted((first, second), key=lambda shape: getattr(shape, start))
        assert getattr(high, start) - getattr(low, start) - getattr(low, size) >= SPATIAL_GAP
    assert seen_answers == set(DIRECTIONS)


def test_direction_without_a_clear_margin_is_none():
    shape = DrawnShape("circle", "red", 40, 40, 20, 20)
    assert direction(shape, DrawnShape("triangle", "blue", 70, 70, 20, 20)) is None
    assert direction(shape, DrawnShape("triangle", "blue", 62, 40, 20, 20)) is None
    assert direction(shape, DrawnShape("triangle", "blue", 70, 40, 20, 20)) == "left"


def test_words_are_whole_and_of_the_vocabulary():
    assert len(WORDS) == len(set(WORDS)) == 48
    assert {len(word) for word in WORDS} == {3, 4, 5}
    for a, b in itertools.combinations(WORDS, 2):
        assert len(a) != len(b) or sum(x != y for x, y in zip(a, b, strict=True)) >= 2
    assert {spec.word.text for spec in specs("text", 1000)} == set(WORDS)
    for spec in specs("text", 200):
        pixels = np.asarray(spec.render())
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (border == spec.background).all()
        ink = (np.abs(pixels.astype(int) - spec.background).sum(axis=2) > 60).nonzero()
        assert np.ptp(ink[0]) >= 8 and np.ptp(ink[1]) >= 12


# --- questions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("category", CATEGORIES)
def test_answers_follow_from_the_spec(category):
    for index, spec in enumerate(specs(category, 300)):
        for question in drawn_questions(spec, random.Random(index)):
            assert question.answer == answer_by_geometry(spec, question.text), question


def answer_by_geometry(spec, text):
    """Answers a question from the spec, by other means than the code that made the question."""
    if spec.word is not None:
        return spec.word.color if "color" in text else spec.word.text
    values = re.findall("|".join((*SHAPES, *COLORS)), text)
    matching = [shape for shape in spec.shapes if all(value in (shape.kind, shape.color) for value in values)]
    if text.startswith("how many"):
        return str(len(matching))
    if text.startswith("where"):
        seen, reference = (
            next(shape for shape in spec.shapes if any(value in part for value in (shape.kind, shape.color)))
            for part in text.split(", seen from the ")
        )
        dx, dy = (a - b for a, b in zip(seen.center, reference.center, strict=True))
        if abs(dx) > abs(dy):
            return "left" if dx < 0 else "right"
        return "above" if dy < 0 else "below"
    if text.startswith(("is", "does")):
        return "yes" if bool(matching) != bool(re.search(r"\bno", text)) else "no"
    (answer,) = {shape.color if "color" in text else shape.kind for shape in matching}
    return answer


@pytest.mark.parametrize("category", CATEGORIES)
def test_captions_tell_what_is_there(category):
    for spec in specs(category, 100):
        caption = drawn_caption(spec)
        assert caption.endswith(".")
        if spec.word is not None:
            assert caption == f'the {spec.word.color} word "{spec.word.text}".'
        elif category == "count":
            assert int(caption.split()[0]) == len(spec.shapes)
            numbers = [int(number) for number in re.findall(r"\d", caption)]
            assert len(numbers) == 1 or sum(numbers[1:]) == numbers[0]
        else:
            assert all(shape.name in caption for shape in spec.shapes)


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("what is the blue shape?", "circle", ("shape", {"color"}, None)),
        ("what color is the shape?", "red", ("color", set(), None)),
        ("what is the color of the circle?", "red", ("color", {"shape"}, None)),
        ("what shape is present?", "triangle", ("shape", set(), None)),
        ("is there not a teal shape in the image?", "no", ("color", set(), "teal")),
        ("does the image contain a rectangle?", "yes", ("shape", set(), "rectangle")),
    ],
)
def test_easy_vqa_questions_are_understood(text, answer, expected):
    question = parse_easy_vqa(text, answer)
    assert (question.asks, set(question.names), question.candidate) == expected
    assert (question.text, question.answer) == (text, answer)


def test_an_unknown_form_is_an_error():
    with pytest.raises(ValueError, match="'is it nice\\?' with the answer 'yes'"):
        parse_easy_vqa("is it nice?", "yes")


def test_caption_from_easy_vqa_questions():
    color = parse_easy_vqa("is there not a red shape?", "no")
    shape = parse_easy_vqa("what is the red shape?", "circle")
    other = parse_easy_vqa("is there a triangle?", "no")
    assert easy_vqa_caption((color, other)) is None
    assert easy_vqa_caption((color, shape)) == easy_vqa_caption((shape,)) == "a red circle."


def test_questions_that_give_each_other_away_are_not_compatible():
    named_color = DrawnQuestion("what is the blue shape?", "circle", "shape", frozenset({"color"}))
    asked_color = DrawnQuestion("what color is the shape?", "blue", "color")
    asked_shape = DrawnQuestion("what shape is present?", "circle", "shape")
    red, blue = (DrawnQuestion(f"is there a {c} shape?", "no", "color", candidate=c) for c in ("red", "blue"))
    assert not compatible(named_color, asked_color) and not compatible(asked_color, named_color)
    assert not compatible(named_color, red) and not compatible(asked_color, red) and not compatible(red, red)
    assert compatible(asked_color, asked_shape) and compatible(red, asked_shape) and compatible(red, blue)


def test_casual_spelling():
    rng = random.Random(0)
    assert casual("is it red?", rng, 0.0) == "is it red?"
    assert casual("is it red?", rng, 1.0) == "Is it red"


# --- records ------------------------------------------------------------------------------------------------------


def test_grouping_uses_every_question_once_and_leaks_nothing():
    for number, image in enumerate(draw_images("train", SMALL, seed=0) + easy_vqa_images("validation")):
        conversations = group_turns(image.questions, random.Random(number))
        used = [question for turns in conversations for question in turns]
        assert sorted(map(repr, used)) == sorted(map(repr, image.questions))
        for turns in conversations:
            assert 1 <= len(turns) <= 3
            for a, b in itertools.combinations(turns, 2):
                assert a.asks not in b.names and b.asks not in a.names
                assert a.asks != b.asks or (a.candidate and b.candidate and a.candidate != b.candidate)


def test_no_conversation_names_the_answer_of_another_turn():
    """The same rule, seen from the texts: apart from yes/no proposals no question contains another turn's answer."""
    records = stage_records("2", mixture=SMALL)
    assert max(len(record.turns) for record in records) == 3
    for record in records:
        for (question, _), (other, answer) in itertools.permutations(record.turns, 2):
            proposes = question.lower().startswith(("is", "does"))
            assert proposes or answer not in question.lower().split(), (question, other)
            if not proposes and answer in ("yes", "no"):
                assert not set(re.findall("|".join((*SHAPES, *COLORS)), other.lower())) & set(question.lower().split())


@pytest.mark.parametrize("stage", STAGES)
def test_records_are_deterministic(stage):
    assert stage_records(stage, mixture=SMALL) == stage_records(stage, mixture=SMALL)
    assert stage_records(stage, mixture=SMALL) != stage_records(stage, mixture=SMALL, seed=1)


def test_stages_hold_captions_then_questions():
    captions, both, questions = (
        [turns[0][1].endswith(".") for turns in (record.turns for record in stage_records(stage, mixture=SMALL))]
        for stage in STAGES
    )
    assert all(captions) and not any(questions)
    assert 0.3 < sum(both) / len(both) < 0.6
    with pytest.raises(ValueError, match=r"stage.*1, 1\.5, 2, got '3'"):
        stage_records("3")


def test_a_mixture_may_use_a_part_of_easy_vqa():
    counts = []
    for share in (0.1, 0.0):
        records = stage_records("2", mixture=replace(SMALL, easy_vqa=share))
        counts.append(len({record.key for record in records if record.category == "easy-vqa"}))
    assert counts == [360, 0]


def test_splits_of_records_are_disjoint():
    training = {record.key for stage in STAGES for record in stage_records(stage, mixture=SMALL)}
    validation = {record.key for record in evaluation_records("validation", drawn=50)}
    validation |= {record.key for record in stage_records("2", "validation", mixture=SMALL)}
    test = {record.key for record in final_records(drawn=50)}
    assert not training & validation and not training & test and not validation & test
    easy_vqa = [{key for key in keys if key.startswith("easy-vqa/train")} for keys in (training, validation)]
    assert [len(keys) for keys in easy_vqa] == [3600, 400]


def test_test_images_are_reached_through_test_records_alone():
    for reader in (easy_vqa_images, evaluation_records):
        with pytest.raises(ValueError, match=r"split.*train, validation, got 'test'"):
            reader("test")
    with pytest.raises(ValueError, match=r"split.*train, validation, got 'test'"):
        stage_records("1", "test", mixture=SMALL)


def test_final_records_are_single_questions_of_every_category():
    records = final_records(drawn=50)
    assert all(len(record.turns) == 1 for record in records)
    amounts = {category: sum(record.category == category for record in records) for category in ("easy-vqa", "count")}
    assert amounts == {"easy-vqa": 9673, "count": 50}
    for record in records:
        ((_, answer),) = record.turns
        if record.category == "count":
            assert answer in "12345"
        elif record.category == "spatial":
            assert answer in DIRECTIONS
        elif record.category == "text":
            assert answer in WORDS
    easy_vqa_answers = {record.turns[0][1] for record in records if record.category == "easy-vqa"}
    assert easy_vqa_answers == {"yes", "no", *SHAPES, *COLORS}


def test_llava_shape():
    record = NanoRecord(
        draw_spec("text", "train", 0), (("what word is written?", "cat"), ("Q", "A")), "text", "text/0"
    )
    llava = record.to_llava()
    assert llava["image"].size == (IMAGE_SIDE, IMAGE_SIDE)
    assert llava["conversations"] == [
        {"from": "human", "value": "<image>\nwhat word is written?"},
        {"from": "gpt", "value": "cat"},
        {"from": "human", "value": "Q"},
        {"from": "gpt", "value": "A"},
    ]


def test_images_open_from_files_and_specs():
    for record in evaluation_records("validation", drawn=1)[-4:]:
        image = record.open_image()
        assert isinstance(image, Image.Image) and image.mode == "RGB" and image.size == (64, 64)
        assert isinstance(record.image, DrawnImage) == (record.category != "easy-vqa")


def test_missing_data_set_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "easy_vqa", None)
    with pytest.raises(ImportError, match=r"easy-vqa.*extra `train`"):
        easy_vqa_module.read_easy_vqa("train")


# --- tokenizer ----------------------------------------------------------------------------------------------------


def test_vocabulary(tokenizer):
    assert len(tokenizer) <= MAX_VOCABULARY
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    assert (tokenizer.pad_token_id, tokenizer.eos_token, tokenizer.bos_token) == (0, "<|im_end|>", None)


def test_known_words_are_one_token(tokenizer):
    for answer in (*WORDS, *SHAPES, *COLORS, *DIRECTIONS, "yes", "no", "1", "5"):
        assert len(tokenizer(answer).input_ids) == 1, answer
    assert tokenizer.tokenize("what color is the shape?") == ["what", "Ġcolor", "Ġis", "Ġthe", "Ġshape", "?"]
    turn = "<|im_start|>user\nis there a circle?<|im_end|>"
    assert tokenizer.tokenize(turn)[:3] == ["<|im_start|>", "user", "Ċ"]


@pytest.mark.parametrize(
    "text",
    ["", " ", "Grüße, 世界! 🙂👩‍👩‍👧", "a\tb\r\n\n  c ", "\x00\x7f\u200b\ufeff", "é e\u0301", "REDred red", "ก็ مرحبا"],
)
def test_any_text_decodes_to_itself(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_random_unicode_decodes_to_itself(tokenizer):
    rng = random.Random(0)
    points = [point for point in range(0x110000) if not 0xD800 <= point <= 0xDFFF]
    for _ in range(200):
        text = "".join(map(chr, rng.sample(points, 20)))
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_survives_saving(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nwhere is the ünknown circle?<|im_end|>\n"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.get_vocab() == tokenizer.get_vocab()
    assert (again.pad_token_id, again.padding_side, again.model_max_length) == (0, "right", 1024)


def test_rare_words_give_way_and_too_small_a_vocabulary_is_refused():
    small = build_tokenizer([" blue blue red"] * 3, max_vocabulary=len(SPECIAL_TOKENS) + 256 + 1)
    assert len(small) == len(SPECIAL_TOKENS) + 256 + 1
    assert small.tokenize("blue red") == ["b", "l", "u", "e", "Ġ", "r", "e", "d"]
    assert small.tokenize(" blue") == ["Ġblue"]
    with pytest.raises(ValueError, match=r"max_vocabulary.*at least 263, got 100"):
        build_tokenizer([], max_vocabulary=100)
