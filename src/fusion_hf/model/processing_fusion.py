"""Chats and images to FUSION's inputs: chat templates, image and latent blocks, questions, prompt ends.

The sequence is what the authors' LLM reads (FUSION, arXiv 2504.09925, and their code): image block, latent block of
turn 1, question 1, then latent block and question of each further turn.
"""

import copy
import re
import warnings
from typing import Any, NamedTuple

import numpy as np
from transformers import BatchFeature, ProcessorMixin
from transformers.processing_utils import MultiModalData

from .chat_fusion import (
    BREAK,
    CHAT_FORMATS,
    IMAGE_TOKEN,
    LATENT_TOKEN,
    MARKS,
    REPEATED,
    VISION_BLOCKS,
    address_of,
    break_up,
    check_messages,
    check_tokenizer,
    derive_chat_format,
    protect_all,
    require_question,
)
from .compatibility_fusion import as_dicts
from .configuration_fusion import FusionConfig, is_perfect_square
from .image_sources_fusion import defer_images, is_group

# of what the processor gives, what the model can find in the ids as well
TURN_INPUTS = ("instruct_input_ids", "instruct_attention_mask", "prompt_end_positions")
# of a processor's arguments, those that a model's configuration has as well
FIELDS_OF_CONFIG = ("num_image_tokens", "query_len", "instruct_pad_token_id")
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
DEFAULT_SIDE, DEFAULT_IMAGE_TOKENS = 384, 729  # of FUSION 3B and 8B
AS_TEXT = {"tokenize": False, "return_dict": False}  # of `apply_chat_template`
NO_LATENTS = (
    f"A prompt has {IMAGE_TOKEN} and no {LATENT_TOKEN}: FUSION's chat template was not used. The model gets no latent "
    "tokens, and no question but what is behind the image. Write prompts with `apply_chat_template`."
)
DO_NOT_PAD, MAX_LENGTH = "do_not_pad", "max_length"  # values of `padding`, as texts or as transformers' enumeration


