"""Chats and pictures to FUSION's inputs: chat templates, image and latent blocks, questions, prompt ends.

The sequence is what the authors' LLM reads (FUSION, arXiv 2504.09925, and their code): image block, latent block of
turn 1, question 1, then latent block and question of each further turn.
"""

import copy
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from transformers import BatchFeature, ProcessorMixin
from transformers.processing_utils import MultiModalData

from .compatibility_fusion import as_dicts
from .configuration_fusion import is_perfect_square
from .image_sources_fusion import defer_images, is_group

DO_NOT_PAD, MAX_LENGTH = "do_not_pad", "max_length"  # values of `padding`, as texts or as transformers' enumeration
ROLES = ("system", "user", "assistant")
IMAGE_TOKEN, LATENT_TOKEN, VISION_START, VISION_END = "<image>", "<latent_image>", "<vision_start>", "<vision_end>"
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

    def write_template(self, query_len: int) -> str:
        """Write the Jinja template; `query_len` is the number of latent tokens per turn where a call names none."""
        parts = {name: getattr(self, name).replace("\n", "\\n") for name in self.__dataclass_fields__}
        return _TEMPLATE.format(query_len=query_len, **parts)


_TEMPLATE = """\
{{%- set query_len = query_len | default({query_len}) -%}}
{{%- if messages[0]['role'] != 'system' -%}}
{{{{- '{system_header}{system}{turn_end}{separator}' -}}}}
{{%- endif -%}}
{{%- for message in messages -%}}
{{%- set image = false -%}}
{{%- set text = message['content'] -%}}
{{%- if text is not string -%}}
{{%- set image = text | selectattr('type', 'equalto', 'image') | list | length > 0 -%}}
{{%- set text = text | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}}
{{%- endif -%}}
{{%- if message['role'] == 'system' -%}}
{{{{- '{system_header}' + text + '{turn_end}{separator}' -}}}}
{{%- elif message['role'] == 'user' -%}}
{{{{- '{user_header}' -}}}}
{{%- if image -%}}{{{{- '<vision_start><image><vision_end>' -}}}}{{%- endif -%}}
{{{{- '<vision_start>' + '<latent_image>' * query_len + '<vision_end>' -}}}}
{{%- if image and text -%}}{{{{- '\\n' -}}}}{{%- endif -%}}
{{{{- text + '{turn_end}{separator}' -}}}}
{{%- else -%}}
{{{{- '{assistant_header}' -}}}}
{{%- generation -%}}
{{{{- text + '{turn_end}' -}}}}
{{%- endgeneration -%}}
{{{{- '{separator}' -}}}}
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


class FusionProcessor(ProcessorMixin):
    """
    Image processor and tokenizer as one, with FUSION's sequence around them.

    Args:
        image_processor ([`FusionImageProcessor`]): makes the tiles.
        tokenizer ([`PreTrainedTokenizerBase`]): knows the four marks as special tokens.
        chat_template (`str`, *optional*): default: the one of `chat_format`.
        chat_format (`str`): headers and separators of the backbone, a key of `CHAT_FORMATS`.
        num_image_tokens (`int`): image tokens that the LLM reads per picture.
        query_len (`int`): default number of latent tokens per turn.
        instruct_pad_token_id (`int`): padding of the question, and ignored in it.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        chat_format: str = "phi3",
        num_image_tokens: int = 729,
        query_len: int = 36,
        instruct_pad_token_id: int = 0,
        **kwargs: Any,
    ):
        if chat_format not in CHAT_FORMATS:
            raise ValueError(f"chat_format is {chat_format!r}; allowed: {', '.join(map(repr, CHAT_FORMATS))}.")
        self.chat_format = chat_format
        self.num_image_tokens = num_image_tokens
        self.query_len = _checked_query_len(query_len)
        self.instruct_pad_token_id = instruct_pad_token_id
        self.image_token, self.latent_token = IMAGE_TOKEN, LATENT_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.latent_token_id = tokenizer.convert_tokens_to_ids(LATENT_TOKEN)
        template = CHAT_FORMATS[chat_format].write_template(query_len) if chat_template is None else chat_template
        super().__init__(image_processor, tokenizer, chat_template=template, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        names = ["input_ids", "attention_mask", "pixel_values"]
        return [*names, "instruct_input_ids", "instruct_attention_mask", "prompt_end_positions"]

    def apply_chat_template(
        self,
        conversation: list[Any],
        chat_template: str | None = None,
        query_len: int | None = None,
        image_token_grid: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Messages (or a list of conversations) to text or, with `tokenize=True, return_dict=True`, to model inputs.

        A message's content is a string or a list of `{"type": "text", "text": ...}` and one
        `{"type": "image", "image" | "url" | "path" | "base64": ...}`. A conversation has one picture; it is read
        before the first question, whichever user message carries it. What looks like a special token in a message
        stays text. `query_len` and `image_token_grid` are those of the call.
        """
        self.count_image_tokens(image_token_grid)
        processor_kwargs = dict(kwargs.pop("processor_kwargs", None) or {})
        query_len = processor_kwargs.get("query_len") if query_len is None else query_len
        batched = bool(conversation) and isinstance(conversation[0], (list, tuple))
        prepared = [self._prepare_messages(c) for c in (conversation if batched else [conversation])]
        if kwargs.get("add_generation_prompt"):
            for messages in prepared:
                require_question(messages)
        length = self.query_len if query_len is None else _checked_query_len(query_len)
        # a block of one latent token looks like a mark that stands for a block: say that it is none
        processor_kwargs["query_len"] = length
        if image_token_grid is not None:
            processor_kwargs["image_token_grid"] = image_token_grid
        return super().apply_chat_template(
            prepared if batched else prepared[0],
            chat_template=chat_template,
            query_len=length,
            processor_kwargs=processor_kwargs,
            **kwargs,
        )

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        query_len: int | None = None,
        image_token_grid: int | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Prompts, as `apply_chat_template` writes them, and one picture for each `<image>` in them.

        A single `<latent_image>` stands for a block of `query_len`, `<image>` for `image_token_grid ** 2` image tokens
        (default: `num_image_tokens`). The authors' order of marks (latent block before the image) is accepted and
        swapped. Batches that become tensors are padded.

        Returns `input_ids`, `attention_mask` `(B, S)`, `instruct_input_ids`, `instruct_attention_mask` `(B, T)`,
        `prompt_end_positions` `(B, R)` and, if there is a picture, `pixel_values` `(B, 5, 3, H, W)`.

        Raises:
            ValueError: for counts that disagree, and prompts longer than `tokenizer.model_max_length`; names both.
        """
        if image_token_grid is not None:
            # a copy that other threads do not see: transformers asks `replace_image_token`, which knows no call's grid
            resized = copy.copy(self)
            resized.num_image_tokens = self.count_image_tokens(image_token_grid)
            return resized(images, text, query_len, **kwargs)
        if text is None:
            return super().__call__(images=None if images is None else defer_images(images), **kwargs)
        length = self.query_len if query_len is None else _checked_query_len(query_len)
        given = [text] if isinstance(text, str) else text
        texts = [self._arrange(t, length, strict=query_len is not None) for t in given]
        shifts = [len(self._prefix(t)) for t in given]
        _check_nesting(images, texts)
        flat_images = defer_images(images)
        marks = sum(t.count(IMAGE_TOKEN) for t in texts)
        if marks != len(flat_images):  # in transformers' words, whose older versions do not count
            raise ValueError(
                f"The number of {IMAGE_TOKEN} tokens in the prompts should be the same as the number of images: "
                f"found {marks} {IMAGE_TOKEN} tokens and {len(flat_images)} images."
            )
        text_kwargs = kwargs.get("text_kwargs", {}) | kwargs.get("common_kwargs", {}) | kwargs
        tensors = text_kwargs.get("return_tensors")
        kwargs = _without(kwargs, "return_tensors")
        if tensors is not None and "padding" not in text_kwargs | self.tokenizer.init_kwargs:
            kwargs["padding"] = True
        kwargs["return_offsets_mapping"] = True
        kwargs["images_kwargs"] = {**kwargs.get("images_kwargs", {}), "return_tensors": "np"}  # one array, not a list
        features = super().__call__(images=flat_images or None, text=list(texts), **kwargs)

        expanded = [t.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.num_image_tokens) for t in texts]
        rows = [
            _drop_breaks(_Tokens(*columns), t)
            for *columns, t in zip(
                features["input_ids"], features["attention_mask"], features["offset_mapping"], expanded, strict=True
            )
        ]
        padding = {**self.tokenizer.init_kwargs, **text_kwargs, **kwargs}.get("padding")
        padded = len(features["input_ids"][0])
        if padding not in (None, False, DO_NOT_PAD) and any(len(row.ids) < padded for row in rows):
            fixed = padding == MAX_LENGTH or text_kwargs.get("pad_to_multiple_of")
            length = padded if fixed else max(sum(row.mask) for row in rows)
            on_left = text_kwargs.get("padding_side", self.tokenizer.padding_side) == "left"
            rows = [self._pad_again(row, length, on_left) for row in rows]
        if not text_kwargs.get("truncation"):
            self._check_length(rows)
        data: dict[str, Any] = {
            "input_ids": [row.ids for row in rows],
            "attention_mask": [row.mask for row in rows],
            **self._questions(texts),
            "prompt_end_positions": _pad([self._prompt_ends(*pair) for pair in zip(rows, expanded, strict=True)], -1),
        }
        if tensors is not None:  # of whole numbers, even where there are no turns
            data["prompt_end_positions"] = np.array(data["prompt_end_positions"], dtype=np.int64).reshape(
                len(rows), -1
            )
        if flat_images:
            data["pixel_values"] = _one_per_sample(features["pixel_values"], [IMAGE_TOKEN in t for t in texts])
        if text_kwargs.get("return_offsets_mapping"):
            # character spans in the prompt without the prefix that was put before it
            pairs = zip(rows, shifts, strict=True)
            data["offset_mapping"] = [_shifted(row.offsets, n) for row, n in pairs]
        if text_kwargs.get("return_text_replacement_offsets"):
            data["text_replacement_offsets"] = features["text_replacement_offsets"]
        if text_kwargs.get("return_mm_token_type_ids"):
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        return BatchFeature(data, tensor_type=tensors, skip_tensor_conversion=self.skip_tensor_conversion)

    def count_image_tokens(self, image_token_grid: int | None = None) -> int:
        """Image tokens of one picture: of the given grid, or `num_image_tokens`. The model knows how many it can give.

        Raises:
            ValueError: if what is given is no whole number from 1.
        """
        if image_token_grid is None:
            return self.num_image_tokens
        if not isinstance(image_token_grid, int) or image_token_grid < 1:
            raise ValueError(f"image_token_grid is {image_token_grid!r}; allowed: a whole number from 1.")
        return image_token_grid**2

    def _get_num_multimodal_tokens(
        self, image_sizes: list[tuple[int, int]] | None = None, image_token_grid: int | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Image tokens and entries of `pixel_values` that pictures of these sizes take; one entry holds all tiles."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        tokens = [self.count_image_tokens(image_token_grid)] * count
        return MultiModalData(num_image_tokens=tokens, num_image_patches=[1] * count)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        return IMAGE_TOKEN * self.num_image_tokens

    def _prepare_messages(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Copies of the messages as lists of blocks: text protected, the picture in the first user message."""
        prepared, pictures = [], []
        messages = as_dicts(messages)
        check_messages(messages)
        for message in messages:
            content = message.get("content") or ""
            blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
            texts = []
            for block in blocks:
                if block["type"] == "text":
                    texts.append(block["text"])
                else:
                    pictures.append(_as_image_block(block))
            protected = [{"type": "text", "text": protect(t, self.tokenizer)} for t in texts]
            prepared.append({**message, "content": protected})
        if len(pictures) > 1:
            raise ValueError(f"A conversation has {len(pictures)} images; FUSION reads 1.")
        questions = [message for message in prepared if message["role"] == "user"]
        if pictures and questions:
            first = questions[0]
            joined = "".join(block["text"] for block in first["content"]).strip()
            first["content"] = [*pictures, {"type": "text", "text": joined}]
        return prepared

    def _arrange(self, text: str, query_len: int, strict: bool) -> str:
        """Image mark first, latent marks as whole blocks, the family's prefix in front."""
        if not isinstance(text, str):
            raise ValueError(f"text holds a {type(text).__name__}; allowed: a string or a list of strings.")
        marks = MARKS.findall(text)
        if marks.count(IMAGE_TOKEN) > 1:
            raise ValueError(f"A prompt has {marks.count(IMAGE_TOKEN)} {IMAGE_TOKEN} marks; FUSION reads 1 image.")
        for number, mark in enumerate(marks):
            if mark == IMAGE_TOKEN:
                continue
            count = len(mark) // len(LATENT_TOKEN)
            if count == 1:
                marks[number] = LATENT_TOKEN * query_len
            elif strict and count != query_len:
                raise ValueError(f"A latent block has {count} tokens, but query_len is {query_len}.")
        marks.sort(key=lambda mark: mark != IMAGE_TOKEN)  # stable: only the image moves
        ordered = iter(marks)
        return self._prefix(text) + MARKS.sub(lambda _: next(ordered), text)

    def _prefix(self, text: str) -> str:
        begins_special = text.startswith(tuple(t.content for t in self.tokenizer.added_tokens_decoder.values()))
        return CHAT_FORMATS[self.chat_format].prompt_prefix if begins_special else ""

    def _pad_again(self, row: "_Tokens", length: int, on_left: bool) -> "_Tokens":
        """The attended tokens of a row, padded to `length`."""
        attended = [i for i, mask in enumerate(row.mask) if mask]
        missing = length - len(attended)
        kept = _Tokens([row.ids[i] for i in attended], [1] * len(attended), [row.offsets[i] for i in attended])
        added = _Tokens([self.tokenizer.pad_token_id] * missing, [0] * missing, [(0, 0)] * missing)
        first, second = (added, kept) if on_left else (kept, added)
        return _Tokens(first.ids + second.ids, first.mask + second.mask, first.offsets + second.offsets)

    def _check_length(self, rows: list["_Tokens"]) -> None:
        longest, most = max(sum(row.mask) for row in rows), self.tokenizer.model_max_length
        if longest > most:
            raise ValueError(f"A prompt has {longest} tokens; allowed: tokenizer.model_max_length = {most}.")

    def _questions(self, texts: list[str]) -> dict[str, list[list[int]]]:
        """The user messages of each prompt, tokenised on their own; a prompt without image has none."""
        chat_format = CHAT_FORMATS[self.chat_format]
        turns = re.compile(re.escape(chat_format.user_header) + "(.*?)" + re.escape(chat_format.turn_end), re.DOTALL)
        questions = []
        for text in texts:
            messages = turns.findall(text) or [text]
            question = "".join(VISION_BLOCKS.sub("", message).strip() for message in messages)
            questions.append(question if IMAGE_TOKEN in text else "")
        rows = tokenize_alone(questions, self.tokenizer)
        rows = [ids if IMAGE_TOKEN in text else [] for ids, text in zip(rows, texts, strict=True)]
        ids = _pad([row or [self.instruct_pad_token_id] for row in rows], self.instruct_pad_token_id)
        mask = [[int(i != self.instruct_pad_token_id) for i in row] for row in ids]
        return {"instruct_input_ids": ids, "instruct_attention_mask": mask}

    def _prompt_ends(self, row: "_Tokens", text: str) -> list[int]:
        """Index of the last token of each assistant header; of the prompt, if it has no header but a latent block."""
        attended = [i for i, mask in enumerate(row.mask) if mask]
        if LATENT_TOKEN not in text or not attended:
            return []
        header = CHAT_FORMATS[self.chat_format].assistant_header
        ends = [match.end() for match in re.finditer(re.escape(header), text)]
        if not ends:
            return [attended[-1]]
        last_character = row.offsets[attended[-1]][1]  # less than the text's length after truncation
        starts = np.array([row.offsets[i][0] for i in attended])
        return [attended[np.flatnonzero(starts < end)[-1]] for end in ends if end <= last_character]


class _Tokens(NamedTuple):
    """One tokenised prompt: ids, attention mask, character spans."""

    ids: list[int]
    mask: list[int]
    offsets: list[tuple[int, int]]


def check_messages(messages: Any) -> None:
    """
    Check the form of one conversation.

    Raises:
        ValueError: names the message and the block that FUSION cannot read.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"A conversation must be a list of messages, got {messages!r}.")
    begins = 0
    for number, message in enumerate(messages):
        name = f"messages[{number}]"
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
    if content is None or isinstance(content, str):
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
        if kind == "image_url" and not isinstance(_address(block), str):
            raise ValueError(f"{name}.content[{number}].image_url must be an address, got {block.get('image_url')!r}.")


def _address(block: dict[str, Any]) -> Any:
    url = block.get("image_url")
    return url.get("url") if isinstance(url, dict) else url


def require_question(messages: list[dict[str, Any]]) -> None:
    """
    Check that a conversation that is to be answered ends with a question.

    Raises:
        ValueError: names its last message.
    """
    last = messages[-1]["role"]
    if last != "user":
        raise ValueError(
            f"messages[{len(messages) - 1}].role must be 'user' with `add_generation_prompt=True`, got {last!r}."
        )


def protect(text: str, tokenizer: Any) -> str:
    """Break up what the tokenizer would read as a special token."""
    tokens = tokenizer.added_tokens_decoder.values()
    special = [t.content for t in tokens if len(t.content) > 1 and (t.special or re.fullmatch("<.*>", t.content))]
    pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
    text = text.replace(BREAK, "")
    while pattern.search(text):
        text = pattern.sub(lambda match: match[0][0] + BREAK + match[0][1:], text)
    return text


def tokenize_alone(questions: list[str], tokenizer: Any) -> list[list[int]]:
    """Tokenize protected texts as the tokenizer does by default: the ids that guide the vision tower."""
    encoded = tokenizer(questions, return_offsets_mapping=True, padding=False)
    columns = zip(encoded["input_ids"], encoded["attention_mask"], encoded["offset_mapping"], questions, strict=True)
    return [_drop_breaks(_Tokens(*tokens), question).ids for *tokens, question in columns]


def _drop_breaks(row: "_Tokens", text: str) -> "_Tokens":
    """Without the tokens that cover nothing but a `BREAK`."""
    breaks = {i for i, character in enumerate(text) if character == BREAK} if BREAK in text else ()
    if not breaks:
        return row
    kept = [i for i, (start, end) in enumerate(row.offsets) if not (start in breaks and end == start + 1)]
    return _Tokens([row.ids[i] for i in kept], [row.mask[i] for i in kept], [row.offsets[i] for i in kept])


def _checked_query_len(query_len: int) -> int:
    if not is_perfect_square(query_len):
        raise ValueError(f"query_len is {query_len}; allowed: a perfect square (1, 4, 9, 16, ...).")
    return query_len


def _as_image_block(block: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's `image_url` block, and one of datasets with `bytes` and `path`, as the ecosystem's `image` block."""
    if block["type"] == "image_url":
        return {"type": "image", "url": _address(block)}
    return {"type": "image", "image": block["bytes"]} if block.get("bytes") is not None else block


def _check_nesting(images: Any, texts: list[str]) -> None:
    """Images in one list per prompt must be those of the prompt's marks: flattened, they could go to another one."""
    parts = list(images) if is_group(images) else [images]
    total = len(defer_images(images))
    if not total or not any(part is None or is_group(part) for part in parts):
        return
    if len(parts) != len(texts):
        if total != sum(text.count(IMAGE_TOKEN) for text in texts):
            return  # which the caller says in transformers' words
        raise ValueError(f"images has lists of images for {len(parts)} prompts, but there are {len(texts)} prompts.")
    for number, (part, text) in enumerate(zip(parts, texts, strict=True)):
        marks, count = text.count(IMAGE_TOKEN), len(defer_images(part))
        if marks != count:
            raise ValueError(
                f"Prompt {number} has {marks} {IMAGE_TOKEN} marks, but images[{number}] has {count} images."
            )


def _without(kwargs: dict[str, Any], name: str) -> dict[str, Any]:
    """A copy of (nested) keyword arguments that lacks `name`."""
    return {k: _without(v, name) if isinstance(v, dict) else v for k, v in kwargs.items() if k != name}


def _pad(rows: list[list[int]], value: int) -> list[list[int]]:
    longest = max(map(len, rows))
    return [row + [value] * (longest - len(row)) for row in rows]


def _shifted(offsets: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """Character spans, in a text without the first `count` characters."""
    return [(max(start - count, 0), max(end - count, 0)) for start, end in offsets] if count else offsets


def _one_per_sample(pixel_values: np.ndarray, has_image: list[bool]) -> np.ndarray:
    """Align pictures `(n, ...)` with samples `(B, ...)`: zeros, mid grey, for a sample without one."""
    if all(has_image):
        return pixel_values
    samples = np.zeros((len(has_image), *pixel_values.shape[1:]), dtype=pixel_values.dtype)
    samples[has_image] = pixel_values
    return samples


FusionProcessor.register_for_auto_class()

__all__ = ["FusionProcessor"]
