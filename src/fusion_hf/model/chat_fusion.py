"""Chats as FUSION's backbones read them: chat formats, templates, what messages may hold.

Source of the sequence: FUSION, arXiv 2504.09925, and its authors' code.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

ROLES = ("system", "user", "assistant")
IMAGE_TOKEN, LATENT_TOKEN, VISION_START, VISION_END = "<image>", "<latent_image>", "<vision_start>", "<vision_end>"
VISION_MARKS = (VISION_START, VISION_END, IMAGE_TOKEN, LATENT_TOKEN)
BETWEEN_BLOCKS = 2  # most tokens between two blocks of one turn: <vision_end> and <vision_start>
CONTROL_TOKEN = re.compile(r"<\|.*\|>", re.DOTALL)  # how they look where a backbone's are not called special
# A record's further marks of its one image. The authors' code writes a block for each message with a mark.
REPEATED = "repeated"
MARKS = re.compile(f"{IMAGE_TOKEN}|(?:{LATENT_TOKEN})+")
VISION_BLOCKS = re.compile(f"{VISION_START}(?:{IMAGE_TOKEN}|(?:{LATENT_TOKEN})*){VISION_END}|{MARKS.pattern}")
# A code point that Unicode never assigns, put into text that looks like a special token so that it stays text.
BREAK = "\ufdd0"

PHI3_SYSTEM = "You are a helpful AI assistant."
LLAMA3_SYSTEM = (
    "You are a helpful, highly intelligent language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural language. Whenever an "
    "image is present in the conversation, very carefully examine it and consider its content when formulating your "
    "response."
)


@dataclass(frozen=True)
class ChatFormat:
    """How a family of backbones writes a conversation."""

    system_header: str
    user_header: str
    assistant_header: str
    turn_end: str  # the last token that the assistant must learn to write
    separator: str  # between messages, after `turn_end`
    system: str  # what FUSION says where the messages have no system message
    # put before a text that begins with a special token: the dummy prefix of the authors' slow Llama tokenizer
    prompt_prefix: str = ""

    @property
    def tokens(self) -> set[str]:
        """The tokens that open and close a message, such as `<|user|>`."""
        parts = (self.system_header, self.user_header, self.assistant_header, self.turn_end)
        return {token for part in parts for token in re.findall(r"<[^<>]+>", part)}

    @property
    def before_answer(self) -> str:
        """What an answer alone is tokenized behind: a special token, after which Phi-3's swallows blanks."""
        header = self.assistant_header.rstrip()
        return header if header.endswith("|>") else VISION_END

    def begins_with_answer(self, text: str) -> bool:
        """Return whether a text begins with an answer and its end, as completions that trainers tokenize alone do."""
        begin, end, _ = text.partition(self.turn_end)
        headers = (self.system_header, self.user_header, self.assistant_header)
        return bool(end) and not MARKS.search(begin) and not any(header in begin for header in headers)

    def write_template(self, query_len: int, begin: str = "") -> str:
        """
        Write the Jinja template.

        Args:
            query_len (`int`): number of latent tokens per turn where a call names none.
            begin (`str`): the token that the tokenizer puts before a text, since trainers tell it not to.
        """
        parts = {name: getattr(self, name).replace("\n", "\\n") for name in self.__dataclass_fields__}
        return _TEMPLATE.format(query_len=query_len, begin=f"{{{{- '{begin}' -}}}}\n" if begin else "", **parts)


_TEMPLATE = """\
{begin}{{%- set query_len = query_len | default({query_len}) -%}}
{{%- set latents = '<vision_start>' + '<latent_image>' * query_len + '<vision_end>' -%}}
{{%- set conversation = namespace(block=latents) -%}}
{{%- for message in messages if message['role'] == 'user' and message['content'] is not string -%}}
{{%- if message['content'] | default([], true) | selectattr('type', 'in', ['image', 'image_url']) | list -%}}
{{%- set conversation.block = '<vision_start><image><vision_end>' -%}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- if messages[0]['role'] != 'system' -%}}
{{{{- '{system_header}{system}{turn_end}{separator}' -}}}}
{{%- endif -%}}
{{%- for message in messages -%}}
{{%- set image = false -%}}
{{%- set text = message['content'] or '' -%}}
{{%- if text is not string -%}}
{{%- set image = text | selectattr('type', 'in', ['image', 'image_url']) | list | length > 0 -%}}
{{%- set text = text | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}}
{{%- endif -%}}
{{%- if message['role'] == 'system' -%}}
{{{{- '{system_header}' + text + '{turn_end}{separator}' -}}}}
{{%- elif message['role'] == 'user' -%}}
{{{{- '{user_header}' + conversation.block -}}}}
{{%- set conversation.block = latents -%}}
{{%- if image -%}}
{{%- set text = text | trim -%}}
{{{{- latents + ('\\n' if text else '') -}}}}
{{%- endif -%}}
{{{{- text + '{turn_end}{separator}' -}}}}
{{%- elif message['role'] == 'assistant' -%}}
{{{{- '{assistant_header}' -}}}}
{{%- generation -%}}
{{{{- text + '{turn_end}' -}}}}
{{%- endgeneration -%}}
{{{{- '{separator}' -}}}}
{{%- else -%}}
{{%- set place = 'messages[' ~ loop.index0 ~ '].role' -%}}
{{{{- raise_exception(place ~ ' must be system, user or assistant, got ' ~ message['role'] ~ '.') -}}}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- '{assistant_header}' -}}}}{{%- endif -%}}
"""

