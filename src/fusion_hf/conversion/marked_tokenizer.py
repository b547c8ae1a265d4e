"""The tokenizer of a checkpoint with FUSION's four special tokens, which gives the same ids as the authors' training.

Phi-3's tokenizer is a sentencepiece model, which the authors read with the slow class of transformers. White space
becomes `▁`, and one `▁` is put before the beginning of a text, but none behind special tokens. The published fast form
puts a `▁` behind every special token, so it is rewritten here.
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
NUM_PLACEHOLDERS = 2  # <image> and <latent_image> have ids, but no rows in the embedding
SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
WHITE_SPACE = "\u2581"
METASPACE = {"type": "Metaspace", "replacement": WHITE_SPACE, "prepend_scheme": "first", "split": False}
# Padding tokens of the authors, by chat format.
PAD_TOKENS = {"phi3": "<unk>", "llama3": "<|reserved_special_token_0|>"}


def choose_tokenizer(
    found: InputLocation | None, model_type: str, model_max_length: int
) -> PreTrainedTokenizerFast | None:
    """
    Load the tokenizer in a folder, without FUSION's tokens. Without a tokenizer, log a warning.

    Args:
        found: Folder of the tokenizer, see `inputs.find_tokenizer`.
        model_type, model_max_length: See [`load_tokenizer`].

    Returns:
        The tokenizer, or None.

    Raises:
        ConversionError: If FUSION cannot use the tokenizer.
    """
    if found is None:
        logger.warning("No tokenizer was found, so the result cannot answer questions on its own. See --tokenizer.")
        return None
    return load_tokenizer(found.path, model_type, model_max_length)


def load_tokenizer(folder: Path, model_type: str, model_max_length: int) -> PreTrainedTokenizerFast:
    """
    Load the tokenizer in a folder, rewritten to give the authors' ids, without FUSION's tokens.

    Args:
        folder: Folder with `tokenizer.json`, or with files that transformers converts.
        model_type: Model type of the language model. Phi-3 starts texts without BOS.
        model_max_length: Maximum number of tokens of a sequence.

    Returns:
        The tokenizer.

    Raises:
        ConversionError: If the files cannot be read.
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
    """
    Find the chat format whose end-of-turn token a tokenizer knows.

    Args:
        backend: The tokenizer.

    Returns:
        A key of `CHAT_FORMATS`.

    Raises:
        ConversionError: If the tokenizer knows none of these tokens.
    """
    for name, chat_format in CHAT_FORMATS.items():
        if backend.token_to_id(chat_format.turn_end) is not None:
            return name
    known = ", ".join(chat_format.turn_end for chat_format in CHAT_FORMATS.values())
    raise ConversionError(
        f"The tokenizer must know an end-of-turn token of FUSION's chat formats ({known}). "
        "Use the tokenizer of a chat model."
    )


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the size of the vocabulary, one more than the largest id."""
    return max(tokenizer.get_vocab().values()) + 1


def add_marks(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    """
    Add FUSION's special tokens to a tokenizer, except those that it already has.

    Args:
        tokenizer: The tokenizer, which is changed.
        vocab_size: Number of rows of the embedding. The last two rows are `<vision_start>` and `<vision_end>`. The ids
            of `<image>` and `<latent_image>` follow them.

    Raises:
        ConversionError: If a token gets a wrong id. The message names both ids.
    """
    size = vocabulary_size(tokenizer)
    special = [AddedToken(mark, special=True, normalized=False) for mark in MARKS]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    first = vocab_size - (len(MARKS) - NUM_PLACEHOLDERS)
    for expected, mark in enumerate(MARKS, start=first):
        found = tokenizer.convert_tokens_to_ids(mark)
        if found != expected:
            raise ConversionError(
                f"The id of {mark} must be {expected} for an embedding with {vocab_size} rows, got {found}. The "
                f"tokenizer, with {size} tokens, belongs to another model."
            )


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, str | None]]:
    """Read a tokenizer as the JSON of its fast form, and the texts of its special tokens."""
    if (folder / "tokenizer.json").is_file():
        state = read_json(folder / "tokenizer.json")
        config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        return state, {role: _content(config.get(role)) for role in SPECIAL_ROLES}
    try:
        # without the checkpoint's configuration, whose type transformers does not know, and which we treat as FUSION's
        with tempfile.TemporaryDirectory() as alone:
            for file in folder.iterdir():
                if file.suffix in TOKENIZER_SUFFIXES and file.name != CONFIG:
                    shutil.copyfile(file, Path(alone) / file.name)
            tokenizer = AutoTokenizer.from_pretrained(alone, trust_remote_code=False)
        state = json.loads(tokenizer.backend_tokenizer.to_str())
    except (OSError, ValueError, ImportError, AttributeError, KeyError, TypeError) as error:
        raise ConversionError(
            f"The tokenizer in {folder} cannot be read: {first_line(error)}. For a tokenizer.model, run `pip install "
            "'fusion_hf[convert]'`. Or pass a folder with a tokenizer.json as --tokenizer."
        ) from error
    return state, {role: tokenizer.special_tokens_map.get(role) for role in SPECIAL_ROLES}


def _content(token: object) -> str | None:
    """Return the text of a special token, which may be stored as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _is_sentencepiece(state: dict[str, Any]) -> bool:
    """Return whether a normalizer or a pre-tokenizer writes white space as `▁`."""
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
        raise ConversionError(f"{folder / 'tokenizer.json'} is not a tokenizer: {first_line(error)}.") from error
