"""`attention_maps`: an answer, and what the model looked at for it."""

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
    Hold an answer and what the model looked at for it, as `attention_maps` returns it.

    P patches per side, g side of the grid of image tokens, s * s latents, w window.

    Attributes:
        answer: the text, the same as without maps.
        answer_ids: its tokens.
        question: from each token of all questions to the patches of the overview, in the tower, `(G, T, P, P)`.
            Layers whose question rows are uniform are left out. A row's sum is what is left beside the other question
            tokens.
        latents: from the latent tokens of each turn to the image, `(samplers, turns, s * w, s * w)`. Each latent token
            sees a window, in which its weights sum to one.
        answer_tokens: from where each token was chosen to the image tokens, in the language model, `(G, tokens, g,
            g)`. A row's sum is the share of the image among all that was read.
    """

    answer: str
    answer_ids: tuple[int, ...]
    question: Maps
    latents: Maps
    answer_tokens: Maps

    def kinds(self) -> dict[str, Maps]:
        """Return all maps by name."""
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
    Answer a question about an image, and tell where the model looked.

    Of each layer only the rows that are shown are kept, as a mean over heads and a sum over its group of layers.

    Args:
        image: a file, an http(s) address or a PIL image.
        question: the last question.
        model: a [`ChatModel`], a model folder or a repository of the Hub; None: the bundled `fusion-nano`.
        history: chat messages before the question, text only; the first user's gets the image.
        max_new_tokens, query_len, image_token_grid: see [`ChatModel.answer`].
        layer_groups: neighbouring layers are averaged in at most so many groups.
        device, dtype: see [`ChatModel.load`]; not with a [`ChatModel`].

    Raises:
        InputError: for wrong arguments, or an image or model that cannot be read.

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
        raise InputError("The question is empty; ask something.")
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
    """What was recorded while an answer was made, with the words and the places on an image of `size`."""
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
    """The messages with the image in the first user's, where every conversation has it."""
    place = next(index for index, message in enumerate(messages) if message["role"] == "user")
    content = messages[place]["content"]
    texts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    shown = {"role": "user", "content": [{"type": "image", "image": image}, *texts]}
    return [*messages[:place], shown, *messages[place + 1 :]]
