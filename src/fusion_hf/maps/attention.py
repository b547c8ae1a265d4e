"""`attention_maps`, which answers a question and returns the attention to the image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from transformers import BatchFeature
from transformers.generation import GenerateDecoderOnlyOutput

from fusion_hf.common.errors import InputError
from fusion_hf.inference.chat_model import ChatModel, check_call, question_message
from fusion_hf.inference.devices import AUTO
from fusion_hf.maps.attention_recorder import AttentionRecorder
from fusion_hf.maps.view import Maps, View, Word, find_words
from fusion_hf.model.configuration_fusion import TILES_PER_SIDE

LAYER_GROUPS = 4
MAX_NEW_TOKENS = 256


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """
    An answer and the attention to the image, as [`attention_maps`] returns it.

    Shapes: P patches per side, g side of the grid of image tokens, s * s latent tokens, w window size, G groups of
    layers.

    Attributes:
        answer: Text of the answer, which is the same as without maps.
        answer_ids: Ids of its tokens.
        question: Attention in the vision tower from each question token to the patches of the overview,
            `(G, T, P, P)`. Layers in which question tokens attend uniformly are left out. A row does not sum to one,
            because question tokens also attend to each other.
        latents: Attention from the latent tokens of each turn to the image, `(samplers, turns, s * w, s * w)`. Each
            latent token attends to a window, in which its weights sum to one.
        answer_tokens: Attention in the language model to the image tokens, from the position at which each answer
            token was chosen, `(G, tokens, g, g)`. The sum of a row is the share of the image among all tokens.
    """

    answer: str
    answer_ids: tuple[int, ...]
    question: Maps
    latents: Maps
    answer_tokens: Maps

    def kinds(self) -> dict[str, Maps]:
        """Return all maps by name: `question`, `latents` and `answer`."""
        return {"question": self.question, "latents": self.latents, "answer": self.answer_tokens}


def attention_maps(
    image: str | Image.Image,
    question: str,
    model: str | ChatModel | None = None,
    history: Sequence[dict[str, Any]] = (),
    max_new_tokens: int = MAX_NEW_TOKENS,
    query_len: int | None = None,
    image_token_grid: int | None = None,
    layer_groups: int = LAYER_GROUPS,
    device: str = AUTO,
    dtype: str = AUTO,
) -> AttentionMaps:
    """
    Answer a question about an image, and return the attention to the image.

    For each layer, only these rows are kept, averaged over heads and summed over a group of layers.

    Args:
        image: A file, an http(s) URL or a PIL image.
        question: The last question.
        model: A [`ChatModel`], a model folder or a repository of the Hub. Defaults to the bundled `fusion-nano`.
        history: Chat messages before the question, with texts only. The first user message gets the image.
        max_new_tokens, query_len, image_token_grid: See [`ChatModel.answer`].
        layer_groups: Maximum number of groups of neighbouring layers, over which maps are averaged.
        device, dtype: See [`ChatModel.load`]. Do not pass them with a [`ChatModel`].

    Returns:
        The answer and the maps.

    Raises:
        InputError: If an argument is invalid, or if the image or the model cannot be read.

    Example:
        >>> from fusion_hf import attention_maps
        >>> result = attention_maps("docs/assets/red_circle.png", "what color is the shape?")
        >>> result.answer
        'red'
        >>> result.answer_tokens.on_image(result.answer_tokens.words[0]).shape  # groups of layers, height, width
        (4, 64, 64)
    """
    check_call(model, device, dtype, layer_groups=layer_groups, max_new_tokens=max_new_tokens)
    if not question.strip():
        raise InputError(f"`question` must not be empty, got {question!r}.")
    chat_model = model if isinstance(model, ChatModel) else ChatModel.load(model, device, dtype)
    opened = chat_model.open_image(image)
    messages = _with_image([*history, question_message(question)], opened)
    inputs = chat_model.prepare(messages, query_len, image_token_grid=image_token_grid)
    with AttentionRecorder(chat_model.model, inputs["input_ids"], layer_groups) as recorder:
        output = chat_model.generate(inputs, max_new_tokens)
    return _lay_on_image(chat_model, inputs, output, recorder, opened.size)


def _lay_on_image(
    chat_model: ChatModel,
    inputs: BatchFeature,
    output: GenerateDecoderOnlyOutput,
    recorder: AttentionRecorder,
    size: tuple[int, int],
) -> AttentionMaps:
    """Combine the recorded attention with the words and with the positions on an image of `size`."""
    question, latents, answer = (rows.float().numpy() for rows in recorder.rows())
    config, tokenizer = chat_model.model.config, chat_model.processor.tokenizer
    overview, tiles = (View.of(config, count, size) for count in (1, TILES_PER_SIDE))
    ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    asked = inputs["instruct_input_ids"][0].tolist()
    turns = tuple(Word(f"turn {turn + 1}", turn, turn + 1) for turn in range(latents.shape[1]))
    return AttentionMaps(
        answer=chat_model.decode(inputs, output),
        answer_ids=tuple(ids),
        question=Maps(question, recorder.tower_groups, find_words(tokenizer, asked), overview),
        latents=Maps(latents, recorder.sampler_layers, turns, tiles),
        answer_tokens=Maps(answer, recorder.language_groups, find_words(tokenizer, ids), overview),
    )


def _with_image(messages: list[dict[str, Any]], image: Image.Image) -> list[dict[str, Any]]:
    """Add the image to the first user message."""
    place = next(index for index, message in enumerate(messages) if message["role"] == "user")
    content = messages[place]["content"]
    texts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    shown = {"role": "user", "content": [{"type": "image", "image": image}, *texts]}
    return [*messages[:place], shown, *messages[place + 1 :]]