class FusionProcessor(ProcessorMixin):
    """
    Image processor and tokenizer as one, with FUSION's sequence around them.

    Args:
        image_processor ([`FusionImageProcessor`]): makes the tiles.
        tokenizer ([`PreTrainedTokenizerBase`]): knows the four marks as special tokens.
        chat_template (`str`, *optional*): default: the one of `chat_format`.
        chat_format (`str`, *optional*): headers and separators of the backbone, a key of `CHAT_FORMATS`; default: the
            one whose tokens the tokenizer knows.
        num_image_tokens (`int`, *optional*): image tokens that the LLM reads per image. There is a default, 729, for
            tiles of 384 pixels only.
        query_len (`int`): default number of latent tokens per turn.
        instruct_pad_token_id (`int`): padding of the question, and ignored in it.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        chat_format: str | None = None,
        num_image_tokens: int | None = None,
        query_len: int = 36,
        instruct_pad_token_id: int = 0,
        **kwargs: Any,
    ):
        if chat_format is None:
            chat_format = derive_chat_format(tokenizer)
        if chat_format not in CHAT_FORMATS:
            raise ValueError(f"chat_format is {chat_format!r}; allowed: {', '.join(map(repr, CHAT_FORMATS))}.")
        check_tokenizer(tokenizer, chat_format)
        self.chat_format = chat_format
        if num_image_tokens is None:
            num_image_tokens = _default_image_tokens(image_processor)
        self.num_image_tokens = num_image_tokens
        self.query_len = _checked_query_len(query_len)
        self.instruct_pad_token_id = instruct_pad_token_id
        self.image_token, self.latent_token = IMAGE_TOKEN, LATENT_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.latent_token_id = tokenizer.convert_tokens_to_ids(LATENT_TOKEN)
        if chat_template is None and LATENT_TOKEN in str(tokenizer.chat_template):
            chat_template = tokenizer.chat_template
        self.returns_turns = True
        self.begin = tokenizer.bos_token if tokenizer("")["input_ids"] == [tokenizer.bos_token_id] else ""
        template = chat_template or CHAT_FORMATS[chat_format].write_template(query_len, self.begin)
        if tokenizer.chat_template is None:  # so that a tokenizer that is used, or saved, by itself has FUSION's
            tokenizer.chat_template = template
        super().__init__(image_processor, tokenizer, chat_template=template, **kwargs)

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        Read `processor_config.json` or, in a folder to which the tokenizer and the image processor were saved one by
        one (as `Pipeline.save_pretrained` does), the same values of the model's `config.json`.

        Raises:
            ValueError: names what neither file holds.
        """
        values, unused = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        missing = [name for name in FIELDS_OF_CONFIG if name not in values and name not in unused]
        if missing:
            hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
            try:
                found, _ = FusionConfig.get_config_dict(pretrained_model_name_or_path, **hub)
            except OSError:  # newer releases of transformers return nothing where there is no file
                found = None
            if not found or found.get("model_type") != FusionConfig.model_type:
                names = ", ".join(f"`{name}`" for name in missing)
                raise ValueError(
                    f"{pretrained_model_name_or_path} has no processor_config.json, and no config.json of a FUSION "
                    f"model. Pass {names} to `from_pretrained`, or save the processor there with "
                    "`processor.save_pretrained`."
                )
            config = FusionConfig.from_dict(found)
            values |= {name: getattr(config, name) for name in missing}
        return values, unused

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", *(TURN_INPUTS if self.returns_turns else ())]

    def without_turns(self) -> "FusionProcessor":
        """
        Return a processor that gives ids, masks and images alone, so that the model finds turns and questions.

        For callers that hand on no others, as TRL's trainers that sample. Saved, it is an ordinary processor.
        """
        processor = copy.copy(self)
        processor.returns_turns = False
        return processor

    def apply_chat_template(
        self,
        conversation: list[Any],
        chat_template: str | None = None,
        query_len: int | None = None,
        image_token_grid: int | None = None,
        process_images: bool = True,
        **kwargs: Any,
    ) -> Any:
        """
        Messages (or a list of conversations) to text or, with `tokenize=True, return_dict=True`, to model inputs.

        A message's content is a string or a list of `{"type": "text", "text": ...}` and one
        `{"type": "image", "image" | "url" | "path" | "base64": ...}`. A conversation has one image; it is read
        where training puts it, see [`CHAT_FORMATS`]. What looks like a control token in a message stays text; with
        `sanitize_control_tokens=True` so does every special token that a user added. `query_len`, `image_token_grid`
        and `process_images` are those of the call; with `process_images=False`, an image block needs no image.

        Raises:
            ValueError: names the message and the block that FUSION cannot read, or says what the template lacks.
        """
        self.count_image_tokens(image_token_grid)
        # transformers' own way breaks offsets, and lacks in older releases: texts are protected here anyway
        sanitize = bool(kwargs.pop("sanitize_control_tokens", False))
        if sanitize:
            kwargs = protect_all(kwargs, self.tokenizer, sanitize)
        processor_kwargs = dict(kwargs.pop("processor_kwargs", None) or {})
        query_len = processor_kwargs.get("query_len") if query_len is None else query_len
        is_list = isinstance(conversation, (list, tuple)) and bool(conversation)
        batched = is_list and isinstance(conversation[0], (list, tuple))
        prepared = []
        for number, messages in enumerate(conversation if batched else [conversation]):
            where = f"conversation[{number}]." if batched else ""
            prepared.append(self._prepare_messages(messages, sanitize, where, keep_images=process_images))
            if kwargs.get("add_generation_prompt"):
                require_question(prepared[-1], where)
        length = self.query_len if query_len is None else _checked_query_len(query_len)
        chats = prepared if batched else prepared[0]
        template = str(self.chat_template if chat_template is None else chat_template)
        if "query_len" in template:  # older releases of transformers lose `processor_kwargs` with other arguments
            kwargs["query_len"] = length
        if not kwargs.get("tokenize"):
            text = super().apply_chat_template(chats, chat_template=chat_template, **kwargs)
            return [_order_marks(each) for each in text] if batched else _order_marks(text)
        if any(message["role"] == "assistant" for messages in prepared for message in messages):
            self._check_headers(prepared, chat_template, template, kwargs)
        # a block of one latent token looks like a mark that stands for a block: say that it is none
        processor_kwargs["query_len"] = length
        if not process_images:
            processor_kwargs["process_images"] = False
        if self.returns_turns:
            processor_kwargs.setdefault("questions", [_join_questions(messages) for messages in prepared])
        if image_token_grid is not None:
            processor_kwargs["image_token_grid"] = image_token_grid
        return super().apply_chat_template(
            chats, chat_template=chat_template, processor_kwargs=processor_kwargs, **kwargs
        )

    def _check_headers(
        self, prepared: list[list[dict[str, Any]]], chat_template: str | None, template: str, kwargs: dict[str, Any]
    ) -> None:
        """
        Check that a template of the caller's own says where answers begin.

        Raises:
            ValueError: if it does not write the chat format's assistant header.
        """
        header = CHAT_FORMATS[self.chat_format].assistant_header
        if header.replace("\n", "\\n") in template:
            return
        options = {"chat_template": chat_template, **kwargs, **AS_TEXT}
        for messages, text in zip(prepared, super().apply_chat_template(prepared, **options), strict=True):
            answers = sum(message["role"] == "assistant" for message in messages)
            answers += bool(kwargs.get("add_generation_prompt"))
            if text.count(header) != answers:
                raise ValueError(
                    f"The chat template writes {text.count(header)} assistant headers {header!r} for {answers} "
                    "answers, so that the ends of the prompts cannot be found. Write the headers of `chat_format` = "
                    f"{self.chat_format!r}."
                )

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        query_len: int | None = None,
        image_token_grid: int | None = None,
        questions: str | list[str] | None = None,
        process_images: bool = True,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Prompts, as `apply_chat_template` writes them, and one image for each `<image>` in them.

        A single `<latent_image>` stands for a block of `query_len`, `<image>` for `image_token_grid ** 2` image tokens
        (default: `num_image_tokens`). The authors' order of marks (latent block before the image) is accepted and
        swapped. Batches that become tensors are padded. `questions` guide the vision tower, one text for each prompt;
        default: the user messages in the prompt or, in a prompt without the user header of `chat_format`, what is
        behind its image. `process_images=False` is for prompts whose images the model gets in another way, such as
        `global_features` that were computed for an earlier question: `<image>` is written as for an image, but none is
        taken, opened or resized, and there are no `pixel_values`.

        Returns `input_ids`, `attention_mask` `(B, S)`, `instruct_input_ids`, `instruct_attention_mask` `(B, T)`,
        `prompt_end_positions` `(B, R)` and, if there is an image, `pixel_values` `(B, 5, 3, H, W)`.

        Raises:
            ValueError: for counts that disagree, and prompts longer than `tokenizer.model_max_length`; names both.
        """
        if image_token_grid is not None:
            # a copy that other threads do not see: transformers asks `replace_image_token`, which knows no call's grid
            resized = copy.copy(self)
            resized.num_image_tokens = self.count_image_tokens(image_token_grid)
            return resized(images, text, query_len, questions=questions, process_images=process_images, **kwargs)
        if questions is not None and not self.returns_turns:
            raise ValueError(
                "`questions` must be None for a processor `without_turns()`: the model finds them in ids."
            )
        if images is not None and not process_images:
            raise ValueError("`images` must be None with `process_images=False`, which is for images that you keep.")
        if text is None:
            return super().__call__(images=None if images is None else defer_images(images), **kwargs)
        if not isinstance(text, (str, list, tuple)) or text in ([], ()):
            raise ValueError(f"`text` must be a string or a list of one or more strings, got {text!r}.")
        length = self.query_len if query_len is None else _checked_query_len(query_len)
        given = [text] if isinstance(text, str) else text
        begins = [bool(self.begin) and isinstance(t, str) and t.startswith(self.begin) for t in given]
        text_kwargs = kwargs.get("text_kwargs", {}) | kwargs.get("common_kwargs", {}) | kwargs
        if all(begins) or (any(begins) and text_kwargs.get("add_special_tokens", True)):
            # as the authors' tokenizer: the text without its first token, which is put before the ids, once
            kwargs = _without(kwargs, "add_special_tokens") | {"add_special_tokens": True}
            given = [t.removeprefix(self.begin) if begin else t for t, begin in zip(given, begins, strict=True)]
        else:
            begins = [False] * len(given)
        texts = [self._arrange(t, length, strict=query_len is not None) for t in given]
        shifts = [len(self._prefix(t)) - begin * len(self.begin) for t, begin in zip(given, begins, strict=True)]
        if any(IMAGE_TOKEN in t and LATENT_TOKEN not in t for t in texts):
            warnings.warn(NO_LATENTS, stacklevel=2)
        flat_images = defer_images(images)
        if process_images:
            _check_images(images, texts)
        tensors = text_kwargs.get("return_tensors")
        kwargs = _without(kwargs, "return_tensors")
        if tensors is not None and "padding" not in text_kwargs | self.tokenizer.init_kwargs:
            kwargs["padding"] = True
        kwargs["return_offsets_mapping"] = True
        kwargs["images_kwargs"] = {**kwargs.get("images_kwargs", {}), "return_tensors": "np"}  # one array, not a list
        pixels = super().__call__(images=flat_images, **kwargs) if flat_images else {}
        expanded = [t.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.num_image_tokens) for t in texts]
        features = super().__call__(text=list(expanded), **kwargs)
        columns = (features[name] for name in ("input_ids", "attention_mask", "offset_mapping"))
        chat_format = CHAT_FORMATS[self.chat_format]
        rows = [
            _drop_tokens(_Tokens(*row), t, len(chat_format.before_answer) * chat_format.begins_with_answer(t_given))
            for *row, t, t_given in zip(*columns, expanded, given, strict=True)
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
        }
        if self.returns_turns:
            data |= self._questions(texts, questions)
            ends = _pad([self._prompt_ends(*pair) for pair in zip(rows, expanded, strict=True)], -1)
            # of whole numbers, even where there are no turns
            whole = ends if tensors is None else np.array(ends, dtype=np.int64).reshape(len(rows), -1)
            data["prompt_end_positions"] = whole
        if flat_images:
            data["pixel_values"] = _one_per_sample(pixels["pixel_values"], [IMAGE_TOKEN in t for t in texts])
        if text_kwargs.get("return_offsets_mapping"):
            if any(_order_marks(t) != t for t in given):
                raise ValueError(
                    f"`return_offsets_mapping` needs a text in FUSION's order, with {IMAGE_TOKEN} before the first "
                    f"{LATENT_TOKEN}. Write it with FUSION's chat template."
                )
            # character spans in the prompt as it was given, without the prefix and with its first token
            pairs = zip(rows, shifts, strict=True)
            data["offset_mapping"] = [_shifted(row.offsets, n) for row, n in pairs]
        if text_kwargs.get("return_text_replacement_offsets"):
            count = self.num_image_tokens
            data["text_replacement_offsets"] = [_replacement(*pair, count) for pair in zip(texts, shifts, strict=True)]
        if text_kwargs.get("return_mm_token_type_ids"):
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        return BatchFeature(data, tensor_type=tensors, skip_tensor_conversion=self.skip_tensor_conversion)

    def count_image_tokens(self, image_token_grid: int | None = None) -> int:
        """Image tokens of one image: of the given grid, or `num_image_tokens`. The model knows how many it can give.

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
        """Image tokens and entries of `pixel_values` that images of these sizes take; one entry holds all tiles."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        tokens = [self.count_image_tokens(image_token_grid)] * count
        return MultiModalData(num_image_tokens=tokens, num_image_patches=[1] * count)

    def validate_inputs(self, images: Any = None, text: list[str] | None = None, **kwargs: Any) -> None:
        """Check as transformers does, but for the number of images: `__call__` compares it with marks as they came."""
        without_marks = None if text is None else [each.replace(IMAGE_TOKEN, "") for each in text]
        super().validate_inputs(images=images, text=without_marks, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        return IMAGE_TOKEN * self.num_image_tokens

    def _prepare_messages(self, messages: Any, sanitize: bool, where: str, keep_images: bool) -> list[dict[str, Any]]:
        """
        Copies of the messages as lists of blocks: one protected text each, behind the image of its message or, unless
        images are kept, behind a block that only says where the image is.
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
            text = protect_all(text.strip() if images else text, self.tokenizer, sanitize)
            others = {name: value for name, value in message.items() if name not in ("role", "content")}
            others = protect_all(others, self.tokenizer, sanitize)
            prepared.append({"role": message["role"], **others, "content": [*images, {"type": "text", "text": text}]})
        if num_images > 1:
            raise ValueError(f"{where}messages has {num_images} images; FUSION reads 1.")
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
        ordered = iter(marks)
        return self._prefix(text) + _order_marks(MARKS.sub(lambda _: next(ordered), text))

    def _prefix(self, text: str) -> str:
        """What the tokenizer must see before a text, to give it the ids that it has in a conversation."""
        if CHAT_FORMATS[self.chat_format].begins_with_answer(text):
            return CHAT_FORMATS[self.chat_format].before_answer
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

    def _questions(self, texts: list[str], given: str | list[str] | None) -> dict[str, list[list[int]]]:
        """The questions of each prompt, tokenised on their own; a prompt without image has none."""
        if given is not None:
            questions = [break_up(q, self.tokenizer) for q in ([given] if isinstance(given, str) else given)]
        else:
            questions = [self._find_question(text) if IMAGE_TOKEN in text else "" for text in texts]
        if len(questions) != len(texts):
            raise ValueError(f"`questions` must hold a text for each of {len(texts)} prompts, got {len(questions)}.")
        rows = tokenize_alone(questions, self.tokenizer)
        rows = [ids if IMAGE_TOKEN in text else [] for ids, text in zip(rows, texts, strict=True)]
        ids = _pad([row or [self.instruct_pad_token_id] for row in rows], self.instruct_pad_token_id)
        mask = [[int(i != self.instruct_pad_token_id) for i in row] for row in ids]
        return {"instruct_input_ids": ids, "instruct_attention_mask": mask}

    def _find_question(self, text: str) -> str:
        """The user messages of a prompt with an image."""
        chat_format = CHAT_FORMATS[self.chat_format]
        # the last user message may be open, to be continued
        end = f"(?:{re.escape(chat_format.turn_end)}|{re.escape(chat_format.assistant_header)}|\\Z)"
        turns = re.findall(re.escape(chat_format.user_header) + "(.*?)" + end, text, re.DOTALL)
        if not turns and len(re.findall(f"(?:{LATENT_TOKEN})+", text)) > 1:
            raise ValueError(
                f"A prompt has several latent blocks and no user header {chat_format.user_header!r}, so that its "
                "questions cannot be found. Pass `questions`."
            )
        if not turns:
            # of another template: what is before the marks may be a system message, so it is no question
            turns = re.split(end, text[[mark.end() for mark in VISION_BLOCKS.finditer(text)][-1] :])[:1]
        return "".join(VISION_BLOCKS.sub("", turn).strip() for turn in turns)

    def _prompt_ends(self, row: "_Tokens", text: str) -> list[int]:
        """Index of the last token of each assistant header; of the prompt, if it has no header but a latent block."""
        attended = [i for i, mask in enumerate(row.mask) if mask]
        if LATENT_TOKEN not in text or not attended:
            return []
        header = CHAT_FORMATS[self.chat_format].assistant_header
        ends = [match.end() for match in re.finditer(re.escape(header), text)]
        if not ends:
            blocks = len(re.findall(f"(?:{LATENT_TOKEN})+", text))
            if blocks > 1:
                raise ValueError(
                    f"A prompt has {blocks} latent blocks and no assistant header {header!r}, so that the ends of its "
                    "turns cannot be found. Write it with the headers of `chat_format` = "
                    f"{self.chat_format!r}."
                )
            return [attended[-1]]
        last_character = row.offsets[attended[-1]][1]  # less than the text's length after truncation
        starts = np.array([row.offsets[i][0] for i in attended])
        found = [attended[np.flatnonzero(starts < end)[-1]] for end in ends if end <= last_character]
        kept = sum(row.ids[i] == self.latent_token_id for i in attended)
        if kept == text.count(LATENT_TOKEN):
            return found
        # a turn loses its end where truncation took its latent block, which may be behind the end
        length = next(len(mark) // len(LATENT_TOKEN) for mark in MARKS.findall(text) if mark != IMAGE_TOKEN)
        return found[: -(-kept // length)]


class _Tokens(NamedTuple):
    """One tokenised prompt: ids, attention mask, character spans."""

    ids: list[int]
    mask: list[int]
    offsets: list[tuple[int, int]]


def _order_marks(text: str) -> str:
    """The text with its image mark first: the authors' code fills the first mark of a conversation with the image."""
    marks = sorted(MARKS.findall(text), key=lambda mark: mark != IMAGE_TOKEN)  # stable: only the image moves
    ordered = iter(marks)
    return MARKS.sub(lambda _: next(ordered), text)


def _join_questions(messages: list[dict[str, Any]]) -> str:
    """What a conversation asks, of prepared messages."""
    return "".join(message["content"][-1]["text"].strip() for message in messages if message["role"] == "user")


def _default_image_tokens(image_processor: Any) -> int:
    side = image_processor.size["height"]
    if side != DEFAULT_SIDE:
        raise ValueError(
            f"`num_image_tokens` is missing, and tiles have {side} pixels a side. Pass the `num_image_tokens` of the "
            "model's configuration."
        )
    return DEFAULT_IMAGE_TOKENS


def tokenize_alone(questions: list[str], tokenizer: Any) -> list[list[int]]:
    """Tokenize protected texts as the tokenizer does by default: the ids that guide the vision tower."""
    encoded = tokenizer(questions, return_offsets_mapping=True, padding=False)
    columns = zip(encoded["input_ids"], encoded["attention_mask"], encoded["offset_mapping"], questions, strict=True)
    return [_drop_tokens(_Tokens(*tokens), question).ids for *tokens, question in columns]


def _drop_tokens(row: "_Tokens", text: str, begin: int = 0) -> "_Tokens":
    """Without the tokens that begin before the character `begin`, and those that cover nothing but a `BREAK`."""
    breaks = {i for i, character in enumerate(text) if character == BREAK} if BREAK in text else ()
    if not breaks and not begin:
        return row
    is_break = [start in breaks and end == start + 1 for start, end in row.offsets]
    kept = [i for i, (start, end) in enumerate(row.offsets) if not is_break[i] and (start >= begin or start == end)]
    return _Tokens([row.ids[i] for i in kept], [row.mask[i] for i in kept], [row.offsets[i] for i in kept])


def _checked_query_len(query_len: int) -> int:
    is_number = isinstance(query_len, (int, np.integer)) and not isinstance(query_len, bool)
    if not is_number or not is_perfect_square(query_len):
        raise ValueError(f"query_len is {query_len!r}; allowed: a perfect square (1, 4, 9, 16, ...).")
    return query_len


def _as_image_block(block: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's `image_url` block, and one of datasets with `bytes` and `path`, as the ecosystem's `image` block."""
    if block["type"] == "image_url":
        return {"type": "image", "url": address_of(block)}
    return {"type": "image", "image": block["bytes"]} if block.get("bytes") is not None else block


def _check_images(images: Any, texts: list[str]) -> None:
    """
    Check that prompts have as many image marks as there are images. Images in one list per prompt must be those of the
    prompt's marks: flattened, they could go to another one.

    Raises:
        ValueError: names both numbers.
    """
    parts = list(images) if is_group(images) else [images]
    total, marks = len(defer_images(images)), sum(text.count(IMAGE_TOKEN) for text in texts)
    is_nested = total > 0 and any(part is None or is_group(part) for part in parts)
    if marks != total and not (is_nested and len(parts) == len(texts)):  # in transformers' words
        raise ValueError(
            f"The number of {IMAGE_TOKEN} tokens in the prompts should be the same as the number of images: "
            f"found {marks} {IMAGE_TOKEN} tokens and {total} images."
        )
    if not is_nested:
        return
    if len(parts) != len(texts):
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
    """Character spans, in a text without the first `count` characters, or with as many more; padding has none."""
    return [(max(start - count, 0), max(end - count, 0)) if end > start else (0, 0) for start, end in offsets]


def _replacement(text: str, shift: int, count: int) -> list[dict[str, Any]]:
    """What transformers says of an image mark that became `count` tokens, with `shift` characters less before it."""
    found, block = re.search(IMAGE_TOKEN, text), IMAGE_TOKEN * count
    if found is None:
        return []
    spans = _shifted([found.span(), (found.start(), found.start() + len(block))], shift)
    return [dict(zip(("span", "new_span"), spans, strict=True), type="image", text=IMAGE_TOKEN, replacement=block)]


def _one_per_sample(pixel_values: np.ndarray, has_image: list[bool]) -> np.ndarray:
    """Align images `(n, ...)` with samples `(B, ...)`: zeros, mid grey, for a sample without one."""
    if all(has_image):
        return pixel_values
    samples = np.zeros((len(has_image), *pixel_values.shape[1:]), dtype=pixel_values.dtype)
    samples[has_image] = pixel_values
    return samples


FusionProcessor.register_for_auto_class()

__all__ = ["FusionProcessor"]
