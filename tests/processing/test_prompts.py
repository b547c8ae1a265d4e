"""Prompts that FUSION's template did not write, tokens of users, and processors that were saved by parts."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.helpers.chat_models import MODEL_PARAMETERS, load_chat_model, write_chat_model
from transformers import AutoProcessor, AutoTokenizer

from fusion_hf import FusionConfig, FusionForConditionalGeneration, FusionImageProcessor, FusionProcessor, nano_path
from fusion_hf.model.chat_fusion import BREAK
from fusion_hf.model.turns_fusion import find_prompt_ends, find_questions
from fusion_hf.training import FusionDataCollator

IMAGE = Image.new("RGB", (40, 30), "red")
CALL = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
OPEN = CALL | {"add_generation_prompt": False, "continue_final_message": True}
SECRET = {"role": "system", "content": "SECRET"}
# of a family that FUSION has no format for
FOREIGN = """\
{%- for message in messages -%}
{{- message['role'] | upper + ': ' -}}
{%- for block in message['content'] -%}
{%- if block['type'] == 'image' -%}{{- '<image><latent_image>' -}}{%- else -%}{{- block['text'] -}}{%- endif -%}
{%- endfor -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
Model = FusionForConditionalGeneration


@pytest.fixture(scope="module", params=MODEL_PARAMETERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Path:
    if request.param == "nano":
        return Path(nano_path())
    return write_chat_model(tmp_path_factory.mktemp(request.param) / "model", request.param)


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[Model, FusionProcessor]:
    return load_chat_model(folder)


@pytest.fixture(scope="module")
def processor(pair: tuple[Model, FusionProcessor]) -> FusionProcessor:
    return pair[1]


@pytest.fixture
def own_processor(folder: Path) -> FusionProcessor:
    """For a test that changes it."""
    return FusionProcessor.from_pretrained(folder)


def user(text: str, image: Any = None) -> dict[str, Any]:
    blocks = [] if image is None else [{"type": "image", "image": image}]
    return {"role": "user", "content": [*blocks, {"type": "text", "text": text}]}


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def question_of(inputs: Any, processor: FusionProcessor) -> str:
    ids = inputs["instruct_input_ids"][0][inputs["instruct_attention_mask"][0].bool()].tolist()
    prefix = processor.tokenizer("")["input_ids"]
    assert ids[: len(prefix)] == prefix
    return processor.tokenizer.decode(ids[len(prefix) :])


# Control tokens


def test_sanitize_control_tokens(own_processor: FusionProcessor) -> None:
    """What a user writes as a control token is text by default, and every special token with the option."""
    processor = own_processor
    processor.tokenizer.add_tokens(["<loc_1>"], special_tokens=True)
    special = processor.tokenizer.convert_tokens_to_ids("<loc_1>")
    messages = [user("say <|im_end|>, <|end|>, <|eot_id|> or <image>", IMAGE)]
    plain = processor.apply_chat_template(messages, **CALL)
    sanitized = processor.apply_chat_template(messages, **CALL, sanitize_control_tokens=True)
    for name, value in plain.items():
        assert torch.equal(sanitized[name], value), name
    messages = [{"role": "system", "content": "<loc_1>"}, user("at <loc_1>", IMAGE)]
    for sanitize, count in ((False, 2), (True, 0)):
        inputs = processor.apply_chat_template(messages, **CALL, sanitize_control_tokens=sanitize)
        assert int((inputs["input_ids"] == special).sum()) == count
        assert question_of(inputs, processor).replace(" ", "") == "at<loc_1>"
    text = processor.apply_chat_template(messages, sanitize_control_tokens=True)
    assert "<loc_1>" not in text and text.replace(BREAK, "").count("<loc_1>") == 2


def test_sanitized_template_variables_and_documents(processor: FusionProcessor) -> None:
    template = processor.chat_template.replace(
        "{%- for message in messages -%}", "{{- note -}}{%- for message in messages -%}", 1
    )
    inputs = processor.apply_chat_template(
        [user("a", IMAGE)], chat_template=template, note="<image>", sanitize_control_tokens=True, **CALL
    )
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == processor.num_image_tokens


def test_users_tokens_stay_tokens(pair: tuple[Model, FusionProcessor], own_processor: FusionProcessor) -> None:
    model, processor = pair[0], own_processor
    processor.tokenizer.add_tokens(["<loc_1>"], special_tokens=True)
    processor.tokenizer.add_special_tokens({"extra_special_tokens": ["<box>"]}, replace_extra_special_tokens=False)
    processor.tokenizer.add_tokens(["<think>", "<|mine|>"])
    names = ["<loc_1>", "<box>", "<think>", "<|mine|>"]
    numbers = processor.tokenizer.convert_tokens_to_ids(names)
    inputs = processor.apply_chat_template([user(" ".join(names), IMAGE), answer("<think>"), user("why?")], **CALL)
    for number in numbers:
        assert int((inputs["input_ids"] == number).sum()) == 1 + (number == numbers[2])
        assert int((inputs["instruct_input_ids"] == number).sum()) == 1
    marks = [user("<image> <vision_start><latent_image>" + "<|im_end|><|end|><|eot_id|>", IMAGE)]
    found, plain = (processor.apply_chat_template(chat, **CALL)["input_ids"] for chat in (marks, [user("a", IMAGE)]))
    for number in processor.tokenizer.all_special_ids:
        assert int((found == number).sum()) == int((plain == number).sum())
    # the tokenizer in the model's folder does not know them
    if not model.config.questions_are_cut:
        with pytest.raises(ValueError, match="lacks one of their tokens"):
            find_questions(inputs["input_ids"], inputs["attention_mask"], model.config)


def test_halves_of_a_mark_do_not_become_one(processor: FusionProcessor) -> None:
    blocks = [{"type": "text", "text": "<ima"}, {"type": "text", "text": "ge>"}]
    text = processor.apply_chat_template([{"role": "user", "content": blocks}])
    assert "<image>" not in text and "<image>" in text.replace(BREAK, "")


# Texts of other templates


@pytest.mark.parametrize("text", ["<image>\nwhat?", "USER: <image> what? ASSISTANT:", "<image>", "what? <image>"])
def test_an_image_without_latents_warns(processor: FusionProcessor, text: str) -> None:
    with pytest.warns(UserWarning, match="no <latent_image>, so it was not written by FUSION's chat template"):
        processor(text=["a", text], images=[IMAGE], padding=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor(text="a")
        processor(text="<image><latent_image>a", images=IMAGE)
        processor.apply_chat_template([user("a", IMAGE)], **CALL)


@pytest.mark.parametrize(
    "messages",
    [
        [SECRET, user("what is", IMAGE)],
        [SECRET, user("hello", IMAGE), answer("yes"), user("what is")],
        [SECRET, user("hello"), answer("yes"), user("what is", IMAGE)],
        [user("what is", IMAGE), answer("it is")],
    ],
)
def test_a_message_to_be_continued(processor: FusionProcessor, messages: list[dict[str, Any]]) -> None:
    inputs = processor.apply_chat_template(messages, **OPEN)
    texts = [message["content"][-1]["text"] for message in messages if message["role"] == "user"]
    assert question_of(inputs, processor) == "".join(texts)
    text = processor.apply_chat_template(messages, continue_final_message=True)
    assert text.endswith("is")
    again = processor(text=text, images=IMAGE, return_tensors="pt")
    for name, value in inputs.items():
        assert torch.equal(again[name], value), name


def test_a_template_without_fusions_headers(own_processor: FusionProcessor) -> None:
    """The question is the user's, or there is an error; never a system message, an answer or a header."""
    processor = own_processor
    inputs = processor.apply_chat_template([SECRET, user("what?", IMAGE)], chat_template=FOREIGN, **CALL)
    assert question_of(inputs, processor) == "what?"
    assert inputs["prompt_end_positions"].tolist() == [[inputs["input_ids"].shape[1] - 1]]
    text = processor.apply_chat_template([SECRET, user("what?", IMAGE)], chat_template=FOREIGN)
    assert "SECRET" not in question_of(processor(text=text, images=IMAGE, return_tensors="pt"), processor)
    given = processor(text=text, images=IMAGE, questions="what?", return_tensors="pt")
    assert question_of(given, processor) == "what?"
    with pytest.raises(ValueError, match="`questions` must have one text for each of 1 prompts, got 2"):
        processor(text=text, images=IMAGE, questions=["a", "b"])
    talk = [user("what?", IMAGE), answer("red")]
    for messages, options in ((talk, CALL | {"add_generation_prompt": False}), ([*talk, user("why?")], CALL)):
        with pytest.raises(ValueError, match=r"must write \d assistant headers .*`chat_format` = .*got 0"):
            processor.apply_chat_template(messages, chat_template=FOREIGN, **options)
    several = "SECRET <image><latent_image>what? red <latent_image>why?"
    with pytest.raises(ValueError, match="several latent blocks but no user header"):
        processor(text=several, images=IMAGE)
    with pytest.raises(ValueError, match="2 latent blocks but no assistant header"):
        processor(text=several, images=IMAGE, questions="what?why?")
    processor.chat_template = FOREIGN
    with pytest.raises(ValueError, match=r"every answer between the assistant header .*`chat_format`.*got 0 of 1"):
        FusionDataCollator(processor)([{"messages": talk}])


def test_a_template_that_builds_its_headers_is_accepted(processor: FusionProcessor) -> None:
    """The source need not hold the header, if what it writes does."""
    messages = [user("what?", IMAGE), answer("red"), user("why?")]
    expected = processor.apply_chat_template(messages, **CALL)
    template = processor.chat_template.replace("assistant", "assist' + 'ant").replace(
        "== 'assist' + 'ant'", "== 'assistant'"
    )
    template = template.replace("user or assist' + 'ant", "user or assistant")
    found = processor.apply_chat_template(messages, chat_template=template, **CALL)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_an_image_that_a_text_parts_from_its_latents(pair: tuple[Model, FusionProcessor]) -> None:
    model, processor = pair
    text = processor.apply_chat_template([user("what?", IMAGE)], add_generation_prompt=True)
    text = text.replace("<image><vision_end>", "<image><vision_end>a long remark between the two", 1)
    inputs = processor(text=text, images=IMAGE, return_tensors="pt")
    found = find_prompt_ends(inputs["input_ids"], inputs["attention_mask"], model.config)
    assert found.tolist() == inputs["prompt_end_positions"].tolist()
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


def test_offsets_of_a_text_whose_image_moves_are_refused(processor: FusionProcessor) -> None:
    with pytest.raises(ValueError, match="`return_offsets_mapping` needs a text in FUSION's order"):
        processor(text="<latent_image>a<image>", images=IMAGE, return_offsets_mapping=True)


def test_an_old_folders_template_gives_the_same_ids(processor: FusionProcessor) -> None:
    """It wrote the image into its own message; the processor puts it first."""
    late = [user("hello"), answer("yes"), user("what?", IMAGE)]
    expected = processor.apply_chat_template(late, **CALL)
    old = processor.chat_template.replace(
        "set conversation.block = '<vision_start><image>", "set unused = '<vision_start><image>"
    )
    old = old.replace("{{- latents + ('\\n' if", "{{- '<vision_start><image><vision_end>' + ('\\n' if")
    assert old.count("<image>") == 2
    found = processor.apply_chat_template(late, chat_template=old, **CALL)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "user"}, r"messages\[0\].content. must be a string or a list of blocks, got NoneType"),
        ({"role": "user", "content": None}, r"messages\[0\].content. must be a string or a list of blocks"),
        ({"content": "a"}, r"messages\[0\].role. must be one of"),
        ({"role": "user", "content": {"type": "text"}}, r"messages\[0\].content. must be .* got dict"),
        ({"role": "user", "content": [{"text": "a"}]}, r"messages\[0\].content\[0\].type. must be one of"),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, r"messages\[0\].content\[0\].text.*got 3"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, r"messages\[0\].content\[0\].text.*got None"),
    ],
)
def test_what_a_message_lacks_is_named_in_the_collator_too(
    processor: FusionProcessor, message: dict[str, Any], error: str
) -> None:
    with pytest.raises(ValueError, match=error):
        processor.apply_chat_template([message], **CALL)
    for image in (None, IMAGE):
        with pytest.raises(ValueError, match=f"Record 'seven': {error}"):
            FusionDataCollator(processor)([{"id": "seven", "image": image, "messages": [message, answer("b")]}])


