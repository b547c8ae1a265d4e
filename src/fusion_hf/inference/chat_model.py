"""A model with its processor that answers questions: what `fusion-hf ask` and `fusion-hf chat` are made of."""

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
    A model and its processor, ready to answer.

    Args:
        model: What answers.
        processor: Its processor.
        image_cache: What keeps features of images; `ImageFeatureCache(limit=0)` keeps none.

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
        Args:
            name: a model folder or a repository of the Hub, the authors' as well; None: the bundled `fusion-nano`.
            device: `"auto"` or a device of torch.
            dtype: `"auto"` (see `choose_dtype`) or a key of `DTYPES`. A quantized model has the type that it was saved
                in.
            revision: branch, tag or commit of a repository; None: the main branch, or what `name` has behind `@`.
            bits: 8 or 4, to quantize the language model's layers with bitsandbytes (extra `quant`); None: as saved.

        Raises:
            InputError: if there is no such FUSION, or no such device, or a quantized one of another type.
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
        """Tokens that the model can read and write together."""
        return min(self.processor.tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings)

    @property
    def short_rope_length(self) -> int:
        """The same, as far as Phi-3's long RoPE does not change the positions of all tokens, and of a whole batch."""
        text_config = self.model.config.text_config
        if text_config.rope_parameters.get("rope_type") == "longrope":
            return min(self.max_length, text_config.original_max_position_embeddings)
        return self.max_length

    def open_image(self, source: Any) -> Image.Image:
        """Open the image in a file, at an http(s) address, or of any other kind that the image processor takes, as
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
            advice = "Give another image, or save it as PNG or JPEG."
            name = short_name(source) if isinstance(source, str) else f"The image {describe_source(source)}"
            raise InputError(f"{name}: {error} {advice}") from error

    def token_budget(self, query_len: int | None = None, image_token_grid: int | None = None) -> TokenBudget:
        """
        Complete and check how many tokens show an image.

        Args:
            query_len: Latent tokens per question; None: the model's.
            image_token_grid: Side of the grid of image tokens; None: the model's.

        Returns:
            Both numbers.

        Raises:
            InputError: If `query_len` is no perfect square or more than the model reads, or `image_token_grid` is no
                whole number from 1 to the tower's patches per side.
        """
        length = self.processor.query_len if query_len is None else query_len
        if not is_perfect_square(length) or length >= self.max_length:
            allowed = f"a perfect square (1, 4, 9, 16, ...) below the model's maximum of {self.max_length} tokens"
            raise InputError(f"query_len is {length}; allowed: {allowed}.")
        try:
            return TokenBudget(length, self.model.config.grid_side(image_token_grid))
        except ValueError as error:
            raise InputError(str(error)) from error

    def encode_image(self, image: Image.Image, query_len: int | None = None) -> ImageFeatures:
        """Encode what all questions about an image share, as `answer` takes it; see `encode_images`."""
        return self.encode_images([image], query_len)[0]

    def encode_images(
        self,
        images: Sequence[Image.Image | None],
        query_len: int | None = None,
        digests: Sequence[str | None] | None = None,
    ) -> list[ImageFeatures]:
        """
        Encode the same of several images, whose tiles are encoded together: of equal ones once, and of those in
        `image_cache` not at all.

        Args:
            images: Of any kind that the image processor takes; None: grey, as for a prompt without image in a batch.
            query_len: Latent tokens of the questions that follow; None: any number, which takes up to nine times as
                much memory.
            digests: Of the images, where they are known, so that those in the cache are not resized either; they must
                tell apart all images that this model is given.
        """
        if digests is None:
            pixel_values = self._pixel_values(images)
            digests = [digest_pixels(each) for each in pixel_values.numpy()]
            return self._collect(digests, lambda rows: pixel_values[rows], query_len)
        return self._collect(digests, lambda rows: self._pixel_values([images[row] for row in rows]), query_len)

    def encode_cut_image(self, tiles: np.ndarray, query_len: int | None = None) -> ImageFeatures:
        """Encode the same of an image whose tiles `(5, 3, H, W)` were cut before, as bytes; see `encode_images`."""
        processor = self.processor.image_processor
        return self._collect([digest_pixels(tiles)], lambda _: to_pixel_values(tiles, processor), query_len)[0]

    def _collect(
        self, digests: Sequence[str | None], load: Callable[[list[int]], torch.Tensor], query_len: int | None
    ) -> list[ImageFeatures]:
        """Features by the images' digests; `load` gives `pixel_values` of those that are missing."""

        def encode(rows: list[int]) -> list[ImageFeatures]:
            return self.encode_tiles(load(rows).to(self.model.device, self.model.dtype), query_len)

        state = EncoderState.of(self.model, self.processor)
        return self.image_cache.collect([(digest, query_len) for digest in digests], encode, state)

    def _pixel_values(self, images: Sequence[Image.Image | None]) -> torch.Tensor:
        """`(n, 5, 3, H, W)`; zeros, which are mid grey, where there is no image."""
        processor, present = self.processor.image_processor, [image for image in images if image is not None]
        values = torch.zeros(len(images), NUM_TILES + 1, 3, processor.size["height"], processor.size["width"])
        if present:
            places = torch.tensor([image is not None for image in images])
            values[places] = processor(present, return_tensors="pt")["pixel_values"]
        return values

    def preprocess(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return the `pixel_values` `(n, 5, 3, H, W)` of images, on the model's device."""
        inputs = self.processor.image_processor(list(images), return_tensors="pt")
        return inputs["pixel_values"].to(self.model.device, self.model.dtype)

    @torch.inference_mode()
    def encode_tiles(self, pixel_values: torch.Tensor, query_len: int | None = None) -> list[ImageFeatures]:
        """Encode what `preprocess` gave, without looking into `image_cache`."""
        overviews, features = pixel_values[:, -1:], self.model.get_global_features(pixel_values)
        if query_len is not None:
            features = pool_map(features, query_len, self.model.config.window_size)
        # copies: a part would keep the whole in memory
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
        Turn conversations into the inputs of the model, padded on the left: an answer goes on where its row ends.

        Args:
            conversations: Chat messages.
            budget: Tokens per image.
            process_images: Whether the inputs get the images' pixels; False: you add what `join_features` gives.
            template: Further arguments of `apply_chat_template`.

        Returns:
            Inputs on the model's device.

        Raises:
            InputError: For messages that the model cannot read.
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
        Turn a conversation that ends with a question into what `generate` takes.

        Args:
            messages, query_len, image_features, image_token_grid: As of `answer`.

        Returns:
            Inputs of the model for one prompt.

        Raises:
            InputError: See `answer`.
        """
        budget = self.token_budget(query_len, image_token_grid)
        inputs = self.prepare_batch([messages], budget, image_features is None, add_generation_prompt=True)
        prompt = inputs["input_ids"].shape[1]
        if prompt >= self.max_length:
            raise InputError(f"The prompt has {prompt} tokens; allowed: fewer than the model's {self.max_length}.")
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
        """Return the continuation of what `prepare` gave, never beyond the model's maximum."""
        return self.model.generate(
            **inputs,
            **generate_keywords([sampling]),
            max_new_tokens=min(max_new_tokens, self.max_length - inputs["input_ids"].shape[1]),
            streamer=streamer,
            return_dict_in_generate=True,
            **kwargs,
        )

    def decode(self, inputs: BatchFeature, output: GenerateDecoderOnlyOutput) -> str:
        """Decode the text of an answer."""
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
        Return the answer to a conversation that ends with a question; the same one every time.

        Args:
            messages: chat messages of the ecosystem, with at most one image.
            max_new_tokens: where to stop an answer that does not end.
            query_len: latent tokens per question, a perfect square; None: the model's.
            streamer: is given the tokens as they come.
            image_features: the image in the messages, from `encode_image`; None: it is resized and encoded as a whole.
            image_token_grid: side of the grid of image tokens, 1 to the tower's patches per side; None: the model's.
            sampling: how the answer is chosen; default: the most likely one.

        Raises:
            InputError: if `query_len` or `image_token_grid` is impossible, or the conversation exceeds the model's
                maximum.
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
        """Yield the answers to questions about one image, each asked by itself; its tiles are encoded once for all."""
        budget = self.token_budget(query_len, image_token_grid)
        image_features = self.encode_image(image, budget.query_len)
        settings = {"image_features": image_features, **budget._asdict()}
        for number, question in enumerate(questions):
            messages = [question_message(question, image)]
            yield self.answer(messages, max_new_tokens, sampling=sampling.of_answer(number), **settings)


Assistant = ChatModel  # the class's former name


def check_call(model: str | ChatModel | None, device: str, dtype: str, **numbers: int) -> None:
    """
    Check arguments that functions have in common which take a model or its name.

    Args:
        model: What answers.
        device, dtype: Of a model that is to be loaded.
        numbers: Further arguments by their names; each has to be 1 or more.

    Raises:
        InputError: If one is impossible, or `device` or `dtype` is given beside a model that is loaded already.
    """
    for name, number in numbers.items():
        if number < 1:
            raise InputError(f"{name} is {number}; allowed: a whole number from 1.")
    if isinstance(model, ChatModel) and (device, dtype) != (AUTO, AUTO):
        raise InputError(f"device is {device!r} and dtype {dtype!r}; allowed beside a ChatModel: {AUTO!r}.")


def question_message(question: str, image: Image.Image | None = None) -> dict[str, Any]:
    """A user's chat message, with the image if it is the first of its conversation."""
    content: list[dict[str, Any]] = [] if image is None else [{"type": "image", "image": image}]
    return {"role": "user", "content": [*content, {"type": "text", "text": question}]}


def to_pixel_values(tiles: np.ndarray, processor: FusionImageProcessor) -> torch.Tensor:
    """What the processor makes of an image with these tiles `(5, 3, H, W)`: `pixel_values` `(1, 5, 3, H, W)`."""
    table = values_of_bytes(
        processor.do_rescale,
        processor.rescale_factor,
        processor.do_normalize,
        processor.image_mean,
        processor.image_std,
    )
    planes = [values[tiles[:, channel]] for channel, values in enumerate(table)]
    return torch.from_numpy(np.stack(planes, axis=1)[None])
