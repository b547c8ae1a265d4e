"""Folders of tiny random models with the real tokenizer of each chat format, placeholders behind the vocabulary."""

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.helpers.tiny import tiny_config, tiny_model
from tests.helpers.tokenizers import write_llama3_tokenizer, write_phi3_tokenizer

from fusion_hf import FusionForConditionalGeneration, FusionProcessor, nano_path
from fusion_hf.conversion.marked_tokenizer import add_marks, load_tokenizer, vocabulary_size
from fusion_hf.conversion.model_folder import make_processor, write_files

FORMATS = ("phi3", "llama3", "chatml")
BACKBONES = {"phi3": "phi3", "llama3": "llama", "chatml": "qwen2"}
MODELS = (*FORMATS, "nano")
# for fixtures: ChatML is fusion-nano's format as well, and the vocabulary of this stand-in is Llama 3's
SLOW_CHATML = pytest.param("chatml", marks=pytest.mark.slow)
FORMAT_PARAMETERS = tuple(SLOW_CHATML if name == "chatml" else name for name in FORMATS)
MODEL_PARAMETERS = (*FORMAT_PARAMETERS, "nano")
# where the vocabulary is not the subject: Llama 3's takes seconds to read
SLOW_LLAMA3 = pytest.param("llama3", marks=pytest.mark.slow)
SMALL_PARAMETERS = ("phi3", SLOW_LLAMA3, SLOW_CHATML, "nano")
MAX_LENGTH = 1024
IMAGE = Image.new("RGB", (40, 30), "red")
# what a caller may lose, and the model finds in the ids
TURNS = ("prompt_end_positions", "instruct_input_ids", "instruct_attention_mask")
# in place of Qwen's: the same kind of byte-level BPE, with ChatML's tokens under their names
CHATML_NAMES = {"<|start_header_id|>": "<|im_start|>", "<|eot_id|>": "<|im_end|>", "<|end_header_id|>": "<|unused_0|>"}


def write_chat_model(folder: Path, chat_format: str) -> Path:
    """A folder as conversion writes it; a copy, since reading a real vocabulary takes seconds."""
    return shutil.copytree(_built(chat_format), folder)


@cache
def _built(chat_format: str) -> Path:
    """The same, once in a process."""
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    source, folder = root / "tokenizer", root / "model"
    if chat_format == "phi3":
        write_phi3_tokenizer(source)
    else:
        write_llama3_tokenizer(source)
    if chat_format == "chatml":
        for file in ("tokenizer.json", "tokenizer_config.json"):
            text = (source / file).read_text(encoding="utf-8")
            for old, new in CHATML_NAMES.items():
                text = text.replace(json.dumps(old), json.dumps(new))
            (source / file).write_text(text, encoding="utf-8")
    backbone = BACKBONES[chat_format]
    tokenizer = load_tokenizer(source, backbone, MAX_LENGTH)
    rows = vocabulary_size(tokenizer) + 2  # <vision_start> and <vision_end> have a row, the placeholders have none
    add_marks(tokenizer, rows)
    config = tiny_config(
        backbone, text={"vocab_size": rows, "max_position_embeddings": MAX_LENGTH}, query_lens=[1, 4, 16]
    )
    processor = make_processor(config, tokenizer)
    model = tiny_model(config, scale=2.0)
    write_files(folder, config, processor, model.generation_config, card="")
    model.save_pretrained(folder)
    return folder


def load_chat_model(folder: Path) -> tuple[FusionForConditionalGeneration, FusionProcessor]:
    """The model and the processor in a folder."""
    model = FusionForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model, FusionProcessor.from_pretrained(folder)


def make_chat_model(name: str, folder: Path) -> tuple[FusionForConditionalGeneration, FusionProcessor]:
    """One of `MODELS`, in a folder of its own unless it is fusion-nano."""
    return load_chat_model(Path(nano_path()) if name == "nano" else write_chat_model(folder / "model", name))


def chat(*texts: str, image: Image.Image | None = IMAGE, system: str | None = None) -> list[dict[str, Any]]:
    """Questions and answers in turn; the image is in the first question."""
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    for number, text in enumerate(texts):
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if number == 0 and image is not None:
            content.insert(0, {"type": "image", "image": image})
        messages.append({"role": "assistant" if number % 2 else "user", "content": content})
    return messages


def encode(processor: FusionProcessor, messages: Any, **options: Any) -> dict[str, Any]:
    """What the processor gives for messages, or for a list of conversations."""
    options = {"add_generation_prompt": True, "return_tensors": "pt"} | options
    return dict(processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options))


def bare(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs without what the model finds in the ids."""
    return {name: value for name, value in inputs.items() if name not in TURNS}