@pytest.mark.parametrize(
    ("turns", "error"),
    [
        ([{"from": "human"}], r"`conversations\[0\].value` must be a text, got null"),
        ([{"from": "human", "value": 3}], r"`conversations\[0\].value` must be a text, got int"),
        ([{"value": "a"}], r".*from.* must be one of human, gpt, user, assistant, system, got None"),
        (["a"], "`conversations` must be a list of objects, got list"),
        ({}, "`conversations` must be a list of objects, got dict"),
        ([{"from": "human", "value": "a"}] * 2, r"messages\[1\].role. must be 'assistant'"),
        ([{"from": "gpt", "value": "a"}], r"messages\[0\].role. must be 'user'"),
    ],
)
def test_turns_that_cannot_be(processor: FusionProcessor, turns: Any, error: str) -> None:
    with pytest.raises(ValueError, match=f"Record 'seven': {error}"):
        FusionDataCollator(processor)([{"id": "seven", "conversations": turns}])


# Processors that were saved by parts


def save_by_parts(processor: FusionProcessor, folder: Path) -> Path:
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("loader", [FusionProcessor, AutoProcessor])
def test_parts_beside_a_model(pair: tuple[Model, FusionProcessor], loader: Any, tmp_path: Path) -> None:
    """As `Pipeline.save_pretrained` leaves them."""
    model, processor = pair
    model.config.save_pretrained(save_by_parts(processor, tmp_path))
    assert not (tmp_path / "processor_config.json").exists()
    found = loader.from_pretrained(tmp_path)
    for name in ("chat_format", "num_image_tokens", "query_len", "instruct_pad_token_id", "chat_template"):
        assert getattr(found, name) == getattr(processor, name), name
    given = loader.from_pretrained(tmp_path, query_len=1)
    assert (given.query_len, given.num_image_tokens) == (1, processor.num_image_tokens)


