"""Processor of FUSION: chat templates, image and latent blocks, questions, and prompt ends.

The sequence matches the input of the authors' LLM (FUSION, arXiv 2504.09925, and their code): the image block, the
latent block of turn 1, question 1, then the latent block and the question of each further turn.
"""

import copy
import re
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import BatchFeature, ProcessorMixin
from transformers.processing_utils import MultiModalData

from .chat_fusion import (
    CHAT_FORMATS,
    IMAGE_TOKEN,
    LATENT_TOKEN,
    MARKS,
    VISION_BLOCKS,
    ChatFormat,
    TextProtector,
    check_tokenizer,
    derive_chat_format,
    join_questions,
    prepare_messages,
    require_question,
)
from .configuration_fusion import FusionConfig, is_perfect_square, require
from .image_sources_fusion import defer_images, is_group
from .prompt_tokens_fusion import PromptTokens, describe_replacement, pad_rows, shift_offsets, tokenize_alone

# Outputs of the processor that the model can also find in the ids.
TURN_INPUTS = ("instruct_input_ids", "instruct_attention_mask", "prompt_end_positions")
# Arguments of the processor that the model's configuration has as well.
FIELDS_OF_CONFIG = ("num_image_tokens", "query_len", "instruct_pad_token_id")
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
DEFAULT_SIDE, DEFAULT_IMAGE_TOKENS = 384, 729  # of FUSION 3B and 8B
AS_TEXT = {"tokenize": False, "return_dict": False}  # of `apply_chat_template`
NO_LATENTS = (
    f"A prompt has {IMAGE_TOKEN} but no {LATENT_TOKEN}, so it was not written by FUSION's chat template. The model "
    "gets no latent tokens, and only the text behind the image as a question. Use `apply_chat_template`."
)
DO_NOT_PAD, MAX_LENGTH = "do_not_pad", "max_length"  # values of `padding`, as strings or as transformers' enumeration


