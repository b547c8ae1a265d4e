"""A model with its processor, and conversations with it: what `fusion-hf ask` and `fusion-hf chat` are made of.

Whose model it is does not matter: the classes are this package's own, and no code of a model folder is ever run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import HTTPError
from PIL import Image
from safetensors import SafetensorError
from transformers import BatchFeature, Cache, DynamicCache
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from fusion_hf.common.errors import InputError, short_name
from fusion_hf.hub.folders import find_folder, nano_path
from fusion_hf.model.configuration_fusion import FusionConfig, is_perfect_square
from fusion_hf.model.image_sources_fusion import describe_source
from fusion_hf.model.modeling_fusion import FusionForConditionalGeneration
from fusion_hf.model.modeling_fusion_base import CACHE_NAME, cache_keyword
from fusion_hf.model.processing_fusion import FusionProcessor

AUTO = "auto"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str = AUTO) -> torch.device:
    """The device called `name`; for `"auto"` a GPU of Nvidia's or AMD's, else Apple's, else the CPU."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == AUTO:
        return torch.device(next(kind for kind, there in available.items() if there))
    allowed = ", ".join([AUTO, *(kind for kind, there in available.items() if there)])
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device is {name!r}; allowed here: {allowed}.") from error
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if not available.get(device.type, False) or (device.index or 0) >= count:
        raise InputError(f"device is {name!r}; allowed here: {allowed}.")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type called `name`; `"auto"` is bfloat16 on CUDA and float32 elsewhere."""
    if name == AUTO:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise InputError(f"dtype is {name!r}; allowed: {', '.join([AUTO, *DTYPES])}.")
    return DTYPES[name]


def check_quantized_dtype(config: FusionConfig, name: str) -> torch.dtype:
    """The type of a quantized model: loaded in another one, only a part of it would be cast."""
    if name != AUTO and DTYPES[name] != config.dtype:
        saved = next(known for known, dtype in DTYPES.items() if dtype == config.dtype)
        raise InputError(f"dtype is {name!r}; allowed for this quantized model: {AUTO}, {saved}.")
    return config.dtype


@dataclass(frozen=True)
class Assistant:
    """A model and its processor, ready to answer."""

    model: FusionForConditionalGeneration
    processor: FusionProcessor

    @classmethod
    def load(cls, name: str | None = None, device: str = AUTO, dtype: str = AUTO) -> "Assistant":
        """
        Args:
            name: a model folder or a repository of the Hub; None: the bundled `fusion-nano`.
            device: `"auto"` or a device of torch.
            dtype: `"auto"` or a key of `DTYPES`. A quantized model has the type that it was saved in.

        Raises:
            InputError: if there is no such FUSION, or no such device, or a quantized one of another type.
        """
        chosen = choose_device(device)
        folder = find_folder(nano_path() if name is None else name)
        kind = choose_dtype(dtype, chosen)
        try:
            processor = FusionProcessor.from_pretrained(folder, trust_remote_code=False)
            config = FusionConfig.from_pretrained(folder)
            if "quantization_config" in vars(config):
                kind = check_quantized_dtype(config, dtype)
            model, info = FusionForConditionalGeneration.from_pretrained(
                folder, config=config, dtype=kind, output_loading_info=True
            )
        except InputError:
            raise
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            raise InputError(f"The model {folder} cannot be loaded: {type(error).__name__}: {error}") from error
        # what is missing would be random numbers, and so would the answers
        absent = sorted(info["missing_keys"])
        if absent:
            raise InputError(
                f"The weights in {folder} lack {len(absent)} tensors, such as {absent[0]}; copy them again."
            )
        return cls(model.to(chosen).eval(), processor)

    @property
    def max_length(self) -> int:
        """Tokens that the model can read and write together."""
        return min(self.processor.tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings)

    def open_picture(self, source: Any) -> Image.Image:
        """The picture in a file, at an http(s) address, or of any other kind that the image processor takes, as
        upright RGB.

        Raises:
            InputError: if it cannot be read or is too large; begins with its name.
        """
        processor = self.processor.image_processor
        try:
            return processor.process_image(
                processor.fetch_images(source),
                exif_transpose=processor.exif_transpose,
                max_image_pixels=processor.max_image_pixels,
            )
        except (ValueError, HTTPError) as error:
            advice = "Give another picture, or save it as PNG or JPEG."
            name = short_name(source) if isinstance(source, str) else f"The image {describe_source(source)}"
            raise InputError(f"{name}: {error} {advice}") from error

    def check_query_len(self, query_len: int | None = None) -> int:
        """`query_len`, or the model's own.

        Raises:
            InputError: if it is no perfect square, or more than the model reads.
        """
        length = self.processor.query_len if query_len is None else query_len
        if not is_perfect_square(length) or length >= self.max_length:
            allowed = f"a perfect square (1, 4, 9, 16, ...) below the model's maximum of {self.max_length} tokens"
            raise InputError(f"query_len is {length}; allowed: {allowed}.")
        return length

    def check_image_token_grid(self, image_token_grid: int | None = None) -> int:
        """`image_token_grid`, or the model's own.

        Raises:
            InputError: if it is no whole number from 1 to the tower's patches per side.
        """
        try:
            return self.model.config.grid_side(image_token_grid)
        except ValueError as error:
            raise InputError(str(error)) from error

    def see(self, picture: Image.Image) -> "SeenPicture":
        """What all questions about a picture share, as `answer` takes it."""
        return self.see_all([picture])[0]

    def see_all(self, pictures: Sequence[Image.Image]) -> list["SeenPicture"]:
        """The same of several pictures, whose tiles are encoded together."""
        return self.see_tiles(self.cut(pictures))

    def cut(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """The first half of `see_all`: `pixel_values` `(n, 5, 3, H, W)`."""
        inputs = self.processor.image_processor(list(pictures), return_tensors="pt")
        return inputs["pixel_values"].to(self.model.device, self.model.dtype)

    @torch.inference_mode()
    def see_tiles(self, pixel_values: torch.Tensor) -> list["SeenPicture"]:
        """The second half: what `cut` gave, encoded."""
        overviews, features = pixel_values[:, -1:], self.model.get_global_features(pixel_values)
        # copies: a part would keep the whole in memory
        return [SeenPicture(overviews[i : i + 1].clone(), features[i : i + 1].clone()) for i in range(len(overviews))]

    def prepare(
        self,
        messages: list[dict[str, Any]],
        query_len: int | None = None,
        seen: "SeenPicture | None" = None,
        image_token_grid: int | None = None,
        pixel_values: torch.Tensor | None = None,
    ) -> BatchFeature:
        """
        What `generate` takes for a conversation that ends with a question; arguments and errors as of `answer`.

        `pixel_values` `(1, 5, 3, H, W)` are the tiles of the messages' image, where they were cut before.
        """
        length, grid = self.check_query_len(query_len), self.check_image_token_grid(image_token_grid)
        try:
            inputs = self.processor.apply_chat_template(
                messages,
                query_len=length,
                image_token_grid=grid,
                process_images=seen is None and pixel_values is None,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=True,
            )
        except ValueError as error:
            raise InputError(str(error)) from error
        prompt = inputs["input_ids"].shape[1]
        if prompt >= self.max_length:
            raise InputError(f"The prompt has {prompt} tokens; allowed: fewer than the model's {self.max_length}.")
        if pixel_values is not None:
            inputs["pixel_values"] = pixel_values
        inputs = inputs.to(self.model.device, self.model.dtype)
        inputs.update(query_len=length, image_token_grid=grid)
        if seen is not None:
            inputs.update(pixel_values=seen.overview, global_features=seen.global_features)
        return inputs

    @torch.inference_mode()
    def generate(
        self, inputs: BatchFeature, max_new_tokens: int, streamer: BaseStreamer | None = None, **kwargs: Any
    ) -> GenerateDecoderOnlyOutput:
        """The most likely continuation of what `prepare` gave, never beyond the model's maximum."""
        return self.model.generate(
            **inputs,
            max_new_tokens=min(max_new_tokens, self.max_length - inputs["input_ids"].shape[1]),
            do_sample=False,
            num_beams=1,
            streamer=streamer,
            return_dict_in_generate=True,
            **kwargs,
        )

    def read(self, inputs: BatchFeature, output: GenerateDecoderOnlyOutput) -> str:
        """The text of an answer."""
        prompt = inputs["input_ids"].shape[1]
        return self.processor.decode(output.sequences[0, prompt:], skip_special_tokens=True).strip()

    def answer(
        self,
        messages: list[dict[str, Any]],
        max_new_tokens: int,
        query_len: int | None = None,
        streamer: BaseStreamer | None = None,
        seen: "SeenPicture | None" = None,
        image_token_grid: int | None = None,
    ) -> str:
        """
        The most likely answer to a conversation that ends with a question; the same one every time.

        Args:
            messages: chat messages of the ecosystem, with at most one picture.
            max_new_tokens: where to stop an answer that does not end.
            query_len: latent tokens per question, a perfect square; None: the model's.
            streamer: is given the tokens as they come.
            seen: the picture in the messages, from `see`; None: it is resized and encoded as a whole.
            image_token_grid: side of the grid of image tokens, 1 to the tower's patches per side; None: the model's.

        Raises:
            InputError: if `query_len` or `image_token_grid` is impossible, or the conversation exceeds the model's
                maximum.
        """
        inputs = self.prepare(messages, query_len, seen, image_token_grid)
        return self.read(inputs, self.generate(inputs, max_new_tokens, streamer))

    def answer_each(
        self,
        picture: Image.Image,
        questions: Sequence[str],
        max_new_tokens: int,
        query_len: int | None = None,
        image_token_grid: int | None = None,
    ) -> Iterator[str]:
        """The answers to questions about one picture, each asked by itself; its tiles are encoded once for all."""
        seen = self.see(picture)
        for question in questions:
            messages = [question_message(question, picture)]
            yield self.answer(messages, max_new_tokens, query_len, seen=seen, image_token_grid=image_token_grid)