@pytest.mark.parametrize("loader", [FusionProcessor, AutoProcessor])
def test_parts_alone_say_what_is_missing(processor: FusionProcessor, loader: Any, tmp_path: Path) -> None:
    save_by_parts(processor, tmp_path)
    with pytest.raises(ValueError, match="`num_image_tokens`, `query_len`, `instruct_pad_token_id`"):
        loader.from_pretrained(tmp_path)
    known = {"query_len": processor.query_len, "instruct_pad_token_id": processor.instruct_pad_token_id}
    with pytest.raises(ValueError, match="Pass `num_image_tokens`, or"):
        loader.from_pretrained(tmp_path, **known)
    found = loader.from_pretrained(tmp_path, **known, num_image_tokens=processor.num_image_tokens)
    assert found.chat_format == processor.chat_format and found.chat_template == processor.chat_template
    made = FusionProcessor(found.image_processor, found.tokenizer)  # transformers' suite makes one like this
    assert made.num_image_tokens is None
    for call in (made, made.apply_chat_template):
        with pytest.raises(ValueError, match="`num_image_tokens` has no default"):
            call(text="<image>") if call is made else call([{"role": "user", "content": "what?"}])


def test_a_tokenizer_by_itself_has_fusions_template(own_processor: FusionProcessor, tmp_path: Path) -> None:
    """Also where a processor was made in memory, as conversion does."""
    processor = own_processor
    processor.tokenizer.chat_template = None
    template = processor.chat_template
    parts = (processor.image_processor, processor.tokenizer)
    made = FusionProcessor(*parts, chat_template=template, num_image_tokens=processor.num_image_tokens)
    made.tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template == template
    again = FusionProcessor(processor.image_processor, tokenizer, num_image_tokens=processor.num_image_tokens)
    assert again.chat_template == template
    with pytest.raises(Exception, match=r"messages\[1\].role must be system, user or assistant, got tool"):
        tokenizer.apply_chat_template([user("a"), {"role": "tool", "content": "b"}], tokenize=False)


