"""Chats and images to FUSION's inputs: chat templates, image and latent blocks, questions, prompt ends.

The sequence is what the authors' LLM reads (FUSION, arXiv 2504.09925, and their code): image block, latent block of
turn 1, question 1, then latent block and question of each further turn.
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
from .configuration_fusion import FusionConfig, is_perfect_square
from .image_sources_fusion import defer_images, is_group
from .prompt_tokens_fusion import PromptTokens, describe_replacement, pad_rows, shift_offsets, tokenize_alone

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
            tiles of 384 pixels only. Without either, calls need `image_token_grid`.
        query_len (`int`): default number of latent tokens per turn.
        instruct_pad_token_id (`int`): padding of the question, and ignored in it.

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
    >>> # of a later question about the image, whose features are kept
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
            raise ValueError(f"chat_format is {chat_format!r}; allowed: {', '.join(map(repr, CHAT_FORMATS))}.")
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
        if tokenizer.chat_template is None:  # so that a tokenizer that is used, or saved, by itself has FUSION's
            tokenizer.chat_template = template
        super().__init__(image_processor, tokenizer, chat_template=template, **kwargs)

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        Read `processor_config.json` or, in a folder to which the tokenizer and the image processor were saved one by
        one (as `Pipeline.save_pretrained` does), the same values of the model's `config.json`. An `image_token_grid`
        (FUSION-L: 16) is the side of the grid that the model's configuration gets under the same name.

        Raises:
            ValueError: names what neither file holds, or an impossible grid.
        """
        values, unused = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        grid = unused.pop("image_token_grid", None)
        if grid is not None:
            if not isinstance(grid, int) or grid < 1:
                raise ValueError(f"image_token_grid is {grid!r}; allowed: a whole number from 1.")
            unused["num_image_tokens"] = grid**2
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
            processor_kwargs.setdefault("questions", [join_questions(messages) for messages in prepared])
        if image_token_grid is not None:
            processor_kwargs["image_token_grid"] = image_token_grid
        return super().apply_chat_template(
            chats, chat_template=chat_template, processor_kwargs=processor_kwargs, **kwargs
        )

    def _check_headers(
        self, prepared: list[list[dict[str, Any]]], chat_template: str | None, template: str, kwargs: dict[str, Any]
    ) -> None:
        """Check that a template of the caller's own says where answers begin: writes the format's assistant header."""
        header = self._format.assistant_header
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
        process_images: bool | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Prompts, as `apply_chat_template` writes them, and one image for each `<image>` in them.

        A single `<latent_image>` stands for a block of `query_len`, `<image>` for `image_token_grid ** 2` image tokens
        (default: `num_image_tokens`). The authors' order of marks (latent block before the image) is accepted and
        swapped. Batches that become tensors are padded. `questions` guide the vision tower, one text for each prompt;
        default: the user messages in the prompt or, in a prompt without the user header of `chat_format`, what is
        behind its image. `process_images=False` (default: True) is for prompts whose images the model gets in another
        way, such as `global_features` that were computed for an earlier question: `<image>` is written as for an
        image, but none is taken, opened or resized, and there are no `pixel_values`.

        Returns `input_ids`, `attention_mask` `(B, S)`, `instruct_input_ids`, `instruct_attention_mask` `(B, T)`,
        `prompt_end_positions` `(B, R)` and, if there is an image, `pixel_values` `(B, 5, 3, H, W)`.

        Raises:
            ValueError: for counts that disagree, and prompts longer than `tokenizer.model_max_length`; names both.
        """
        num_image_tokens = self.count_image_tokens(image_token_grid)
        if questions is not None and not self.returns_turns:
            raise ValueError(
                "`questions` must be None for a processor `without_turns()`: the model finds them in ids."
            )
        process_images = process_images is not False
        if images is not None and not process_images:
            raise ValueError("`images` must be None with `process_images=False`, which is for images that you keep.")
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
        if flat_images:  # as one array, not a list
            images_kwargs = {**kwargs.get("images_kwargs", {}), "return_tensors": "np"}
            pixels = super().__call__(images=flat_images, **kwargs | {"images_kwargs": images_kwargs})["pixel_values"]
            data["pixel_values"] = _one_per_sample(pixels, [IMAGE_TOKEN in t for t in texts])
        rows = self._tokenize(prompts, tensors is not None, text_kwargs, kwargs)
        data = self._outputs(prompts, rows, questions, text_kwargs) | data
        return BatchFeature(data, tensor_type=tensors, skip_tensor_conversion=self.skip_tensor_conversion)

    def _without_first_token(
        self, texts: list[Any], text_kwargs: dict[str, Any], kwargs: dict[str, Any]
    ) -> tuple[list[tuple[Any, bool]], dict[str, Any]]:
        """Texts without the tokenizer's first token, each with whether it had one: it is put before the ids, once."""
        begins = [bool(self.begin) and isinstance(text, str) and text.startswith(self.begin) for text in texts]
        if not all(begins) and not (any(begins) and text_kwargs.get("add_special_tokens", True)):
            return [(text, False) for text in texts], kwargs
        kwargs = _without(kwargs, "add_special_tokens") | {"add_special_tokens": True}
        pairs = zip(texts, begins, strict=True)
        return [(text.removeprefix(self.begin) if begin else text, begin) for text, begin in pairs], kwargs

    def _tokenize(
        self, prompts: list["_ArrangedText"], needs_padding: bool, text_kwargs: dict[str, Any], kwargs: dict[str, Any]
    ) -> list[PromptTokens]:
        """Tokens of prompts, padded as the arguments say, or where they become tensors."""
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
            # without the tokens that were dropped, rows differ in length again
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
        """What a call returns beside the images."""
        data: dict[str, Any] = {
            "input_ids": [row.ids for row in rows],
            "attention_mask": [row.mask for row in rows],
        }
        if self.returns_turns:
            data |= self._questions([prompt.text for prompt in prompts], questions)
            pairs = zip(rows, prompts, strict=True)
            ends = pad_rows([self._prompt_ends(row, prompt.expanded) for row, prompt in pairs], -1)
            # of whole numbers, even where there are no turns
            is_array = text_kwargs.get("return_tensors") is not None
            whole = np.array(ends, dtype=np.int64).reshape(len(rows), -1) if is_array else ends
            data["prompt_end_positions"] = whole
        if text_kwargs.get("return_offsets_mapping"):
            if any(_order_marks(prompt.given) != prompt.given for prompt in prompts):
                raise ValueError(
                    f"`return_offsets_mapping` needs a text in FUSION's order, with {IMAGE_TOKEN} before the first "
                    f"{LATENT_TOKEN}. Write it with FUSION's chat template."
                )
            # character spans in the prompt as it was given, without the prefix and with its first token
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
        """Image tokens of one image: of the given grid, or `num_image_tokens`. The model knows how many it can give.

        Raises:
            ValueError: if what is given is no whole number from 1, or if nothing is given and there is no default.
        """
        if image_token_grid is None:
            if self.num_image_tokens is None:
                side = self.image_processor.size["height"]
                raise ValueError(
                    f"`num_image_tokens` is missing, and tiles have {side} pixels a side. Pass the `num_image_tokens` "
                    "of the model's configuration to the processor."
                )
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
        return IMAGE_TOKEN * self.count_image_tokens()

    def _arrange(self, text: Any, has_begin: bool, query_len: int | None, num_image_tokens: int) -> "_ArrangedText":
        """Image mark first, latent marks as whole blocks of the call's length, the family's prefix in front."""
        if not isinstance(text, str):
            raise ValueError(f"text holds a {type(text).__name__}; allowed: a string or a list of strings.")
        length = self.query_len if query_len is None else _checked_query_len(query_len)
        marks = MARKS.findall(text)
        if marks.count(IMAGE_TOKEN) > 1:
            raise ValueError(f"A prompt has {marks.count(IMAGE_TOKEN)} {IMAGE_TOKEN} marks; FUSION reads 1 image.")
        for number, mark in enumerate(marks):
            if mark == IMAGE_TOKEN:
                continue
            count = len(mark) // len(LATENT_TOKEN)
            if count == 1:
                marks[number] = LATENT_TOKEN * length
            elif query_len is not None and count != length:
                raise ValueError(f"A latent block has {count} tokens, but query_len is {length}.")
        ordered = iter(marks)
        prefix = self._prefix(text)
        arranged = prefix + _order_marks(MARKS.sub(lambda _: next(ordered), text))
        shift = len(prefix) - len(self.begin) * has_begin
        return _ArrangedText(text, arranged, shift, num_image_tokens)

    def _prefix(self, text: str) -> str:
        """What the tokenizer must see before a text, to give it the ids that it has in a conversation."""
        if self._format.begins_with_answer(text):
            return self._format.before_answer
        if not self._format.prompt_prefix:
            return ""
        begins_special = text.startswith(tuple(t.content for t in self.tokenizer.added_tokens_decoder.values()))
        return self._format.prompt_prefix if begins_special else ""

    def _check_length(self, rows: list[PromptTokens]) -> None:
        longest, most = max(sum(row.mask) for row in rows), self.tokenizer.model_max_length
        if longest > most:
            raise ValueError(f"A prompt has {longest} tokens; allowed: tokenizer.model_max_length = {most}.")

    def _questions(self, texts: list[str], given: str | list[str] | None) -> dict[str, list[list[int]]]:
        """The questions of each prompt, tokenised on their own; a prompt without image has none."""
        if given is not None:
            questions = list(map(TextProtector(self.tokenizer).break_up, [given] if isinstance(given, str) else given))
        else:
            questions = [self._find_question(text) if IMAGE_TOKEN in text else "" for text in texts]
        if len(questions) != len(texts):
            raise ValueError(f"`questions` must hold a text for each of {len(texts)} prompts, got {len(questions)}.")
        rows = tokenize_alone(questions, self.tokenizer)
        rows = [ids if IMAGE_TOKEN in text else [] for ids, text in zip(rows, texts, strict=True)]
        ids = pad_rows([row or [self.instruct_pad_token_id] for row in rows], self.instruct_pad_token_id)
        mask = [[int(i != self.instruct_pad_token_id) for i in row] for row in ids]
        return {"instruct_input_ids": ids, "instruct_attention_mask": mask}

    def _find_question(self, text: str) -> str:
        """The user messages of a prompt with an image."""
        chat_format = self._format
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

    def _prompt_ends(self, row: PromptTokens, text: str) -> list[int]:
        """Index of the last token of each assistant header; of the prompt, if it has no header but a latent block."""
        attended = [i for i, mask in enumerate(row.mask) if mask]
        if LATENT_TOKEN not in text or not attended:
            return []
        header = self._format.assistant_header
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


