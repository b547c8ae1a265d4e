"""Several questions about one image, with the conversation so far."""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, Cache, DynamicCache
from transformers.generation.streamers import BaseStreamer

from fusion_hf.common.errors import InputError
from fusion_hf.inference.chat_model import ChatModel, question_message
from fusion_hf.inference.image_features import ImageFeatures
from fusion_hf.inference.sampling_options import MOST_LIKELY, SamplingOptions
from fusion_hf.model.modeling_fusion_base import CACHE_NAME, cache_keyword


class Conversation:
    """
    Questions and answers about one image, whose tiles are encoded once.

    All questions guide the vision tower together, as in training. Therefore the overview of the image and the whole
    conversation are encoded again for each question. In fast mode, the overview stays as the first question guided it,
    and only the messages since the last answer are processed.

    Args:
        chat_model: Model that answers.
        image: Image that the questions are about.
        max_new_tokens, query_len, image_token_grid: See [`ChatModel.answer`].
        fast: Whether to keep the cache of the language model between questions.
        image_features: Features of the image from [`ChatModel.encode_image`], for any number of latent tokens. By
            default, they are computed with the first question, unless the model has them in its cache.
        sampling: How answers are chosen. Each answer has random numbers of its own, which `reset` begins again.

    Raises:
        InputError: If `query_len` or `image_token_grid` is invalid, or if `fast` is given with a beam search.

    Example:
        >>> from fusion_hf.inference import ChatModel, Conversation
        >>> chat_model = ChatModel.load()
        >>> image = chat_model.open_image("docs/assets/red_circle.png")
        >>> conversation = Conversation(chat_model, image, max_new_tokens=8)
        >>> conversation.ask("what color is the shape?")
        'red'
        >>> conversation.ask("what shape is in the image?")
        'circle'
    """

    def __init__(
        self,
        chat_model: ChatModel,
        image: Image.Image,
        max_new_tokens: int,
        query_len: int | None = None,
        fast: bool = False,
        image_token_grid: int | None = None,
        image_features: ImageFeatures | None = None,
        sampling: SamplingOptions = MOST_LIKELY,
    ):
        self.chat_model = chat_model
        self.image = image
        self.max_new_tokens = max_new_tokens
        self.budget = chat_model.token_budget(query_len, image_token_grid)
        if fast and sampling.num_beams > 1:
            raise InputError(f"`num_beams` must be 1 in fast mode, got {sampling.num_beams}.")
        self.fast = fast
        self.sampling = sampling
        self.messages: list[dict[str, Any]] = []
        self._image_features = image_features
        self._guide: dict[str, torch.Tensor] = {}  # in fast mode, the question that guides the overview
        self._memory: _Memory | None = None

    def ask(self, question: str, streamer: BaseStreamer | None = None) -> str:
        """
        Answer a question. Both become part of the conversation, unless an error is raised.

        Args:
            question: Text of the question.
            streamer: Streamer that receives the tokens of the answer.

        Returns:
            The text of the answer.

        Raises:
            InputError: See [`ChatModel.answer`].
        """
        messages = [*self.messages, question_message(question, None if self.messages else self.image)]
        if self._image_features is None:
            self._image_features = self.chat_model.encode_image(self.image, self.budget.query_len)
        if self.fast:
            answer = self._answer_fast(messages, self._image_features, streamer)
        else:
            settings = {"streamer": streamer, "image_features": self._image_features, **self.budget._asdict()}
            settings["sampling"] = self._sampling
            answer = self.chat_model.answer(messages, self.max_new_tokens, **settings)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer

    @property
    def _sampling(self) -> SamplingOptions:
        """Sampling options of the next answer."""
        return self.sampling.of_answer(len(self.messages) // 2)

    @torch.inference_mode()
    def _answer_fast(
        self, messages: list[dict[str, Any]], image_features: ImageFeatures, streamer: BaseStreamer | None
    ) -> str:
        inputs = self.chat_model.prepare(messages, image_features=image_features, **self.budget._asdict())
        if not self.messages:
            self._guide = {name: inputs[name] for name in ("instruct_input_ids", "instruct_attention_mask")}
        inputs.update(self._guide)
        # generation extends the cache, so an interrupted answer leaves none
        memory, self._memory = self._memory, None
        cache = memory.cache_before(inputs) if memory is not None else None
        if cache is None:
            cache = DynamicCache(config=self.chat_model.model.config.text_config)
        output = self.chat_model.generate(
            inputs, self.max_new_tokens, streamer, self._sampling, **cache_keyword(cache)
        )
        cache = getattr(output, CACHE_NAME)  # a new cache, if long RoPE began
        self._memory = _Memory(output.sequences[0, : cache.get_seq_length()], cache)
        return self.chat_model.decode(inputs, output)

    def reset(self) -> None:
        """Forget all questions and answers."""
        self.messages, self._memory = [], None


@dataclass(frozen=True)
class _Memory:
    """The cache of the conversation so far, and the ids `(S)` whose keys and values it holds."""

    ids: torch.Tensor
    cache: Cache

    def cache_before(self, inputs: BatchFeature) -> Cache | None:
        """Return the cache up to the common beginning of the ids, or None if that does not reach the last answer."""
        ids = inputs["input_ids"][0]
        length = min(len(ids), len(self.ids))
        differences = (ids[:length] != self.ids[:length]).nonzero()
        common = int(differences[0]) if len(differences) else length
        if common <= int(inputs["prompt_end_positions"][0, -2]):
            return None
        if common < len(self.ids):  # the tokenizer may split an answer in another way than the model wrote it
            if any(self.cache.is_sliding):  # sliding layers have dropped the earlier tokens
                return None
            self.cache.crop(common - len(self.ids))
        return self.cache