def test_a_tokenizer_that_does_not_know_the_format(processor: FusionProcessor, tmp_path: Path) -> None:
    others = {"phi3": "<|end|>", "llama3": "<|eot_id|>", "chatml": "<|im_end|>"}
    del others[processor.chat_format]
    for chat_format, end in others.items():
        with pytest.raises(ValueError, match=f"no token '{end.replace('|', '.')}', which ends a turn"):
            FusionProcessor(
                processor.image_processor, processor.tokenizer, chat_format=chat_format, num_image_tokens=4
            )
    shutil.copytree(nano_path(), tmp_path / "copy")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = tmp_path / "copy" / name
        file.write_text(file.read_text("utf-8").replace("<|im_end|>", "<|other|>"), "utf-8")
    with pytest.raises(ValueError, match=r"no token '<.im_end.>', which ends a turn in the chat format 'chatml'"):
        FusionProcessor.from_pretrained(tmp_path / "copy")
    (tmp_path / "copy" / "processor_config.json").unlink()
    FusionImageProcessor(size={"height": 48, "width": 48}).save_pretrained(tmp_path / "copy")
    with pytest.raises(ValueError, match=r"`chat_format` must be one of .*got None.*the tokens of no chat format"):
        FusionProcessor.from_pretrained(tmp_path / "copy")
    assert FusionConfig.from_pretrained(tmp_path / "copy").num_image_tokens == 36


@pytest.mark.parametrize(
    "settings",
    [{}, {"add_special_tokens": True}, {"add_special_tokens": False}, {"text_kwargs": {"add_special_tokens": False}}],
    ids=str,
)
def test_the_first_token_stands_once(processor: FusionProcessor, settings: dict[str, Any]) -> None:
    """The template writes it where the tokenizer adds it, and trainers tell the tokenizer not to."""
    prefix = processor.tokenizer("")["input_ids"]
    text = processor.apply_chat_template([user("what color is it?")], add_generation_prompt=True)
    ids = processor(text=text, **settings)["input_ids"][0]
    assert ids[: len(prefix)] == prefix
    assert [number for number in ids if number in prefix] == prefix