CHAT_FORMATS = {
    "phi3": ChatFormat(
        system_header="<|system|>\n",
        user_header="<|user|>\n",
        assistant_header="<|assistant|>\n",
        turn_end="<|end|>",
        separator="\n",
        system=PHI3_SYSTEM,
        prompt_prefix=" ",
    ),
    "llama3": ChatFormat(
        system_header="<|start_header_id|>system<|end_header_id|>\n\n",
        user_header="<|start_header_id|>user<|end_header_id|>\n\n",
        assistant_header="<|start_header_id|>assistant<|end_header_id|>\n\n",
        turn_end="<|eot_id|>",
        separator="",
        system=LLAMA3_SYSTEM,
    ),
    "chatml": ChatFormat(
        system_header="<|im_start|>system\n",
        user_header="<|im_start|>user\n",
        assistant_header="<|im_start|>assistant\n",
        turn_end="<|im_end|>",
        separator="\n",
        system=LLAMA3_SYSTEM,
    ),
}


def check_messages(messages: Any, where: str = "") -> None:
    """
    Check the form of one conversation.

    Args:
        messages: of the conversation.
        where (`str`): in front of a message's name in errors, to tell the conversations of a batch apart.

    Raises:
        ValueError: names the message and the block that FUSION cannot read.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}messages must be a list of messages, got {messages!r}.")
    begins = 0
    for number, message in enumerate(messages):
        name = f"{where}messages[{number}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise ValueError(f"{name} must have a role of {', '.join(map(repr, ROLES))}, got {role!r}.")
        if number == 0 and role == "system":
            begins = 1
            expected = role
        else:
            expected = ("user", "assistant")[(number - begins) % 2]
        if role != expected:
            raise ValueError(f"{name}.role must be {expected!r}, since users and assistants take turns, got {role!r}.")
        _check_content(name, role, message.get("content"))


def _check_content(name: str, role: str, content: Any) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise ValueError(f"{name}.content must be a string or a list of blocks, got {type(content).__name__}.")
    allowed = ("text", "image", "image_url") if role == "user" else ("text",)
    for number, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind not in allowed:
            raise ValueError(
                f"{name}.content[{number}] must have a type of {', '.join(map(repr, allowed))} in a message of "
                f"the role {role!r}, got {kind!r}."
            )
        if kind == "text" and not isinstance(block.get("text"), str):
            raise ValueError(f"{name}.content[{number}].text must be a string, got {block.get('text')!r}.")
        if kind == "image_url" and not isinstance(address_of(block), str):
            raise ValueError(f"{name}.content[{number}].image_url must be an address, got {block.get('image_url')!r}.")


def address_of(block: dict[str, Any]) -> Any:
    """Return the address in OpenAI's `image_url` block."""
    url = block.get("image_url")
    return url.get("url") if isinstance(url, dict) else url


def require_question(messages: list[dict[str, Any]], where: str = "") -> None:
    """
    Check that a conversation that is to be answered ends with a question.

    Args:
        messages: see [`check_messages`], and `where` as well.

    Raises:
        ValueError: names its last message.
    """
    last = messages[-1]["role"]
    if last != "user":
        raise ValueError(
            f"{where}messages[{len(messages) - 1}].role must be 'user' with `add_generation_prompt=True`, "
            f"got {last!r}."
        )


def derive_chat_format(tokenizer: Any) -> str:
    """
    Find the chat format whose tokens a tokenizer knows.

    Returns:
        A key of `CHAT_FORMATS`.

    Raises:
        ValueError: if it knows those of no format, or of several.
    """
    vocabulary = tokenizer.get_vocab()
    known = [name for name, chat_format in CHAT_FORMATS.items() if chat_format.tokens <= vocabulary.keys()]
    if len(known) != 1:
        found = " and of ".join(map(repr, known)) if known else "no format"
        raise ValueError(
            f"`chat_format` is missing, and the tokenizer knows the tokens of {found}. Pass one of "
            f"{', '.join(map(repr, CHAT_FORMATS))}."
        )
    return known[0]


def check_tokenizer(tokenizer: Any, chat_format: str) -> None:
    """
    Check that a tokenizer knows what ends a turn, and FUSION's four marks.

    Raises:
        ValueError: names the token that it does not know.
    """
    vocabulary = tokenizer.get_vocab()
    if CHAT_FORMATS[chat_format].turn_end not in vocabulary:
        raise ValueError(
            f"The tokenizer has no token {CHAT_FORMATS[chat_format].turn_end!r}, which ends a turn of the chat format "
            f"{chat_format!r}."
        )
    for mark in VISION_MARKS:
        if mark not in vocabulary:
            raise ValueError(f"The tokenizer has no token {mark!r}. Use the one in a FUSION model's folder.")