@dataclass(frozen=True)
class _ArrangedText:
    """A text of a call, and what is tokenized for it."""

    given: str  # without the tokenizer's first token
    text: str  # with one image mark at most, in its place
    shift: int  # characters before the text that the caller did not give, less those that were taken
    num_image_tokens: int

    @property
    def expanded(self) -> str:
        """The text with all image tokens."""
        return self.text.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.num_image_tokens)


def _order_marks(text: str) -> str:
    """The text with its image mark first: the authors' code fills the first mark of a conversation with the image."""
    marks = sorted(MARKS.findall(text), key=lambda mark: mark != IMAGE_TOKEN)  # stable: only the image moves
    ordered = iter(marks)
    return MARKS.sub(lambda _: next(ordered), text)


def _checked_query_len(query_len: int) -> int:
    is_number = isinstance(query_len, (int, np.integer)) and not isinstance(query_len, bool)
    if not is_number or not is_perfect_square(query_len):
        raise ValueError(f"query_len is {query_len!r}; allowed: a perfect square (1, 4, 9, 16, ...).")
    return query_len


def _check_images(images: Any, texts: list[str]) -> None:
    """Compare prompts' image marks with images, prompt by prompt where lists say which images are whose."""
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


def _one_per_sample(pixel_values: np.ndarray, has_image: list[bool]) -> np.ndarray:
    """Align images `(n, ...)` with samples `(B, ...)`: zeros, mid grey, for a sample without one."""
    if all(has_image):
        return pixel_values
    samples = np.zeros((len(has_image), *pixel_values.shape[1:]), dtype=pixel_values.dtype)
    samples[has_image] = pixel_values
    return samples


FusionProcessor.register_for_auto_class()

__all__ = ["FusionProcessor"]