class FusionProcessor(ProcessorMixin):
    """
    Constructs a FUSION processor, which combines an image processor and a tokenizer and arranges FUSION's sequence.

    Args:
        image_processor ([`FusionImageProcessor`]): Image processor that makes the tiles.
        tokenizer ([`PreTrainedTokenizerBase`]): Tokenizer that knows FUSION's four special tokens.
        chat_template (`str`, *optional*): Jinja template. Defaults to the template of `chat_format`.
        chat_format (`str`, *optional*): Headers and separators of the backbone, a key of `CHAT_FORMATS`. Defaults to
            the format whose tokens the tokenizer knows.
        num_image_tokens (`int`, *optional*): Number of image tokens per image. Defaults to 729 for tiles of 384
            pixels. For other sizes without this value, calls need `image_token_grid`.
        query_len (`int`, defaults to 36): Number of latent tokens per turn, a perfect square.
        instruct_pad_token_id (`int`, defaults to 0): Id that pads the questions and is ignored in them.

    Raises:
        ValueError: If `query_len` or `chat_format` is not supported, or if the tokenizer lacks a token.

    Example:

    ```python
    >>> from PIL import Image
    >>> from fusion_hf import FusionProcessor, nano_path
    >>> processor = FusionProcessor.from_pretrained(nano_path())
    >>> image = {"type": "image", "image": Image.new("RGB", (64, 48), "red")}
    >>> messages = [{"role": "user", "content": [image, {"type": "text", "text": "what color is the image?"}]}]
    >>> options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    >>> inputs = processor.apply_chat_template(messages, **options)
    >>> tuple(inputs["pixel_values"].shape)
    (1, 5, 3, 48, 48)
    >>> # for a later question about the same image, whose features you keep
    >>> sorted(processor.apply_chat_template(messages, process_images=False, **options))
    ['attention_mask', 'input_ids', 'instruct_attention_mask', 'instruct_input_ids', 'prompt_end_positions']

    ```
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
            raise ValueError(
                f"`chat_format` must be one of {', '.join(map(repr, CHAT_FORMATS))}, got {chat_format!r}."
            )
        check_tokenizer(tokenizer, chat_format)
        self.chat_format = chat_format
        if num_image_tokens is None and image_processor.size["height"] == DEFAULT_SIDE:
            num_image_tokens = DEFAULT_IMAGE_TOKENS
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
        if tokenizer.chat_template is None:  # so that a tokenizer used or saved on its own has FUSION's template
            tokenizer.chat_template = template
        super().__init__(image_processor, tokenizer, chat_template=template, **kwargs)

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        Read the arguments of the processor from a model folder or repository.

        They come from `processor_config.json` or, if the tokenizer and the image processor were saved separately (as
        `Pipeline.save_pretrained` does), from the model's `config.json`.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Model folder or repository.
            kwargs: Arguments of `from_pretrained`, such as the `image_token_grid` of the model (FUSION-L: 16).

        Raises:
            ValueError: If neither file has a value, or if the grid is impossible.
        """
        values, unused = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        grid = unused.pop("image_token_grid", None)
        if grid is not None:
            unused["num_image_tokens"] = _checked_grid(grid) ** 2
        missing = [name for name in FIELDS_OF_CONFIG if name not in values and name not in unused]
        if missing:
            hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
            try:
                found, _ = FusionConfig.get_config_dict(pretrained_model_name_or_path, **hub)
            except OSError:  # newer releases of transformers return nothing if the file does not exist
                found = None
            if not found or found.get("model_type") != FusionConfig.model_type:
                names = ", ".join(f"`{name}`" for name in missing)
                raise ValueError(
                    f"{pretrained_model_name_or_path} has neither a processor_config.json nor the config.json of a "
                    f"FUSION model. Pass {names}, or save the processor there with `processor.save_pretrained`."
                )
            config = FusionConfig.from_dict(found)
            values |= {name: getattr(config, name) for name in missing}
        return values, unused

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", *(TURN_INPUTS if self.returns_turns else ())]

    def without_turns(self) -> "FusionProcessor":
        """
        Return a copy that returns only ids, masks and images, so that the model finds turns and questions.

        Use it for callers that pass on no other inputs, such as TRL. A saved copy is an ordinary processor.
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
        Convert conversations to text or, with `tokenize=True, return_dict=True`, to model inputs.

        The content of a message is a string, or a list of blocks `{"type": "text", "text": ...}` and
        `{"type": "image", "image" | "url" | "path" | "base64": ...}`. A conversation has at most one image. Text that
        looks like a control token stays text.

        Args:
            conversation (`list`): Messages of one conversation, or a list of conversations.
            chat_template (`str`, *optional*): Template to use instead of the processor's own.
            query_len (`int`, *optional*): Number of latent tokens per turn. Defaults to the processor's.
            image_token_grid (`int`, *optional*): Side of the grid of image tokens.
            process_images (`bool`, defaults to `True`): Whether to open the images. If False, image blocks need none.
            kwargs: Arguments of [`ProcessorMixin.apply_chat_template`].

        Returns:
            `str`, `list[str]` or [`BatchFeature`]: Prompts, or inputs as `__call__` returns them.

        Raises:
            ValueError: If FUSION cannot read a message, or if the template lacks something. The message names it.
        """
        self.count_image_tokens(image_token_grid)
        # transformers' own sanitizing breaks offsets, and older releases lack it: texts are protected here anyway
        sanitize = bool(kwargs.pop("sanitize_control_tokens", False))
        protector = TextProtector(self.tokenizer, sanitize)
        if sanitize:
            kwargs = protector.protect_all(kwargs)
        processor_kwargs = dict(kwargs.pop("processor_kwargs", None) or {})
        query_len = processor_kwargs.get("query_len") if query_len is None else query_len
        is_list = isinstance(conversation, (list, tuple)) and bool(conversation)
        batched = is_list and isinstance(conversation[0], (list, tuple))
        prepared = []
        for number, messages in enumerate(conversation if batched else [conversation]):
            where = f"conversation[{number}]." if batched else ""
            prepared.append(prepare_messages(messages, protector, where, keep_images=process_images))
            if kwargs.get("add_generation_prompt"):
                require_question(prepared[-1], where)
        length = self.query_len if query_len is None else _checked_query_len(query_len)
        chats = prepared if batched else prepared[0]
        template = str(self.chat_template if chat_template is None else chat_template)
        if "query_len" in template:  # older releases of transformers drop `processor_kwargs` beside other arguments
            kwargs["query_len"] = length
        if not kwargs.get("tokenize"):
            text = super().apply_chat_template(chats, chat_template=chat_template, **kwargs)
            return [_order_marks(each) for each in text] if batched else _order_marks(text)
        if any(message["role"] == "assistant" for messages in prepared for message in messages):
            self._check_headers(prepared, chat_template, template, kwargs)
        # a block of one latent token looks like a mark that stands for a whole block, so pass the length
        processor_kwargs["query_len"] = length
        if not process_images:
            processor_kwargs["process_images"] = False
        if self.returns_turns:
            processor_kwargs.setdefault("questions", [join_questions(messages) for messages in prepared])
        if image_token_grid is not None:
            processor_kwargs["image_token_grid"] = image_token_grid
        return super().apply_chat_template(
            chats, chat_template=chat_template, processor_kwargs=processor_kwargs, **kwargs
        )

    def _check_headers(
        self, prepared: list[list[dict[str, Any]]], chat_template: str | None, template: str, kwargs: dict[str, Any]
    ) -> None:
        """Check that a custom template marks where answers begin, by the assistant header of the chat format."""
        header = self._format.assistant_header
        if header.replace("\n", "\\n") in template:
            return
        options = {"chat_template": chat_template, **kwargs, **AS_TEXT}
        for messages, text in zip(prepared, super().apply_chat_template(prepared, **options), strict=True):
            answers = sum(message["role"] == "assistant" for message in messages)
            answers += bool(kwargs.get("add_generation_prompt"))
            if text.count(header) != answers:
                raise ValueError(
                    f"The chat template must write {answers} assistant headers {header!r}, those of `chat_format` = "
                    f"{self.chat_format!r}, so that prompt ends can be found, got {text.count(header)}."
                )

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        query_len: int | None = None,
        image_token_grid: int | None = None,
        questions: str | list[str] | None = None,
        process_images: bool | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Convert prompts, as `apply_chat_template` writes them, and their images to model inputs.

        Args:
            images (*optional*): One image for each `<image>` in the prompts.
            text (`str` or `list[str]`, *optional*): Prompts. A single `<latent_image>` stands for a whole latent
                block, and `<image>` for all image tokens. A latent block before the image is moved behind it.
            query_len (`int`, *optional*): Number of latent tokens per turn. Defaults to the processor's.
            image_token_grid (`int`, *optional*): Side of the grid of image tokens, `image_token_grid ** 2` per image.
            questions (`str` or `list[str]`, *optional*): One text per prompt that guides the vision tower. Defaults to
                the user messages or, in a prompt without user headers, to the text behind the image.
            process_images (`bool`, *optional*): Pass False if the model gets the images in another way, such as
                `global_features` of an earlier question. Prompts are the same, but there are no `pixel_values`.

        Returns:
            [`BatchFeature`]: `input_ids`, `attention_mask` `(B, S)`, `instruct_input_ids`, `instruct_attention_mask`
            `(B, T)`, `prompt_end_positions` `(B, R)` and, with an image, `pixel_values` `(B, 5, 3, H, W)`.

        Raises:
            ValueError: If counts disagree, or if a prompt exceeds `tokenizer.model_max_length`.
        """
        num_image_tokens = self.count_image_tokens(image_token_grid)
        if questions is not None and not self.returns_turns:
            raise ValueError(
                "`questions` must be None for a processor `without_turns()`: the model finds them in ids."
            )
        process_images = process_images is not False
        if images is not None and not process_images:
            raise ValueError("`images` must be None with `process_images=False`.")
        if text is None:
            return super().__call__(images=None if images is None else defer_images(images), **kwargs)
        if not isinstance(text, (str, list, tuple)) or text in ([], ()):
            raise ValueError(f"`text` must be a string or a list of one or more strings, got {text!r}.")
        text_kwargs = kwargs.get("text_kwargs", {}) | kwargs.get("common_kwargs", {}) | kwargs
        given, kwargs = self._without_first_token([text] if isinstance(text, str) else list(text), text_kwargs, kwargs)
        prompts = [self._arrange(*each, query_len, num_image_tokens) for each in given]
        texts = [prompt.text for prompt in prompts]
        if any(IMAGE_TOKEN in t and LATENT_TOKEN not in t for t in texts):
            warnings.warn(NO_LATENTS, stacklevel=2)
        if process_images:
            _check_images(images, texts)
        tensors = text_kwargs.get("return_tensors")
        kwargs = _without(kwargs, "return_tensors")
        flat_images, data = defer_images(images), {}
        if flat_images:  # as one array instead of a list
            images_kwargs = {**kwargs.get("images_kwargs", {}), "return_tensors": "np"}
            pixels = super().__call__(images=flat_images, **kwargs | {"images_kwargs": images_kwargs})["pixel_values"]
            data["pixel_values"] = _one_per_sample(pixels, [IMAGE_TOKEN in t for t in texts])
        rows = self._tokenize(prompts, tensors is not None, text_kwargs, kwargs)
        data = self._outputs(prompts, rows, questions, text_kwargs) | data
        return BatchFeature(data, tensor_type=tensors, skip_tensor_conversion=self.skip_tensor_conversion)

    def _without_first_token(
        self, texts: list[Any], text_kwargs: dict[str, Any], kwargs: dict[str, Any]
    ) -> tuple[list[tuple[Any, bool]], dict[str, Any]]:
        """Remove the tokenizer's first token from texts, and tell which had it: the tokenizer adds it once."""
        begins = [bool(self.begin) and isinstance(text, str) and text.startswith(self.begin) for text in texts]
        if not all(begins) and not (any(begins) and text_kwargs.get("add_special_tokens", True)):
            return [(text, False) for text in texts], kwargs
        kwargs = _without(kwargs, "add_special_tokens") | {"add_special_tokens": True}
        pairs = zip(texts, begins, strict=True)
        return [(text.removeprefix(self.begin) if begin else text, begin) for text, begin in pairs], kwargs

    def _tokenize(
        self, prompts: list["_ArrangedText"], needs_padding: bool, text_kwargs: dict[str, Any], kwargs: dict[str, Any]
    ) -> list[PromptTokens]:
        """Tokenize prompts, with padding if the arguments ask for it or if the result becomes tensors."""
        if needs_padding and "padding" not in text_kwargs | self.tokenizer.init_kwargs:
            kwargs = kwargs | {"padding": True}
        kwargs = kwargs | {"return_offsets_mapping": True}
        features = super().__call__(text=[prompt.expanded for prompt in prompts], **kwargs)
        columns = (features[name] for name in ("input_ids", "attention_mask", "offset_mapping"))
        before_answer, begins_with_answer = self._format.before_answer, self._format.begins_with_answer
        rows = [
            PromptTokens(*row).drop(prompt.expanded, len(before_answer) * begins_with_answer(prompt.given))
            for *row, prompt in zip(*columns, prompts, strict=True)
        ]
        padding = {**self.tokenizer.init_kwargs, **text_kwargs, **kwargs}.get("padding")
        padded = len(features["input_ids"][0])
        if padding not in (None, False, DO_NOT_PAD) and any(len(row.ids) < padded for row in rows):
            # without the dropped tokens, rows differ in length again
            fixed = padding == MAX_LENGTH or text_kwargs.get("pad_to_multiple_of")
            length = padded if fixed else max(sum(row.mask) for row in rows)
            on_left = text_kwargs.get("padding_side", self.tokenizer.padding_side) == "left"
            rows = [row.pad(length, self.tokenizer.pad_token_id, on_left) for row in rows]
        if not text_kwargs.get("truncation"):
            self._check_length(rows)
        return rows

    def _outputs(
        self,
        prompts: list["_ArrangedText"],
        rows: list[PromptTokens],
        questions: str | list[str] | None,
        text_kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """Build the outputs of a call besides the images."""
        data: dict[str, Any] = {
            "input_ids": [row.ids for row in rows],
            "attention_mask": [row.mask for row in rows],
        }
        if self.returns_turns:
            data |= self._questions([prompt.text for prompt in prompts], questions)
            pairs = zip(rows, prompts, strict=True)
            ends = pad_rows([self._prompt_ends(row, prompt.expanded) for row, prompt in pairs], -1)
            # integers even if there are no turns
            is_array = text_kwargs.get("return_tensors") is not None
            whole = np.array(ends, dtype=np.int64).reshape(len(rows), -1) if is_array else ends
            data["prompt_end_positions"] = whole
        if text_kwargs.get("return_offsets_mapping"):
            if any(_order_marks(prompt.given) != prompt.given for prompt in prompts):
                raise ValueError(
                    f"`return_offsets_mapping` needs a text in FUSION's order, with {IMAGE_TOKEN} before the first "
                    f"{LATENT_TOKEN}. Write prompts with FUSION's chat template."
                )
            # character spans in the prompt as the caller passed it, without the prefix and with its first token
            pairs = zip(rows, prompts, strict=True)
            data["offset_mapping"] = [shift_offsets(row.offsets, prompt.shift) for row, prompt in pairs]
        if text_kwargs.get("return_text_replacement_offsets"):
            data["text_replacement_offsets"] = [
                describe_replacement(prompt.text, prompt.shift, prompt.num_image_tokens) for prompt in prompts
            ]
        if text_kwargs.get("return_mm_token_type_ids"):
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        return data

    @property
    def _format(self) -> ChatFormat:
        return CHAT_FORMATS[self.chat_format]

    def count_image_tokens(self, image_token_grid: int | None = None) -> int:
        """
        Return the number of image tokens of one image.

        Args:
            image_token_grid (`int`, *optional*): Side of the grid. Defaults to the processor's `num_image_tokens`.

        Raises:
            ValueError: If `image_token_grid` is not a whole number of at least 1, or if there is no default.
        """
        if image_token_grid is None:
            if self.num_image_tokens is None:
                side = self.image_processor.size["height"]
                raise ValueError(
                    f"`num_image_tokens` has no default for tiles of {side} pixels. Pass that of the configuration."
                )
            return self.num_image_tokens
        return _checked_grid(image_token_grid) ** 2

    def _get_num_multimodal_tokens(
        self, image_sizes: list[tuple[int, int]] | None = None, image_token_grid: int | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Count the image tokens and the entries of `pixel_values` for images. One entry holds all tiles."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        tokens = [self.count_image_tokens(image_token_grid)] * count
        return MultiModalData(num_image_tokens=tokens, num_image_patches=[1] * count)

    def validate_inputs(self, images: Any = None, text: list[str] | None = None, **kwargs: Any) -> None:
        """Check as transformers does, except for the number of images, which `__call__` compares with the marks."""
        without_marks = None if text is None else [each.replace(IMAGE_TOKEN, "") for each in text]
        super().validate_inputs(images=images, text=without_marks, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        return IMAGE_TOKEN * self.count_image_tokens()

    def _arrange(self, text: Any, has_begin: bool, query_len: int | None, num_image_tokens: int) -> "_ArrangedText":
        """Put the image mark first, expand latent marks to blocks of the call's length, and add the prefix."""
        require(isinstance(text, str), "text", text, "a string or a list of strings")
        length = self.query_len if query_len is None else _checked_query_len(query_len)
        marks = MARKS.findall(text)
        if marks.count(IMAGE_TOKEN) > 1:
            raise ValueError(f"A prompt must have at most 1 {IMAGE_TOKEN}, got {marks.count(IMAGE_TOKEN)}.")
        for number, mark in enumerate(marks):
            if mark == IMAGE_TOKEN:
                continue
            count = len(mark) // len(LATENT_TOKEN)
            if count == 1:
                marks[number] = LATENT_TOKEN * length
            elif query_len is not None and count != length:
                raise ValueError(f"A latent block must have {length} tokens (`query_len`), got {count}.")
        ordered = iter(marks)
        prefix = self._prefix(text)
        arranged = prefix + _order_marks(MARKS.sub(lambda _: next(ordered), text))
        shift = len(prefix) - len(self.begin) * has_begin
        return _ArrangedText(text, arranged, shift, num_image_tokens)

    def _prefix(self, text: str) -> str:
        """Return the text that must precede a text, so that its ids are the same as in a conversation."""
        if self._format.begins_with_answer(text):
            return self._format.before_answer
        if not self._format.prompt_prefix:
            return ""
        begins_special = text.startswith(tuple(t.content for t in self.tokenizer.added_tokens_decoder.values()))
        return self._format.prompt_prefix if begins_special else ""

    def _check_length(self, rows: list[PromptTokens]) -> None:
        longest, most = max(sum(row.mask) for row in rows), self.tokenizer.model_max_length
        if longest > most:
            raise ValueError(
                f"A prompt must have at most {most} tokens (`tokenizer.model_max_length`), got {longest}."
            )

    def _questions(self, texts: list[str], given: str | list[str] | None) -> dict[str, list[list[int]]]:
        """Tokenize the questions of each prompt on their own. A prompt without an image has no question."""
        if given is not None:
            questions = list(map(TextProtector(self.tokenizer).break_up, [given] if isinstance(given, str) else given))
        else:
            questions = [self._find_question(text) if IMAGE_TOKEN in text else "" for text in texts]
        if len(questions) != len(texts):
            raise ValueError(f"`questions` must have one text for each of {len(texts)} prompts, got {len(questions)}.")
        rows = tokenize_alone(questions, self.tokenizer)
        rows = [ids if IMAGE_TOKEN in text else [] for ids, text in zip(rows, texts, strict=True)]
        ids = pad_rows([row or [self.instruct_pad_token_id] for row in rows], self.instruct_pad_token_id)
        mask = [[int(i != self.instruct_pad_token_id) for i in row] for row in ids]
        return {"instruct_input_ids": ids, "instruct_attention_mask": mask}

    def _find_question(self, text: str) -> str:
        """Return the user messages of a prompt with an image."""
        chat_format = self._format
        # the last user message may be open, so that the model continues it
        end = f"(?:{re.escape(chat_format.turn_end)}|{re.escape(chat_format.assistant_header)}|\\Z)"
        turns = re.findall(re.escape(chat_format.user_header) + "(.*?)" + end, text, re.DOTALL)
        if not turns and len(re.findall(f"(?:{LATENT_TOKEN})+", text)) > 1:
            raise ValueError(
                f"A prompt has several latent blocks but no user header {chat_format.user_header!r}, so its questions "
                "cannot be found. Pass `questions`."
            )
        if not turns:
            # another template: the text before the marks may be a system message, so it is not a question
            turns = re.split(end, text[[mark.end() for mark in VISION_BLOCKS.finditer(text)][-1] :])[:1]
        return "".join(VISION_BLOCKS.sub("", turn).strip() for turn in turns)

    def _prompt_ends(self, row: PromptTokens, text: str) -> list[int]:
        """Find the last token of each assistant header, or of a prompt with a latent block but no header."""
        attended = [i for i, mask in enumerate(row.mask) if mask]
        if LATENT_TOKEN not in text or not attended:
            return []
        header = self._format.assistant_header
        ends = [match.end() for match in re.finditer(re.escape(header), text)]
        if not ends:
            blocks = len(re.findall(f"(?:{LATENT_TOKEN})+", text))
            if blocks > 1:
                raise ValueError(
                    f"A prompt has {blocks} latent blocks but no assistant header {header!r}, so the ends of its "
                    f"turns cannot be found. Use the headers of `chat_format` = {self.chat_format!r}."
                )
            return [attended[-1]]
        last_character = row.offsets[attended[-1]][1]  # less than the text's length after truncation
        starts = np.array([row.offsets[i][0] for i in attended])
        found = [attended[np.flatnonzero(starts < end)[-1]] for end in ends if end <= last_character]
        kept = sum(row.ids[i] == self.latent_token_id for i in attended)
        if kept == text.count(LATENT_TOKEN):
            return found
        # a turn has no end if truncation removed its latent block, which may be behind the end
        length = next(len(mark) // len(LATENT_TOKEN) for mark in MARKS.findall(text) if mark != IMAGE_TOKEN)
        return found[: -(-kept // length)]


@dataclass(frozen=True)
class _ArrangedText:
    """A text that a caller passed, and the text that is tokenized for it."""

    given: str  # without the tokenizer's first token
    text: str  # with one image mark at most, in its place
    shift: int  # number of characters that were added before the text, minus those that were removed
    num_image_tokens: int

    @property
    def expanded(self) -> str:
        """The text with all of its image tokens."""
        return self.text.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.num_image_tokens)


def _order_marks(text: str) -> str:
    """Move the image mark first, since the authors' code fills the first mark of a conversation with the image."""
    marks = sorted(MARKS.findall(text), key=lambda mark: mark != IMAGE_TOKEN)  # stable: only the image moves
    ordered = iter(marks)
    return MARKS.sub(lambda _: next(ordered), text)


def _checked_query_len(query_len: int) -> int:
    is_number = isinstance(query_len, (int, np.integer)) and not isinstance(query_len, bool)
    is_valid = is_number and is_perfect_square(query_len)
    require(is_valid, "query_len", query_len, "a perfect square (1, 4, 9, 16, ...)")
    return query_len


def _checked_grid(grid: int) -> int:
    require(isinstance(grid, int) and grid >= 1, "image_token_grid", grid, "a whole number of at least 1")
    return grid


def _check_images(images: Any, texts: list[str]) -> None:
    """Compare the image marks of prompts with the images, prompt by prompt if images are nested lists."""
    parts = list(images) if is_group(images) else [images]
    total, marks = len(defer_images(images)), sum(text.count(IMAGE_TOKEN) for text in texts)
    is_nested = total > 0 and any(part is None or is_group(part) for part in parts)
    if marks != total and not (is_nested and len(parts) == len(texts)):  # the message of transformers
        raise ValueError(
            f"The number of {IMAGE_TOKEN} tokens in the prompts should be the same as the number of images: "
            f"found {marks} {IMAGE_TOKEN} tokens and {total} images."
        )
    if not is_nested:
        return
    if len(parts) != len(texts):
        raise ValueError(f"`images` must have one list for each of {len(texts)} prompts, got {len(parts)}.")
    for number, (part, text) in enumerate(zip(parts, texts, strict=True)):
        marks, count = text.count(IMAGE_TOKEN), len(defer_images(part))
        if marks != count:
            allowed = f"one {IMAGE_TOKEN} for each of the {count} images in `images[{number}]`"
            raise ValueError(f"Prompt {number} must have {allowed}, got {marks}.")


def _without(kwargs: dict[str, Any], name: str) -> dict[str, Any]:
    """Copy (nested) keyword arguments without `name`."""
    return {k: _without(v, name) if isinstance(v, dict) else v for k, v in kwargs.items() if k != name}


def _one_per_sample(pixel_values: np.ndarray, has_image: list[bool]) -> np.ndarray:
    """Align images `(n, ...)` with samples `(B, ...)`. Samples without an image get zeros, which are mid grey."""
    if all(has_image):
        return pixel_values
    samples = np.zeros((len(has_image), *pixel_values.shape[1:]), dtype=pixel_values.dtype)
    samples[has_image] = pixel_values
    return samples


FusionProcessor.register_for_auto_class()

__all__ = ["FusionProcessor"]