def test_texts_with_and_without_the_first_token(processor: FusionProcessor) -> None:
    text = processor.apply_chat_template([user("what color is it?")], add_generation_prompt=True)
    texts = [text, "plain"]
    for settings in ({}, {"add_special_tokens": False}):
        together = processor(text=texts, return_offsets_mapping=True, **settings)
        for row, each in enumerate(texts):
            alone = processor(text=each, return_offsets_mapping=True, **settings)
            assert together["input_ids"][row] == alone["input_ids"][0]
            assert together["offset_mapping"][row][1:] == alone["offset_mapping"][0][1:]


@pytest.mark.parametrize("text", ["two and", "", "<b> x", "  two", "3"])
def test_an_answer_alone_has_its_ids_in_the_conversation(processor: FusionProcessor, text: str) -> None:
    """As TRL tokenizes completions."""
    chat = [user("how many?"), answer(text)]
    whole = processor.apply_chat_template(chat)
    prompt = processor.apply_chat_template(chat[:1], add_generation_prompt=True)
    parts = [prompt, whole.removeprefix(prompt)]
    ids = [processor(text=part, add_special_tokens=False)["input_ids"][0] for part in parts]
    assert ids[0] + ids[1] == processor(text=whole)["input_ids"][0]


def test_questions_are_refused_where_turns_are_left_to_the_model(processor: FusionProcessor) -> None:
    text = processor.apply_chat_template([user("what color is it?")], add_generation_prompt=True)
    with pytest.raises(ValueError, match=r"`questions`.*without_turns"):
        processor.without_turns()(text=text, questions="what?")


# Prompts whose images the model gets in another way


KEPT = [
    [user("What is this?", IMAGE)],
    [user("Here it is.", IMAGE), answer("A square."), user("And its colour?")],
    [user("Hello."), answer("Hi."), user("What is this?", IMAGE)],
    [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "data:x"}}, {"type": "text", "text": "?"}],
        }
    ],
]


def with_image(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with an image that can be opened in the place of each image block."""
    blocks = {"image": {"type": "image", "image": IMAGE}, "image_url": {"type": "image", "image": IMAGE}}
    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [blocks.get(block["type"], block) for block in message["content"]]}
        for message in messages
    ]


@pytest.mark.parametrize("messages", KEPT)
@pytest.mark.parametrize("budget", [{}, {"query_len": 4, "image_token_grid": 2}])
def test_images_that_are_not_processed(
    processor: FusionProcessor, messages: list[dict[str, Any]], budget: dict[str, int]
) -> None:
    """Prompts are those of prompts with images, and nothing is opened: there is no `data:x`."""
    expected = processor.apply_chat_template(with_image(messages), **CALL, **budget)
    found = processor.apply_chat_template(messages, **CALL, **budget, process_images=False)
    assert found.keys() == expected.keys() - {"pixel_values"}
    assert all(torch.equal(found[name], expected[name]) for name in found)
    bare = [{"type": "image"}, {"type": "text", "text": "?"}]
    assert "pixel_values" not in processor.apply_chat_template(
        [{"role": "user", "content": bare}], **CALL, process_images=False
    )


def test_texts_whose_images_are_not_processed(processor: FusionProcessor) -> None:
    texts = [processor.apply_chat_template(m, add_generation_prompt=True) for m in (KEPT[0], [user("Hi.")], KEPT[1])]
    options = {"return_offsets_mapping": True, "return_text_replacement_offsets": True, "padding": True}
    expected = processor(text=texts, images=[IMAGE, IMAGE], **options)
    found = processor(text=texts, process_images=False, **options)
    assert found == {name: value for name, value in expected.items() if name != "pixel_values"}
    with pytest.raises(ValueError, match=r"`images`.*`process_images=False`"):
        processor(text=texts, images=[IMAGE, IMAGE], process_images=False)
    with pytest.raises(ValueError, match="2 <image> tokens and 0 images"):
        processor(text=texts)


def test_replaced_texts_have_their_offsets(processor: FusionProcessor) -> None:
    text, count = processor.apply_chat_template(KEPT[0], add_generation_prompt=True), processor.num_image_tokens
    (row,) = processor(text=text, images=IMAGE, return_text_replacement_offsets=True)["text_replacement_offsets"]
    start, token = text.index("<image>"), len("<image>")
    assert row == [
        {
            "type": "image",
            "span": (start, start + token),
            "new_span": (start, start + count * token),
            "text": "<image>",
            "replacement": "<image>" * count,
        }
    ]
