"""The converted tokenizer gives the ids that the authors' training saw."""

import io
import json
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tests.helpers.checkpoints import upstream_config, write_checkpoint, write_json
from tests.helpers.tokenizers import write_llama3_tokenizer, write_phi3_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fusion_hf.conversion.marked_tokenizer import MARKS, add_marks, load_tokenizer
from fusion_hf.conversion.model_files import ConversionError

RECORDED = Path(__file__).parents[1] / "fixtures" / "parity" / "tokenization.json"
MAX_LENGTH = 4096
TEXTS = ["What color is the shape?", "The shape is a red circle.", "There are two dogs on the left."]
IMAGE, LATENT = -200, -300  # upstream's placeholders
# family -> (writer, model type, rows of the embedding, pad token, what the authors' tokenizer puts before a prompt)
FAMILIES = {
    "phi_3": (write_phi3_tokenizer, "phi3", 32_013, "<unk>", " "),
    "llama_3": (write_llama3_tokenizer, "llama", 128_258, "<|reserved_special_token_0|>", ""),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Name of a family and its converted tokenizer, loaded from disk as a user would."""
    write, model_type, rows, _, _ = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = load_tokenizer(write(folder / "source"), model_type, MAX_LENGTH)
    add_marks(tokenizer, rows)
    tokenizer.save_pretrained(folder / "converted")
    write_json(folder / "converted" / "config.json", {"model_type": "fusion"})
    return request.param, AutoTokenizer.from_pretrained(folder / "converted")


def conversations(name: str) -> list[dict]:
    return json.loads(RECORDED.read_text(encoding="utf-8"))[name]


def test_questions(family):
    name, tokenizer = family
    for recorded in conversations(name):
        if recorded["has_image"]:  # a text-only conversation has no instruction
            turns = [turn["value"] for turn in recorded["conversations"] if turn["from"] == "human"]
            question = "".join(turn.replace("<image>", "").strip() for turn in turns)
            assert tokenizer(question).input_ids == recorded["instruct_ids"]


def test_prompts(family):
    name, tokenizer = family
    _, _, rows, _, prefix = FAMILIES[name]
    marks = {IMAGE: rows, LATENT: rows + 1}
    for recorded in conversations(name):
        expected = [marks.get(token, token) for token in recorded["inference_input_ids"]]
        assert tokenizer(prefix + recorded["inference_prompt"]).input_ids == expected


def test_marks_and_settings(family):
    name, tokenizer = family
    _, _, rows, pad, _ = FAMILIES[name]
    assert [tokenizer.convert_tokens_to_ids(mark) for mark in MARKS] == list(range(rows - 2, rows + 2))
    assert set(MARKS) <= set(tokenizer.all_special_tokens)
    assert tokenizer.pad_token == pad and tokenizer.padding_side == "left"
    assert tokenizer.model_max_length == MAX_LENGTH
    text = "Zwei  Hunde 狗\n<tag> 🙂"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_a_sentencepiece_model_alone(tmp_path):
    """As in checkpoints whose authors saved the slow tokenizer only; the reference is sentencepiece itself."""
    trained, turns = io.BytesIO(), ["<|user|>", "<|assistant|>", "<|end|>"]
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_writer=trained,
        model_type="bpe",
        vocab_size=350,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=turns,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(trained.getvalue())
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"})
    write_json(tmp_path / "config.json", upstream_config("phi"))
    reference = SentencePieceProcessor(model_proto=trained.getvalue())
    tokenizer = load_tokenizer(tmp_path, "phi3", MAX_LENGTH)
    for text in (*TEXTS, "<|user|>\nWhat is it?<|end|>\n<|assistant|>\nZwei 狗"):
        assert tokenizer(" " + text).input_ids == reference.encode(text)  # which begins texts with a space


def test_files_that_transformers_converts(tmp_path):
    """A tokenizer without a `tokenizer.json`, beside a configuration that transformers cannot read: long RoPE."""
    write_json(tmp_path / "config.json", upstream_config("phi"))
    vocabulary = {letter: index for index, letter in enumerate("abc")} | {"ab": 3}
    write_json(tmp_path / "vocab.json", vocabulary)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    added = {str(number): {"content": text, "special": True} for number, text in ((4, "<|end|>"), (5, "<unk>"))}
    write_json(
        tmp_path / "tokenizer_config.json",
        {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": added, "unk_token": "<unk>"},
    )
    tokenizer = load_tokenizer(tmp_path, "phi3", MAX_LENGTH)
    assert tokenizer("abc<|end|>").input_ids == [3, 2, 4]


def test_converting_twice_changes_nothing(family, tmp_path):
    name, tokenizer = family
    _, model_type, rows, _, _ = FAMILIES[name]
    tokenizer.save_pretrained(tmp_path / "first")
    again = load_tokenizer(tmp_path / "first", model_type, MAX_LENGTH)
    add_marks(again, rows)
    again.save_pretrained(tmp_path / "second")
    first, second = (tmp_path / name / "tokenizer.json" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    assert again.special_tokens_map == tokenizer.special_tokens_map


def test_marks_that_upstream_added(tmp_path):
    """A tokenizer saved by the authors' training has the first two marks already."""
    folder = write_phi3_tokenizer(tmp_path)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["<vision_start>", "<vision_end>"])
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder, "phi3", MAX_LENGTH)
    add_marks(tokenizer, 32_013)
    assert tokenizer.convert_tokens_to_ids("<latent_image>") == 32_014


def test_tokenizer_of_another_model(tmp_path):
    tokenizer = load_tokenizer(write_phi3_tokenizer(tmp_path), "phi3", MAX_LENGTH)
    with pytest.raises(ConversionError, match=r"id of <vision_start> must be 32064 .*got 32011"):
        add_marks(tokenizer, 32_066)


def test_broken_tokenizers(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "evil"}}')
    with pytest.raises(ConversionError, match="is not a tokenizer"):
        load_tokenizer(tmp_path, "phi3", MAX_LENGTH)
    backend = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match=r"end-of-turn token .*<\|end\|>"):
        load_tokenizer(tmp_path, "llama", MAX_LENGTH)


def test_in_the_command(tmp_path, convert, caplog):
    """`--tokenizer` replaces, `none` leaves out, and a checkpoint without a tokenizer is warned about."""
    write_checkpoint(tmp_path / "checkpoint", vocab_size=32_013)
    without = convert()
    assert "No tokenizer was found" in caplog.text
    assert not list(without.glob("*tokenizer*")) and (without / "preprocessor_config.json").is_file()
    assert json.loads((without / "generation_config.json").read_text())["eos_token_id"] == [2, 32000, 32001, 32007]

    other = str(write_phi3_tokenizer(tmp_path / "tokenizer"))
    given = convert("--tokenizer", other, output="given")
    write_phi3_tokenizer(tmp_path / "checkpoint")
    found = convert(output="found")
    assert (given / "tokenizer.json").read_bytes() == (found / "tokenizer.json").read_bytes()
    assert (found / "chat_template.jinja").is_file() and (found / "processor_config.json").is_file()
    settings = json.loads((found / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [2, 32000, 32001, 32007] and settings["pad_token_id"] == 0
    assert json.loads((found / "tokenizer_config.json").read_text())["model_max_length"] == 512
    assert not list(convert("--tokenizer", "none", output="left out").glob("*tokenizer*"))
