"""Decode the next tokens of several answers with one forward pass.

Each prompt is processed on its own, since it has its own image and turns. After the prompt, FUSION decodes like its
language model, and rows are combined like a batch that `generate` pads on the left: the mask leaves out the positions
before the keys of shorter rows. Positions are counted per row.

Shapes: B rows, S ids of a row, L ids of the longest row, V vocabulary size, H heads, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import BatchFeature, Cache, DynamicCache, GenerationConfig, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from fusion_hf.inference.chat_model import ChatModel
from fusion_hf.model.cache_fusion import give_room
from fusion_hf.model.compatibility_fusion import CACHE_NAMES
from fusion_hf.model.modeling_fusion import FusionForConditionalGeneration
from fusion_hf.model.modeling_fusion_base import cache_keyword

POSITIONS = ("attention_mask", "position_ids")  # for a single row, they follow from its length


@dataclass(eq=False)
class DecodingRow:
    """
    A prompt and its answer so far.

    Attributes:
        ids: the ids `(1, S)`.
        inputs: the other inputs of a pass over all ids.
        processors: the logits processors that are applied before the most likely token is selected.
        max_length: the maximum of S.
        cache: the keys and values of all ids except the last one. None if they are unknown or in a `RowBatch`.
    """

    ids: torch.Tensor
    inputs: dict[str, Any]
    processors: LogitsProcessorList
    max_length: int
    cache: Cache | None = None

    @classmethod
    def prepare(
        cls,
        chat_model: ChatModel,
        inputs: BatchFeature,
        max_new_tokens: int,
        streamer: BaseStreamer,
        processors: LogitsProcessorList,
    ) -> "DecodingRow":
        """
        Check and complete arguments as `ChatModel.generate` does, up to its first forward pass.

        Args:
            chat_model: the model.
            inputs: the result of `ChatModel.prepare`.
            max_new_tokens: the maximum number of tokens of the answer.
            streamer: the streamer, which gets the prompt.
            processors: logits processors to apply after those of the model.

        Returns:
            A row without a cache.
        """

        def begin(
            model: FusionForConditionalGeneration,
            input_ids: torch.Tensor,
            logits_processor: LogitsProcessorList,
            generation_config: GenerationConfig,
            **model_kwargs: Any,
        ) -> DecodingRow:
            left_out = {"stopping_criteria", *POSITIONS, *CACHE_NAMES}
            kept = {name: value for name, value in model_kwargs.items() if name not in left_out}
            return cls(input_ids, kept, logits_processor, generation_config.max_length)

        return chat_model.generate(
            inputs, max_new_tokens, streamer, logits_processor=processors, custom_generate=begin
        )

    @property
    def length(self) -> int:
        """Number of ids (S)."""
        return self.ids.shape[1]

    def process(self, model: FusionForConditionalGeneration) -> torch.Tensor:
        """
        Process all ids and keep their cache.

        Args:
            model: the model.

        Returns:
            The logits `(1, V)` of the next token.
        """
        cache = new_cache(model)
        outputs = model(input_ids=self.ids, **self.inputs, **cache_keyword(cache))
        self.cache = cache
        return outputs.logits[:, -1].float()

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """
        Choose the next token and append it.

        Args:
            logits (`(1, V)`): the logits of the next token.

        Returns:
            The id `(1,)`.
        """
        chosen = self.processors(self.ids, logits).argmax(-1)
        self.ids = torch.cat([self.ids, chosen[:, None]], dim=1)
        return chosen


class RowBatch:
    """
    The cache of rows that decode together. Rows may join or leave between two steps.

    Args:
        model: the model.
    """

    def __init__(self, model: FusionForConditionalGeneration):
        self._model = model
        self._rows: list[DecodingRow] = []
        self._cache: Cache | None = None

    def step(self, rows: Sequence[DecodingRow]) -> torch.Tensor:
        """
        Process the last id of each row.

        Args:
            rows: the remaining rows of the last step in any order, and new rows with their own caches.

        Returns:
            The logits `(B, V)` in float32.
        """
        self._arrange(rows)
        lengths = [row.length for row in rows]
        device, longest = rows[0].ids.device, max(lengths)
        mask = None
        if min(lengths) < longest:
            padding = torch.tensor([longest - length for length in lengths], device=device)
            mask = (torch.arange(longest, device=device) >= padding[:, None]).long()  # (B, L)
        outputs = self._model(
            input_ids=torch.cat([row.ids[:, -1:] for row in rows]),
            attention_mask=mask,
            position_ids=torch.tensor(lengths, device=device)[:, None] - 1,
            use_cache=True,
            **cache_keyword(self._cache),
        )
        return outputs.logits[:, -1].float()

    def clear(self) -> None:
        """Remove all rows."""
        self._rows, self._cache = [], None

    def _arrange(self, rows: Sequence[DecodingRow]) -> None:
        if self._rows == rows:
            return
        before, here = self._cache, {row: place for place, row in enumerate(self._rows)}
        sources: list[tuple[Cache, int]] = []
        for row in rows:
            cache = before if row in here else row.cache
            assert cache is not None
            sources.append((cache, here.get(row, 0)))
            row.cache = None
        self.clear()
        if len(rows) == 1 and sources[0][0] is not before:
            self._cache = sources[0][0]
        else:
            self._cache = new_cache(self._model)
            length = max(row.length for row in rows) - 1
            num_layers = len(sources[0][0].layers)
            caches = {id(cache): cache for cache, _ in sources}.values()
            for index in range(num_layers):
                # removed from the list, so that only one layer is in memory twice
                layers = {id(cache): cache.layers.pop(0) for cache in caches}
                parts = [(layers[id(cache)], place) for cache, place in sources]
                keys = torch.cat([_fit(layer.keys[place], length) for layer, place in parts])
                values = torch.cat([_fit(layer.values[place], length) for layer, place in parts])
                self._cache.update(keys, values, index)
        self._rows = list(rows)


def new_cache(model: FusionForConditionalGeneration) -> Cache:
    """
    Return an empty cache of the kind that `generate` uses.

    Args:
        model: the model.
    """
    cache = DynamicCache(config=model.config.text_config)
    if model.device.type == "cpu":
        give_room(cache)
    return cache


def _fit(states: torch.Tensor, length: int) -> torch.Tensor:
    """
    Pad the keys or values `(H, S, D)` of a row on the left, or remove padding there, and return `(1, H, length,
    D)`.

    A layer with a sliding window has kept only the last ones, and keeps as many of its input.
    """
    kept = states[:, -length:]
    return functional.pad(kept, (0, 0, length - kept.shape[1], 0))[None]
