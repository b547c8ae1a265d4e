"""Folders of tiny random models with the real tokenizer of each chat format, placeholders behind the vocabulary."""

import json
from pathlib import Path

import torch
from tests.helpers.tiny import tiny_config, tiny_model
from tests.helpers.tokenizers import write_llama3_tokenizer, write_phi3_tokenizer

from fusion_hf import FusionForConditionalGeneration, FusionProcessor
from fusion_hf.conversion.folder import make_processor, write_files
from fusion_hf.conversion.tokenizer import add_marks, load_tokenizer, vocabulary_size

FORMATS = ("phi3", "llama3", "chatml")
BACKBONES = {"phi3": "phi3", "llama3": "llama", "chatml": "qwen2"}
MAX_LENGTH = 1024
# in place of Qwen's: the same kind of byte-level BPE, with ChatML's tokens under their names
CHATML_NAMES = {"<|start_header_id|>": "<|im_start|>", "<|eot_id|>": "<|im_end|>", "<|end_header_id|>": "<|unused_0|>"}


def write_chat_model(folder: Path, chat_format: str) -> Path:
    """A folder as conversion writes it."""
    source = folder.parent / f"{folder.name}-tokenizer"
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