def find_control_tokens(tokenizer: Any, sanitize: bool = False) -> set[str]:
    """
    Find the tokens that a text may not write: FUSION's marks, those of the chat formats and of the backbone.

    Tokens that a user added, such as `<loc_1>`, are none of them: those behind the marks, which conversion adds last,
    and before them those that are not special.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`]): with its added tokens.
        sanitize (`bool`): all special tokens as well, whoever added them.
    """
    added = tokenizer.added_tokens_decoder
    names = {*VISION_MARKS, *(token for chat_format in CHAT_FORMATS.values() for token in chat_format.tokens)}
    names.update(str(token) for token in tokenizer.special_tokens_map.values() if not isinstance(token, list))
    marks = [number for number, token in added.items() if token.content in VISION_MARKS]
    first_mark = min(marks, default=len(tokenizer))
    found = set()
    for number, token in added.items():
        is_backbones = number < first_mark and (token.special or CONTROL_TOKEN.fullmatch(token.content))
        if token.content in names or is_backbones or (sanitize and token.special):
            found.add(token.content)
    return {content for content in found if len(content) > 1}


class TextProtector:
    """
    Breaks up what a tokenizer would read as a control token, see [`find_control_tokens`], so that it stays text.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`]): with its added tokens, which are read once.
        sanitize (`bool`): protect all special tokens, whoever added them.
    """

    def __init__(self, tokenizer: Any, sanitize: bool = False):
        ordered = sorted(find_control_tokens(tokenizer, sanitize), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")

    def protect(self, text: str) -> str:
        """Break up the control tokens of a text that a user wrote."""
        return self.break_up(text.replace(BREAK, ""))

    def break_up(self, text: str) -> str:
        """Break up the control tokens of a text that may be protected already."""
        while self.pattern.search(text):
            text = self.pattern.sub(lambda match: match[0][0] + BREAK + match[0][1:], text)
        return text

    def protect_all(self, value: Any) -> Any:
        """Protect each text in (nested) lists and dicts; everything else stays as it is."""
        if isinstance(value, str):
            return self.protect(value)
        if isinstance(value, dict):
            return {name: self.protect_all(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self.protect_all(item) for item in value]
        return value


def as_dicts(message: Any) -> Any:
    """
    Turn a chat message, and the blocks in it, into dicts; images stay as they are.

    Since 5.24 transformers takes dataclasses and pydantic models, such as the messages of the OpenAI package. As
    there, a message's fields that are None are left out.
    """
    if isinstance(message, (list, tuple)):
        return [as_dicts(item) for item in message]
    if callable(getattr(message, "model_dump", None)):
        message = message.model_dump()
    elif is_dataclass(message) and not isinstance(message, type):
        # not `dataclasses.asdict`, which would copy images
        message = {field.name: getattr(message, field.name) for field in fields(message)}
    if not isinstance(message, Mapping):
        return message
    return {name: as_dicts(value) for name, value in message.items() if value is not None}


def prepare_messages(messages: Any, protector: TextProtector, where: str, keep_images: bool) -> list[dict[str, Any]]:
    """
    Copy the messages of one conversation as lists of blocks, as the chat templates take them.

    Args:
        messages: see [`check_messages`], and `where` as well.
        protector ([`TextProtector`]): for all texts that users wrote.
        keep_images (`bool`): False leaves a block that only says where an image is.

    Returns:
        Each message with one text, behind the image of its message.

    Raises:
        ValueError: see [`check_messages`]; and for several images.
    """
    prepared, num_images = [], 0
    messages = as_dicts(messages)
    check_messages(messages, where)
    for message in messages:
        content = message["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        images = [_as_image_block(block) for block in blocks if block["type"] != "text"]
        num_images += sum(not image.get(REPEATED) for image in images)
        if not keep_images:
            images = [{"type": "image"} for _ in images]
        # joined before they are protected: two blocks could hold the halves of a mark
        text = "".join(block["text"] for block in blocks if block["type"] == "text")
        text = protector.protect(text.strip() if images else text)
        others = {name: value for name, value in message.items() if name not in ("role", "content")}
        others = protector.protect_all(others)
        prepared.append({"role": message["role"], **others, "content": [*images, {"type": "text", "text": text}]})
    if num_images > 1:
        raise ValueError(f"{where}messages has {num_images} images; FUSION reads 1.")
    return prepared


def join_questions(messages: list[dict[str, Any]]) -> str:
    """Return what a conversation asks, of prepared messages."""
    return "".join(message["content"][-1]["text"].strip() for message in messages if message["role"] == "user")


def _as_image_block(block: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's `image_url` block, and one of datasets with `bytes` and `path`, as the ecosystem's `image` block."""
    if block["type"] == "image_url":
        return {"type": "image", "url": address_of(block)}
    return {"type": "image", "image": block["bytes"]} if block.get("bytes") is not None else block
