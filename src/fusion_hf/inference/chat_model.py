"""A model with its processor that answers questions, used by `fusion-hf ask` and `fusion-hf chat`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import HTTPError
from PIL import Image
from transformers import BatchFeature
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from fusion_hf.common.errors import InputError, short_name
from fusion_hf.hub.folders import find_folder, nano_path
from fusion_hf.inference.cpu_linear import use_onednn
from fusion_hf.inference.devices import AUTO, check_quantized_dtype, choose_device, choose_dtype
from fusion_hf.inference.encoder_state import EncoderState
from fusion_hf.inference.image_digests import digest_pixels
from fusion_hf.inference.image_feature_cache import ImageFeatureCache
from fusion_hf.inference.image_features import ImageFeatures, join_features, pool_map
from fusion_hf.inference.loading import load_config, load_model, quantization_config
from fusion_hf.inference.sampling import generate_keywords
from fusion_hf.inference.sampling_options import MOST_LIKELY, SamplingOptions
from fusion_hf.model.configuration_fusion import NUM_TILES, TokenBudget, is_perfect_square
from fusion_hf.model.image_processing_fusion import FusionImageProcessor, values_of_bytes
from fusion_hf.model.image_sources_fusion import describe_source
from fusion_hf.model.modeling_fusion import FusionForConditionalGeneration
from fusion_hf.model.processing_fusion import FusionProcessor


@dataclass(frozen=True)
class ChatModel:
    """
    A model and its processor, ready to answer questions.

    Args:
        model: The model.
        processor: Its processor.
        image_cache: Cache for features of images. `ImageFeatureCache(limit=0)` keeps nothing.

    Example:
        >>> from fusion_hf.inference import ChatModel, question_message
        >>> chat_model = ChatModel.load()  # fusion-nano
        >>> image = chat_model.open_image("docs/assets/red_circle.png")
        >>> chat_model.answer([question_message("what color is the shape?", image)], max_new_tokens=8)
        'red'
    """

    model: FusionForConditionalGeneration
    processor: FusionProcessor
    image_cache: ImageFeatureCache[ImageFeatures] = field(default_factory=ImageFeatureCache, compare=False, repr=False)

    @classmethod
    def load(
        cls,
        name: str | None = None,
        device: str = AUTO,
        dtype: str = AUTO,
        revision: str | None = None,
        bits: int | None = None,
    ) -> "ChatModel":
        """
        Load a model and its processor.

        Args:
            name: A model folder or a repository of the Hub, including the authors' repositories. Defaults to the
                bundled `fusion-nano`.
            device: `"auto"` or a device of torch.
            dtype: `"auto"` (see [`choose_dtype`]) or a key of `DTYPES`. A quantized model keeps its saved dtype.
            revision: Branch, tag or commit of a repository. Defaults to the part of `name` behind `@`, or else to the
                main branch.
            bits: 8 or 4, to quantize the language model's layers with bitsandbytes (extra `quant`). By default, the
                model is loaded as saved.

        Returns:
            The loaded model.

        Raises:
            InputError: If there is no such model or device, or if a quantized model has another dtype.
        """
        chosen = choose_device(device)
        folder = find_folder(nano_path() if name is None else name, revision)
        config = load_config(folder)
        kind = choose_dtype(dtype, chosen, config.dtype)
        options: dict[str, Any] = {"config": config}
        if bits is not None:
            options["quantization_config"] = quantization_config(config, bits, chosen, kind)
        elif "quantization_config" in vars(config):
            kind = check_quantized_dtype(config, dtype)
        model, processor = load_model(folder, kind, **options)
        model = model.to(chosen).eval()
        if chosen.type == "cpu":
            use_onednn(model)
        return cls(model, processor)

    @property
    def max_length(self) -> int:
        """Maximum number of tokens of a prompt and its answer together."""
        return min(self.processor.tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings)

    @property
    def short_rope_length(self) -> int:
        """Maximum number of tokens before Phi-3's long RoPE changes the positions of all tokens in a batch."""
        text_config = self.model.config.text_config
        if text_config.rope_parameters.get("rope_type") == "longrope":
            return min(self.max_length, text_config.original_max_position_embeddings)
        return self.max_length

    def open_image(self, source: Any) -> Image.Image:
        """
        Open an image as upright RGB.

        Args:
            source: A file, an http(s) URL, or any other kind of image that the image processor accepts.

        Returns:
            The image.

        Raises:
            InputError: If the image cannot be read or is too large. The message begins with its name.
        """
        processor = self.processor.image_processor
        try:
            return processor.process_image(
                processor.fetch_images(source),
                exif_transpose=processor.exif_transpose,
                max_image_pixels=processor.max_image_pixels,
            )
        except (ValueError, HTTPError) as error:
            advice = "Use another image, or save it as PNG or JPEG."
            name = short_name(source) if isinstance(source, str) else f"The image {describe_source(source)}"
            raise InputError(f"{name}: {error} {advice}") from error

    def token_budget(self, query_len: int | None = None, image_token_grid: int | None = None) -> TokenBudget:
        """
        Combine the arguments of a call with the model's defaults, and check them.

        Args:
            query_len: Number of latent tokens per question. Defaults to the model's.
            image_token_grid: Side of the grid of image tokens. Defaults to the model's.

        Returns:
            Both numbers.

        Raises:
            InputError: If `query_len` is not a perfect square or exceeds the model's maximum, or if `image_token_grid`
                is not a whole number from 1 to the tower's patches per side.
        """
        length = self.processor.query_len if query_len is None else query_len
        if not is_perfect_square(length) or length >= self.max_length:
            allowed = f"a perfect square (1, 4, 9, 16, ...) below the model's maximum of {self.max_length} tokens"
            raise InputError(f"`query_len` must be {allowed}, got {length}.")
        try:
            return TokenBudget(length, self.model.config.grid_side(image_token_grid))
        except ValueError as error:
            raise InputError(str(error)) from error

    def encode_image(self, image: Image.Image, query_len: int | None = None) -> ImageFeatures:
        """
        Encode the features of an image that all questions share.

        Args:
            image: The image.
            query_len: See [`encode_images`].

        Returns:
            Features for the `image_features` of [`answer`].
        """
        return self.encode_images([image], query_len)[0]

    def encode_images(
        self,
        images: Sequence[Image.Image | None],
        query_len: int | None = None,
        digests: Sequence[str | None] | None = None,
    ) -> list[ImageFeatures]:
        """
        Encode the features of several images that all questions share.

        Tiles of all images are encoded together. Equal images are encoded once, and images in `image_cache` not at
        all.

        Args:
            images: Images in any form that the image processor accepts. None stands for mid grey, for prompts without
                an image in a batch.
            query_len: Number of latent tokens of the following questions. None allows any number, but takes up to nine
                times as much memory.
            digests: Digests of the images, if they are known, which save resizing images that are in the cache. They
                must distinguish all images that this model gets.

        Returns:
            The features of each image.
        """
        if digests is None:
            pixel_values = self._pixel_values(images)
            digests = [digest_pixels(each) for each in pixel_values.numpy()]
            return self._collect(digests, lambda rows: pixel_values[rows], query_len)
        return self._collect(digests, lambda rows: self._pixel_values([images[row] for row in rows]), query_len)

    def encode_cut_image(self, tiles: np.ndarray, query_len: int | None = None) -> ImageFeatures:
        """
        Encode the features of an image whose tiles were cut before, see [`encode_images`].

        Args:
            tiles: Tiles and overview as bytes `(5, 3, H, W)`.
            query_len: See [`encode_images`].

        Returns:
            Features for the `image_features` of [`answer`].
        """
        processor = self.processor.image_processor
        return self._collect([digest_pixels(tiles)], lambda _: to_pixel_values(tiles, processor), query_len)[0]

    def _collect(
        self, digests: Sequence[str | None], load: Callable[[list[int]], torch.Tensor], query_len: int | None
    ) -> list[ImageFeatures]:
        """Collect features by the digests of images. `load` returns the `pixel_values` of those that are missing."""

        def encode(rows: list[int]) -> list[ImageFeatures]:
            return self.encode_tiles(load(rows).to(self.model.device, self.model.dtype), query_len)

        state = EncoderState.of(self.model, self.processor)
        return self.image_cache.collect([(digest, query_len) for digest in digests], encode, state)

    def _pixel_values(self, images: Sequence[Image.Image | None]) -> torch.Tensor:
        """Preprocess images to `(n, 5, 3, H, W)`. Missing images become zeros, which are mid grey."""
        processor, present = self.processor.image_processor, [image for image in images if image is not None]
        values = torch.zeros(len(images), NUM_TILES + 1, 3, processor.size["height"], processor.size["width"])
        if present:
            places = torch.tensor([image is not None for image in images])
            values[places] = processor(present, return_tensors="pt")["pixel_values"]
        return values

    def preprocess(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """
        Preprocess images.

        Args:
            images: The images.

        Returns:
            `pixel_values` `(n, 5, 3, H, W)` on the model's device.
        """
        inputs = self.processor.image_processor(list(images), return_tensors="pt")
        return inputs["pixel_values"].to(self.model.device, self.model.dtype)

    @torch.inference_mode()
    def encode_tiles(self, pixel_values: torch.Tensor, query_len: int | None = None) -> list[ImageFeatures]:
        """
        Encode the tiles of images, without using `image_cache`.

        Args:
            pixel_values: Preprocessed images `(n, 5, 3, H, W)`, see [`preprocess`].
            query_len: See [`encode_images`].

        Returns:
            The features of each image.
        """
        overviews, features = pixel_values[:, -1:], self.model.get_global_features(pixel_values)
        if query_len is not None:
            features = pool_map(features, query_len, self.model.config.window_size)
        # copies, because a view would keep the whole tensor in memory
        return [
            ImageFeatures(overviews[i : i + 1].clone(), features[i : i + 1].clone()) for i in range(len(overviews))
        ]

    def prepare_batch(
        self,
        conversations: list[list[dict[str, Any]]],
        budget: TokenBudget,
        process_images: bool = True,
        **template: Any,
    ) -> BatchFeature:
        """
        Convert conversations to model inputs, padded on the left so that answers follow the ends of their rows.

        Args:
            conversations: Chat messages of each conversation.
            budget: Numbers of tokens per image.
            process_images: Whether to preprocess the images. If False, add the result of `join_features` yourself.
            template: Further arguments of `apply_chat_template`.

        Returns:
            Inputs on the model's device.

        Raises:
            InputError: If the model cannot read the messages.
        """
        try:
            inputs = self.processor.apply_chat_template(
                conversations,
                **budget._asdict(),
                process_images=process_images,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding_side": "left"},
                **template,
            )
        except ValueError as error:
            raise InputError(str(error)) from error
        inputs = inputs.to(self.model.device, self.model.dtype)
        inputs.update(budget._asdict())
        return inputs

    def prepare(
        self,
        messages: list[dict[str, Any]],
        query_len: int | None = None,
        image_features: ImageFeatures | None = None,
        image_token_grid: int | None = None,
    ) -> BatchFeature:
        """
        Convert a conversation that ends with a question to inputs of [`generate`].

        Args:
            messages, query_len, image_features, image_token_grid: See [`answer`].

        Returns:
            Inputs of the model for one prompt.

        Raises:
            InputError: See [`answer`].
        """
        budget = self.token_budget(query_len, image_token_grid)
        inputs = self.prepare_batch([messages], budget, image_features is None, add_generation_prompt=True)
        prompt = inputs["input_ids"].shape[1]
        if prompt >= self.max_length:
            raise InputError(
                f"The prompt must have fewer tokens than the model's maximum {self.max_length}, got {prompt}."
            )
        if image_features is not None:
            inputs.update(join_features([image_features]))
        return inputs

    @torch.inference_mode()
    def generate(
        self,
        inputs: BatchFeature,
        max_new_tokens: int,
        streamer: BaseStreamer | None = None,
        sampling: SamplingOptions = MOST_LIKELY,
        **kwargs: Any,
    ) -> GenerateDecoderOnlyOutput:
        """
        Generate the continuation of a prompt, up to the model's maximum length.

        Args:
            inputs: Inputs from [`prepare`].
            max_new_tokens: Maximum number of tokens of the answer.
            streamer: Streamer that receives the tokens.
            sampling: How tokens are chosen. Defaults to greedy decoding.
            kwargs: Further arguments of the model's `generate`.

        Returns:
            The output of the model's `generate`.
        """
        return self.model.generate(
            **inputs,
            **generate_keywords([sampling]),
            max_new_tokens=min(max_new_tokens, self.max_length - inputs["input_ids"].shape[1]),
            streamer=streamer,
            return_dict_in_generate=True,
            **kwargs,
        )

    def decode(self, inputs: BatchFeature, output: GenerateDecoderOnlyOutput) -> str:
        """
        Decode the text of an answer.

        Args:
            inputs: Inputs from [`prepare`].
            output: Output of [`generate`].

        Returns:
            The text, without special tokens.
        """
        prompt = inputs["input_ids"].shape[1]
        return self.processor.decode(output.sequences[0, prompt:], skip_special_tokens=True).strip()

    def answer(
        self,
        messages: list[dict[str, Any]],
        max_new_tokens: int,
        query_len: int | None = None,
        streamer: BaseStreamer | None = None,
        image_features: ImageFeatures | None = None,
        image_token_grid: int | None = None,
        sampling: SamplingOptions = MOST_LIKELY,
    ) -> str:
        """
        Answer a conversation that ends with a question. The answer is deterministic.

        Args:
            messages: Chat messages in the format of transformers, with at most one image.
            max_new_tokens: Maximum number of tokens of the answer.
            query_len: Number of latent tokens per question, a perfect square. Defaults to the model's.
            streamer: Streamer that receives the tokens.
            image_features: Features of the image in the messages, from [`encode_image`]. By default, the image is
                preprocessed and encoded.
            image_token_grid: Side of the grid of image tokens, from 1 to the tower's patches per side. Defaults to the
                model's.
            sampling: How the answer is chosen. Defaults to greedy decoding.

        Returns:
            The text of the answer.

        Raises:
            InputError: If `query_len` or `image_token_grid` is invalid, or if the conversation exceeds the model's
                maximum length.
        """
        inputs = self.prepare(messages, query_len, image_features, image_token_grid)
        return self.decode(inputs, self.generate(inputs, max_new_tokens, streamer, sampling))

    def answer_each(
        self,
        image: Image.Image,
        questions: Sequence[str],
        max_new_tokens: int,
        query_len: int | None = None,
        image_token_grid: int | None = None,
        sampling: SamplingOptions = MOST_LIKELY,
    ) -> Iterator[str]:
        """
        Answer several independent questions about one image. Its tiles are encoded only once.

        Args:
            image: The image.
            questions: The questions. Each is asked in a conversation of its own.
            max_new_tokens, query_len, image_token_grid: See [`answer`].

        Yields:
            The text of each answer.

        Raises:
            InputError: See [`answer`].
        """
        budget = self.token_budget(query_len, image_token_grid)
        image_features = self.encode_image(image, budget.query_len)
        settings = {"image_features": image_features, **budget._asdict()}
        for number, question in enumerate(questions):
            messages = [question_message(question, image)]
            yield self.answer(messages, max_new_tokens, sampling=sampling.of_answer(number), **settings)


Assistant = ChatModel  # former name of the class


def check_call(model: str | ChatModel | None, device: str, dtype: str, **numbers: int) -> None:
    """
    Check arguments of functions that accept a model or its name.

    Args:
        model: A model or its name.
        device, dtype: Device and dtype for a model that must be loaded.
        numbers: Further arguments by their names, which must be at least 1.

    Raises:
        InputError: If a number is invalid, or if `device` or `dtype` is passed with a loaded model.
    """
    for name, number in numbers.items():
        if number < 1:
            raise InputError(f"`{name}` must be a whole number of at least 1, got {number}.")
    if isinstance(model, ChatModel) and (device, dtype) != (AUTO, AUTO):
        got = f"{device!r} and {dtype!r}"
        raise InputError(f"`device` and `dtype` must be {AUTO!r} if `model` is a ChatModel, got {got}.")


def question_message(question: str, image: Image.Image | None = None) -> dict[str, Any]:
    """
    Create a user message.

    Args:
        question: Text of the question.
        image: Image, for the first message of a conversation.

    Returns:
        The chat message.
    """
    content: list[dict[str, Any]] = [] if image is None else [{"type": "image", "image": image}]
    return {"role": "user", "content": [*content, {"type": "text", "text": question}]}


def to_pixel_values(tiles: np.ndarray, processor: FusionImageProcessor) -> torch.Tensor:
    """
    Convert the tiles of an image to the `pixel_values` that the processor would compute.

    Args:
        tiles: Tiles and overview as bytes `(5, 3, H, W)`.
        processor: Image processor of the model.

    Returns:
        `pixel_values` `(1, 5, 3, H, W)`.
    """
    table = values_of_bytes(
        processor.do_rescale,
        processor.rescale_factor,
        processor.do_normalize,
        processor.image_mean,
        processor.image_std,
    )
    planes = [values[tiles[:, channel]] for channel, values in enumerate(table)]
    return torch.from_numpy(np.stack(planes, axis=1)[None])
