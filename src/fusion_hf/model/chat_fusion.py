"""Chat formats of FUSION's backbones, their templates, and checks of messages.

Source of the sequence: FUSION, arXiv 2504.09925, and its authors' code.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

ROLES = ("system", "user", "assistant")
IMAGE_TOKEN, LATENT_TOKEN, VISION_START, VISION_END = "<image>", "<latent_image>", "<vision_start>", "<vision_end>"
VISION_MARKS = (VISION_START, VISION_END, IMAGE_TOKEN, LATENT_TOKEN)
BETWEEN_BLOCKS = 2  # maximum number of tokens between two blocks of one turn: <vision_end> and <vision_start>
CONTROL_TOKEN = re.compile(r"<\|.*\|>", re.DOTALL)  # control tokens that a backbone does not mark as special
# Marks further mentions of a record's only image. The authors' code writes a block for each message with a mark.
REPEATED = "repeated"
MARKS = re.compile(f"{IMAGE_TOKEN}|(?:{LATENT_TOKEN})+")
VISION_BLOCKS = re.compile(f"{VISION_START}(?:{IMAGE_TOKEN}|(?:{LATENT_TOKEN})*){VISION_END}|{MARKS.pattern}")
# A code point that Unicode never assigns. Inserted into text that looks like a special token, it keeps it plain text.
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
    """How a family of backbones formats a conversation."""

    system_header: str
    user_header: str
    assistant_header: str
    turn_end: str  # the last token that the assistant must learn to generate
    separator: str  # between messages, after `turn_end`
    system: str  # system message of FUSION for conversations without one
    # Put before a text that begins with a special token: the dummy prefix of the authors' slow Llama tokenizer.
    prompt_prefix: str = ""

    @property
    def tokens(self) -> set[str]:
        """The tokens that open and close a message, such as `<|user|>`."""
        parts = (self.system_header, self.user_header, self.assistant_header, self.turn_end)
        return {token for part in parts for token in re.findall(r"<[^<>]+>", part)}

    @property
    def before_answer(self) -> str:
        """The text before which a standalone answer is tokenized: a special token, after which Phi-3 drops blanks."""
        header = self.assistant_header.rstrip()
        return header if header.endswith("|>") else VISION_END

    def begins_with_answer(self, text: str) -> bool:
        """Return whether a text begins with an answer and its end, like completions that trainers tokenize alone."""
        begin, end, _ = text.partition(self.turn_end)
        headers = (self.system_header, self.user_header, self.assistant_header)
        return bool(end) and not MARKS.search(begin) and not any(header in begin for header in headers)

    def write_template(self, query_len: int, begin: str = "") -> str:
        """
        Write the Jinja template of this chat format.

        Args:
            query_len (`int`): Number of latent tokens per turn for calls that do not pass their own.
            begin (`str`): The token that the tokenizer puts before a text, since trainers disable it.

        Returns:
            `str`: The template.
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
    Check the structure of one conversation.

    Args:
        messages (`list[dict]`): Messages with a `role` and a `content`.
        where (`str`): Prefix for the names of messages in errors, which tells the conversations of a batch apart.

    Raises:
        ValueError: If FUSION cannot read a message. The error names the message and the block.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"`{where}messages` must be a list of at least one message, got {messages!r}.")
    begins = 0
    for number, message in enumerate(messages):
        name = f"{where}messages[{number}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise ValueError(f"`{name}.role` must be one of {', '.join(map(repr, ROLES))}, got {role!r}.")
        if number == 0 and role == "system":
            begins = 1
            expected = role
        else:
            expected = ("user", "assistant")[(number - begins) % 2]
        if role != expected:
            raise ValueError(
                f"`{name}.role` must be {expected!r} because users and assistants alternate, got {role!r}."
            )
        _check_content(name, role, message.get("content"))


def _check_content(name: str, role: str, content: Any) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise ValueError(f"`{name}.content` must be a string or a list of blocks, got {type(content).__name__}.")
    allowed = ("text", "image", "image_url") if role == "user" else ("text",)
    for number, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind not in allowed:
            raise ValueError(
                f"`{name}.content[{number}].type` must be one of {', '.join(map(repr, allowed))} in a message with "
                f"the role {role!r}, got {kind!r}."
            )
        if kind == "text" and not isinstance(block.get("text"), str):
            raise ValueError(f"`{name}.content[{number}].text` must be a string, got {block.get('text')!r}.")
        if kind == "image_url" and not isinstance(address_of(block), str):
            raise ValueError(f"`{name}.content[{number}].image_url` must be a URL, got {block.get('image_url')!r}.")


def address_of(block: dict[str, Any]) -> Any:
    """Return the URL in an `image_url` block of the OpenAI API."""
    url = block.get("image_url")
    return url.get("url") if isinstance(url, dict) else url


def require_question(messages: list[dict[str, Any]], where: str = "") -> None:
    """
    Check that a conversation ends with a user message, so that the model can answer it.

    Args:
        messages (`list[dict]`): Checked messages, see [`check_messages`].
        where (`str`): Prefix for the names of messages in errors.

    Raises:
        ValueError: If the last message is not a user message.
    """
    last = messages[-1]["role"]
    if last != "user":
        raise ValueError(
            f"`{where}messages[{len(messages) - 1}].role` must be 'user' with `add_generation_prompt=True`, "
            f"got {last!r}."
        )


