"""Record layouts besides LLaVA's and chat messages, and the renames that would make an unknown layout readable."""

from collections.abc import Mapping
from typing import Any

from fusion_hf.common.errors import short_name

TURN_KEYS = ("conversations", "messages")
PAIRS_KEY = "texts"  # FineVision and the Cauldron: `{"user", "assistant"}` for each question
PROMPT, COMPLETION = "prompt", "completion"  # TRL: texts or lists of messages
LAYOUT_KEYS = (PAIRS_KEY, PROMPT, COMPLETION)
# the field names of lists whose objects have these keys
NAMES_OF_LISTS = {
    ("from", "value"): "conversations",
    ("role", "content"): "messages",
    ("user", "assistant"): PAIRS_KEY,
}
# field names of questions and answers in other data sets
QUESTIONS = (PROMPT, "question", "query", "instruction", "problem", "input")
ANSWERS = (COMPLETION, "answer", "response", "output", "solution", "target", "caption", "text", "label")
# field names of images in other data sets
IMAGES = ("img", "image_path", "image_file", "image_url", "img_path", "image_paths", "image_urls", "picture", "photo")
FILES = ("file_name", "filename", "file", "path", "url")  # these may also name files that are not images
IMAGE_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def with_known_turns(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """
    Convert `texts`, or `prompt` and `completion`, of a record to messages.

    Args:
        fields: the record.

    Returns:
        A record with `conversations` or `messages`, or the record itself if it has neither layout. Values of a wrong
        type are kept, and reported later.
    """
    if any(fields.get(key) is not None for key in TURN_KEYS):
        return fields
    messages: list[Any]
    if isinstance(pairs := fields.get(PAIRS_KEY), (list, tuple)):
        messages = [message for pair in pairs for message in _pair(pair)]
    elif fields.get(PROMPT) is not None and fields.get(COMPLETION) is not None:
        messages = [*_side(fields[PROMPT], "user"), *_side(fields[COMPLETION], "assistant")]
    else:
        return fields
    return {**fields, "messages": messages}


def _pair(pair: Any) -> list[Any]:
    if not isinstance(pair, Mapping):
        return [pair]
    return [{"role": role, "content": pair.get(role)} for role in ("user", "assistant")]


def _side(value: Any, role: str) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [{"role": role, "content": value}]


def has_turns(fields: Mapping[str, Any]) -> bool:
    """
    Return whether a record has a conversation in a known layout.

    Args:
        fields: the record.
    """
    known = with_known_turns(fields)
    return any(known.get(key) is not None for key in TURN_KEYS)


def describe_missing_turns(fields: Mapping[str, Any]) -> str:
    """
    Say that a record has no conversation, and which rename would give it one.

    Args:
        fields: the record.
    """
    renames = ", ".join(f"rename {short_name(old)!r} to {new!r}" for old, new in turn_renames(fields).items())
    advice = renames if renames else f"got {_listed(fields)}"
    return f"the record must have conversations, messages, texts, or prompt and completion; {advice}"


def turn_renames(fields: Mapping[str, Any]) -> dict[str, str]:
    """
    Find fields that would be a conversation under another name, judged by their values.

    Args:
        fields: the record.

    Returns:
        The new names by old name.
    """
    for key, value in fields.items():
        first = value[0] if isinstance(value, (list, tuple)) and value else None
        if key not in LAYOUT_KEYS and (known := name_of_list(first)) is not None:
            return {key: known}
    texts = [key for key, value in fields.items() if isinstance(value, str)]
    found = {PROMPT: _first(QUESTIONS, texts), COMPLETION: _first(ANSWERS, texts)}
    return {old: new for new, old in found.items() if old is not None and old != new}


def name_of_list(item: Any, present: str | None = None) -> str | None:
    """
    Return the field name of a list with such objects.

    Args:
        item: an object of the list.
        present: the current name, which is preferred if several names fit.
    """
    fitting = [name for keys, name in NAMES_OF_LISTS.items() if isinstance(item, Mapping) and set(keys) <= set(item)]
    return present if present in fitting else next(iter(fitting), None)


def image_rename(fields: Mapping[str, Any], image_key: str, is_certain: bool) -> str | None:
    """
    Find a rename that would give an image to a record without one.

    Args:
        fields: the record.
        image_key: the field that is read.
        is_certain: whether the record refers to an image, so that the name of a field is sufficient evidence.

    Returns:
        The advice, or None.
    """
    for key in (*IMAGES, *FILES):
        value = fields.get(key)
        first = value[0] if isinstance(value, (list, tuple)) and value else value
        is_file = isinstance(first, str) and first.partition("?")[0].lower().endswith(IMAGE_ENDINGS)
        if key != image_key and (is_file or (is_certain and key in IMAGES and first)):
            return f"rename {key!r} to {image_key!r}"
    return None


def _first(names: tuple[str, ...], keys: list[str]) -> str | None:
    return next((name for name in names if name in keys), None)


def _listed(fields: Mapping[str, Any]) -> str:
    return short_name(", ".join(map(str, fields))) if fields else "no field"
