"""The checkpoint's tokenizer with FUSION's four marks, giving the ids that the authors' training saw.

Phi-3's is a sentencepiece model, which the authors read with transformers' slow class: white space becomes `▁`, and
one `▁` is put before the very beginning of a text, none behind special tokens. Its published fast form puts a `▁`
behind every special token, so that form is rewritten here.
"""

import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fusion_hf.conversion.inputs import InputLocation
from fusion_hf.conversion.model_files import ConversionError, first_line, read_json
from fusion_hf.hub.folders import CONFIG
from fusion_hf.model.chat_fusion import CHAT_FORMATS, VISION_MARKS

logger = logging.getLogger(__name__)

MARKS = VISION_MARKS  # in the order of their ids
TOKENIZER_SUFFIXES = (".json", ".model", ".txt")
NUM_PLACEHOLDERS = 2  # <image> and <latent_image> have an id but no row in the embedding
SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
WHITE_SPACE = "\u2581"
METASPACE = {"type": "Metaspace", "replacement": WHITE_SPACE, "prepend_scheme": "first", "split": False}
# What the authors pad with, by chat format.
PAD_TOKENS = {"phi3": "<unk>", "llama3": "<|reserved_special_token_0|>"}


def choose_tokenizer(
    found: InputLocation | None, model_type: str, model_max_length: int
) -> PreTrainedTokenizerFast | None:
    """Choose the tokenizer in a folder, without the marks; or none, with a warning.

    Args:
        found: holds it, see `inputs.find_tokenizer`.
        model_type, model_max_length: see [`load_tokenizer`].

    Raises:
        ConversionError: if it is none that FUSION can use.
    """
    if found is None:
        logger.warning("No tokenizer is written: the result cannot answer questions by itself (see --tokenizer).")
        return None
    return load_tokenizer(found.path, model_type, model_max_length)


def load_tokenizer(folder: Path, model_type: str, model_max_length: int) -> PreTrainedTokenizerFast:
    """Load a folder's tokenizer, rewritten to give the authors' ids; without the marks.

    Args:
        folder: holds `tokenizer.json`, or files that transformers converts.
        model_type: of the language model. Phi-3's begins texts without BOS.
        model_max_length: the longest sequence, in tokens.

    Raises:
        ConversionError: if the files cannot be read.
    """
    state, roles = _read(folder)
    if _is_sentencepiece(state):
        state["normalizer"], state["pre_tokenizer"] = None, METASPACE
    if model_type == "phi3":
        state["post_processor"] = None
    backend = _build(json.dumps(state), folder)
    known = {role: token for role, token in roles.items() if token and backend.token_to_id(token) is not None}
    pad = PAD_TOKENS.get(find_chat_format(backend))
    if pad is None or backend.token_to_id(pad) is None:
        pad = known.get("pad_token") or known.get("unk_token") or known.get("eos_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **known | {"pad_token": pad},
        padding_side="left",
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def find_chat_format(backend: Tokenizer) -> str:
    """Find the chat format whose end of turn the tokenizer knows, a key of `CHAT_FORMATS`.

    Raises:
        ConversionError: if it knows none.
    """
    for name, chat_format in CHAT_FORMATS.items():
        if backend.token_to_id(chat_format.turn_end) is not None:
            return name
    known = ", ".join(chat_format.turn_end for chat_format in CHAT_FORMATS.values())
    raise ConversionError(
        f"The tokenizer knows no end of turn of FUSION's chat formats ({known}): use a chat model's."
    )


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return one more than the largest id."""
    return max(tokenizer.get_vocab().values()) + 1


def add_marks(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    """Add those of the four marks that are missing, as special tokens.

    Args:
        tokenizer: is changed.
        vocab_size: rows of the embedding. The last two are `<vision_start>` and `<vision_end>`; `<image>` and
            `<latent_image>` have the two ids behind them.

    Raises:
        ConversionError: if a mark's id comes out wrong; names both ids.
    """
    size = vocabulary_size(tokenizer)
    special = [AddedToken(mark, special=True, normalized=False) for mark in MARKS]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    first = vocab_size - (len(MARKS) - NUM_PLACEHOLDERS)
    for expected, mark in enumerate(MARKS, start=first):
        found = tokenizer.convert_tokens_to_ids(mark)
        if found != expected:
            raise ConversionError(
                f"The tokenizer's {mark} has id {found}, but the embedding's {vocab_size} rows need id {expected}: "
                f"the tokenizer, of {size} tokens, is another model's."
            )


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, str | None]]:
    """The tokenizer as the JSON of its fast form, and the texts of its special tokens."""
    if (folder / "tokenizer.json").is_file():
        state = read_json(folder / "tokenizer.json")
        config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        return state, {role: _content(config.get(role)) for role in SPECIAL_ROLES}
    try:
        # without the checkpoint's configuration, whose type transformers does not know, and we take for a FUSION's
        with tempfile.TemporaryDirectory() as alone:
            for file in folder.iterdir():
                if file.suffix in TOKENIZER_SUFFIXES and file.name != CONFIG:
                    shutil.copyfile(file, Path(alone) / file.name)
            tokenizer = AutoTokenizer.from_pretrained(alone, trust_remote_code=False)
        state = json.loads(tokenizer.backend_tokenizer.to_str())
    except (OSError, ValueError, ImportError, AttributeError, KeyError, TypeError) as error:
        raise ConversionError(
            f"The tokenizer in {folder} cannot be read: {first_line(error)}. A tokenizer.model needs the packages "
            "sentencepiece and protobuf; or give a folder with a tokenizer.json as --tokenizer."
        ) from error
    return state, {role: tokenizer.special_tokens_map.get(role) for role in SPECIAL_ROLES}


def _content(token: object) -> str | None:
    """The text of a special token, which may be written as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _is_sentencepiece(state: dict[str, Any]) -> bool:
    """Whether white space is written as `▁`, by a normalizer that prepends or by a pre-tokenizer."""
    steps: list[dict[str, Any]] = []
    for part in ("normalizer", "pre_tokenizer"):
        step = state.get(part)
        if isinstance(step, dict):
            steps.append(step)
            steps.extend(step.get("normalizers") or step.get("pretokenizers") or [])
    return any(step.get("type") == "Metaspace" or step.get("prepend") == WHITE_SPACE for step in steps)


def _build(text: str, folder: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more specific
        raise ConversionError(f"{folder / 'tokenizer.json'} is no tokenizer: {first_line(error)}.") from error