def derive_chat_format(tokenizer: Any) -> str:
    """
    Find the chat format whose tokens a tokenizer knows.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`]): Tokenizer of the backbone.

    Returns:
        `str`: A key of `CHAT_FORMATS`.

    Raises:
        ValueError: If the tokenizer knows the tokens of no format or of several formats.
    """
    vocabulary = tokenizer.get_vocab()
    known = [name for name, chat_format in CHAT_FORMATS.items() if chat_format.tokens <= vocabulary.keys()]
    if len(known) != 1:
        found = f"the tokens of {' and of '.join(map(repr, known))}" if known else "the tokens of no chat format"
        raise ValueError(
            f"`chat_format` must be one of {', '.join(map(repr, CHAT_FORMATS))}, got None. It cannot be derived, "
            f"because the tokenizer knows {found}."
        )
    return known[0]


def check_tokenizer(tokenizer: Any, chat_format: str) -> None:
    """
    Check that a tokenizer knows the end-of-turn token and FUSION's four special tokens.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`]): Tokenizer to check.
        chat_format (`str`): A key of `CHAT_FORMATS`.

    Raises:
        ValueError: If a token is missing. The error names the token.
    """
    vocabulary = tokenizer.get_vocab()
    if CHAT_FORMATS[chat_format].turn_end not in vocabulary:
        raise ValueError(
            f"The tokenizer has no token {CHAT_FORMATS[chat_format].turn_end!r}, which ends a turn in the chat format "
            f"{chat_format!r}."
        )
    for mark in VISION_MARKS:
        if mark not in vocabulary:
            raise ValueError(
                f"The tokenizer has no token {mark!r}. Use the tokenizer in the folder of a FUSION model."
            )


def find_control_tokens(tokenizer: Any, sanitize: bool = False) -> set[str]:
    """
    Find the tokens that user text must not contain: the tokens of FUSION, of the chat formats and of the backbone.

    Tokens that a user added, such as `<loc_1>`, stay allowed. Conversion adds FUSION's tokens last, so added tokens
    are those behind them, and those before them that are not special.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`]): Tokenizer with its added tokens.
        sanitize (`bool`): Whether to return all special tokens, including those that a user added.

    Returns:
        `set[str]`: The texts of the tokens.
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
    Breaks up text that a tokenizer would read as a control token (see [`find_control_tokens`]), so that it stays text.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`]): Tokenizer with its added tokens, which are read once.
        sanitize (`bool`): Whether to protect against all special tokens, including those that a user added.
    """

    def __init__(self, tokenizer: Any, sanitize: bool = False):
        ordered = sorted(find_control_tokens(tokenizer, sanitize), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")

    def protect(self, text: str) -> str:
        """Break up the control tokens in a text that a user wrote."""
        return self.break_up(text.replace(BREAK, ""))

    def break_up(self, text: str) -> str:
        """Break up the control tokens in a text that may already be protected."""
        while self.pattern.search(text):
            text = self.pattern.sub(lambda match: match[0][0] + BREAK + match[0][1:], text)
        return text

    def protect_all(self, value: Any) -> Any:
        """Protect each text in (nested) lists and dicts. Other values are returned unchanged."""
        if isinstance(value, str):
            return self.protect(value)
        if isinstance(value, dict):
            return {name: self.protect_all(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self.protect_all(item) for item in value]
        return value


def as_dicts(message: Any) -> Any:
    """
    Convert a chat message and its blocks to dicts. Images are returned unchanged.

    Since 5.24, transformers accepts dataclasses and pydantic models, such as the messages of the OpenAI package. As in
    transformers, fields that are None are left out.
    """
    if isinstance(message, (list, tuple)):
        return [as_dicts(item) for item in message]
    if callable(getattr(message, "model_dump", None)):
        message = message.model_dump()
    elif is_dataclass(message) and not isinstance(message, type):
        # `dataclasses.asdict` would copy the images.
        message = {field.name: getattr(message, field.name) for field in fields(message)}
    if not isinstance(message, Mapping):
        return message
    return {name: as_dicts(value) for name, value in message.items() if value is not None}


def prepare_messages(messages: Any, protector: TextProtector, where: str, keep_images: bool) -> list[dict[str, Any]]:
    """
    Copy the messages of one conversation as lists of blocks, the form that the chat templates expect.

    Args:
        messages (`list`): Messages of the conversation, see [`check_messages`].
        protector ([`TextProtector`]): Protects all texts that users wrote.
        where (`str`): Prefix for the names of messages in errors.
        keep_images (`bool`): Whether to keep the images. If False, image blocks only mark where an image is.

    Returns:
        `list[dict]`: The messages, each with its image, if it has one, and one text behind it.

    Raises:
        ValueError: If [`check_messages`] refuses the messages or if they have several images.
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
        # Join before protecting, because two blocks could hold the halves of a special token.
        text = "".join(block["text"] for block in blocks if block["type"] == "text")
        text = protector.protect(text.strip() if images else text)
        others = {name: value for name, value in message.items() if name not in ("role", "content")}
        others = protector.protect_all(others)
        prepared.append({"role": message["role"], **others, "content": [*images, {"type": "text", "text": text}]})
    if num_images > 1:
        raise ValueError(f"`{where}messages` must have at most 1 image, got {num_images}.")
    return prepared


def join_questions(messages: list[dict[str, Any]]) -> str:
    """Return the questions of prepared messages as one text."""
    return "".join(message["content"][-1]["text"].strip() for message in messages if message["role"] == "user")


def _as_image_block(block: dict[str, Any]) -> dict[str, Any]:
    """Convert an `image_url` block of OpenAI, or a block of datasets with `bytes` and `path`, to an `image` block."""
    if block["type"] == "image_url":
        return {"type": "image", "url": address_of(block)}
    return {"type": "image", "image": block["bytes"]} if block.get("bytes") is not None else block
