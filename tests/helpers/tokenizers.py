"""The two tokenizers of the family, as folders that the tests read."""

import gzip
import json
import shutil
from functools import cache
from importlib.resources import files
from pathlib import Path

from tokenizers import processors
from transformers.convert_slow_tokenizer import TikTokenConverter

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tokenizers"
BEGIN = "<|begin_of_text|>"
LLAMA3_NAMED = (
    "<|begin_of_text|> <|end_of_text|> <|reserved_special_token_0|> <|reserved_special_token_1|> "
    "<|finetune_right_pad_id|> <|reserved_special_token_2|> <|start_header_id|> <|end_header_id|> <|eom_id|> "
    "<|eot_id|> <|python_tag|>"
).split()
NUM_LLAMA3_SPECIAL = 256


def write_phi3_tokenizer(folder: Path) -> Path:
    """Phi-3's tokenizer in its published fast form (32,011 tokens)."""
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(FIXTURES / "phi-3" / "tokenizer.json.gz") as packed:
        (folder / "tokenizer.json").write_bytes(packed.read())
    shutil.copyfile(FIXTURES / "phi-3" / "tokenizer_config.json", folder / "tokenizer_config.json")
    return folder


@cache
def _llama3_state() -> str:
    """Llama 3.1's tokenizer (128,256 tokens), from the dependency `llama-models`; its licence forbids to ship it."""
    reserved = (f"<|reserved_special_token_{i}|>" for i in range(3, NUM_LLAMA3_SPECIAL))
    special = [*LLAMA3_NAMED, *reserved][:NUM_LLAMA3_SPECIAL]
    vocabulary = files("llama_models") / "llama3" / "tokenizer.model"
    backend = TikTokenConverter(vocab_file=str(vocabulary), extra_special_tokens=special).converted()
    template = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, backend.token_to_id(BEGIN))]
    )
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return backend.to_str()


def write_llama3_tokenizer(folder: Path) -> Path:
    """Llama 3.1's tokenizer as its repository has it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(_llama3_state(), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": "<|eot_id|>",
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