@dataclass(frozen=True)
class SeenPicture:
    """What does not depend on the question: the overview's pixels and the features of the four tiles."""

    overview: torch.Tensor  # (1, 1, 3, H, W)
    global_features: torch.Tensor  # (1, D, 2P, 2P)


class Conversation:
    """
    Questions and answers about one picture, whose tiles are encoded once.

    The questions guide the vision tower together, as in training, so the picture's overview and the whole conversation
    are encoded again for each question. In fast mode they are not: the overview stays as the first question guided it,
    and only what was said since the last answer is processed.

    Args:
        assistant: who answers.
        picture: what the questions are about.
        max_new_tokens, query_len, image_token_grid: see `Assistant.answer`.
        fast: keep the language model's cache from question to question.
        seen: what `Assistant.see` made of the picture; None: it is made with the first question.

    Raises:
        InputError: if `query_len` or `image_token_grid` is impossible.
    """

    def __init__(
        self,
        assistant: Assistant,
        picture: Image.Image,
        max_new_tokens: int,
        query_len: int | None = None,
        fast: bool = False,
        image_token_grid: int | None = None,
        seen: SeenPicture | None = None,
    ):
        self.assistant = assistant
        self.picture = picture
        self.max_new_tokens = max_new_tokens
        self.query_len = assistant.check_query_len(query_len)
        self.image_token_grid = assistant.check_image_token_grid(image_token_grid)
        self.fast = fast
        self.messages: list[dict[str, Any]] = []
        self._seen = seen
        self._guide: dict[str, torch.Tensor] = {}  # fast mode: the question that guides the overview
        self._memory: _Memory | None = None

    def ask(self, question: str, streamer: BaseStreamer | None = None) -> str:
        """The answer; both become part of the conversation, but not if there is an error.

        Raises:
            InputError: see `Assistant.answer`.
        """
        messages = [*self.messages, question_message(question, None if self.messages else self.picture)]
        if self._seen is None:
            self._seen = self.assistant.see(self.picture)
        if self.fast:
            answer = self._answer_fast(messages, self._seen, streamer)
        else:
            settings = (self.max_new_tokens, self.query_len, streamer, self._seen, self.image_token_grid)
            answer = self.assistant.answer(messages, *settings)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer

    @torch.inference_mode()
    def _answer_fast(self, messages: list[dict[str, Any]], seen: SeenPicture, streamer: BaseStreamer | None) -> str:
        inputs = self.assistant.prepare(messages, self.query_len, seen, self.image_token_grid)
        if not self.messages:
            self._guide = {name: inputs[name] for name in ("instruct_input_ids", "instruct_attention_mask")}
        inputs.update(self._guide)
        # while an answer is made its cache grows, so an interrupted answer leaves none
        memory, self._memory = self._memory, None
        cache = memory.cache_before(inputs) if memory is not None else None
        if cache is None:
            cache = DynamicCache(config=self.assistant.model.config.text_config)
        output = self.assistant.generate(inputs, self.max_new_tokens, streamer, **cache_keyword(cache))
        cache = getattr(output, CACHE_NAME)  # another one than was given where long RoPE began
        self._memory = _Memory(output.sequences[0, : cache.get_seq_length()], cache)
        return self.assistant.read(inputs, output)

    def reset(self) -> None:
        """Forget all questions and answers."""
        self.messages, self._memory = [], None


@dataclass(frozen=True)
class _Memory:
    """The cache of a conversation so far, and the ids `(S)` whose keys and values it holds."""

    ids: torch.Tensor
    cache: Cache

    def cache_before(self, inputs: BatchFeature) -> Cache | None:
        """The cache as far as the prompt begins with the same ids; None if it does not reach the last answer."""
        ids = inputs["input_ids"][0]
        length = min(len(ids), len(self.ids))
        differences = (ids[:length] != self.ids[:length]).nonzero()
        common = int(differences[0]) if len(differences) else length
        if common <= int(inputs["prompt_end_positions"][0, -2]):
            return None
        if common < len(self.ids):  # an answer's text may be tokenised in another way than the model wrote it
            if any(self.cache.is_sliding):  # which have dropped what would come back
                return None
            self.cache.crop(common - len(self.ids))
        return self.cache


def question_message(question: str, picture: Image.Image | None = None) -> dict[str, Any]:
    """A user's chat message, with the picture if it is the first of its conversation."""
    content: list[dict[str, Any]] = [] if picture is None else [{"type": "image", "image": picture}]
    return {"role": "user", "content": [*content, {"type": "text", "text": question}]}
