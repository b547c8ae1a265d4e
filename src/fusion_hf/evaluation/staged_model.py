"""A model whose answer is made stage by stage, each of them from what any model gave at the stages before.

Shapes: S prompt tokens, T question tokens, N patches of a tile, P patches per side of a tile, D width of the language
model, V vocabulary.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig

from fusion_hf.evaluation.prompting import Generation, Messages
from fusion_hf.inference.batching import render
from fusion_hf.inference.chat_model import ChatModel
from fusion_hf.model.configuration_fusion import TokenBudget
from fusion_hf.model.modeling_fusion_vision import EncodedImage
from fusion_hf.model.prompt_tokens_fusion import pad_rows

NO_END = -1  # pads ends of prompts


@dataclass(frozen=True)
class WrittenPrompt:
    """What the language model is to read, as text, and what guides the tower."""

    text: str
    question: str


@dataclass(frozen=True)
class PromptIds:
    """A prompt in ids, without padding: of the language model, of the tower's question, and the ends of the turns."""

    input_ids: list[int]
    instruct_ids: list[int]
    prompt_ends: list[int]


@dataclass(frozen=True, eq=False)
class Features:
    """
    An image as the language model gets it.

    image_features: (N, D), of the overview with its question.
    global_features: (D, 2P, 2P), of the tiles.
    layers: (N + T, width) each, what enters the tower's layers and what leaves the last.
    """

    image_features: torch.Tensor
    global_features: torch.Tensor
    layers: tuple[torch.Tensor, ...]

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """By name, in the order of computing."""
        layers = {f"vision layer {number}": layer for number, layer in enumerate(self.layers)}
        return {**layers, "image tokens": self.image_features, "tiles": self.global_features}


@dataclass(frozen=True, eq=False)
class Decoding:
    """How tokens are chosen: the settings in the model's folder, and those of the question."""

    config: GenerationConfig
    wanted: Generation


@dataclass(frozen=True, eq=False)
class StagedQuestion:
    """A question in a batch; without `pixels` it shows no image."""

    ids: PromptIds
    pixels: torch.Tensor | None  # (5, 3, H, W), float32


class StagedModel:
    """
    A model that runs one stage at a time.

    Args:
        chat_model: The model.
        budget: Tokens per image.
    """

    def __init__(self, chat_model: ChatModel, budget: TokenBudget):
        self.chat_model = chat_model
        self.budget = budget

    def write_prompt(self, messages: Messages) -> WrittenPrompt:
        """Write a conversation that ends with a question as the model's chat template has it."""
        blocks = [block for message in messages if message["role"] == "user" for block in message["content"]]
        question = "".join(block["text"] for block in blocks if block["type"] == "text").strip()
        return WrittenPrompt(render(self.chat_model, messages, self.budget), question)

    def tokenize(self, prompt: WrittenPrompt) -> PromptIds:
        """Turn a prompt into ids."""
        outputs = self.chat_model.processor(
            text=[prompt.text], questions=[prompt.question], process_images=False, **self.budget._asdict()
        )
        mask = outputs["instruct_attention_mask"][0]
        return PromptIds(
            list(outputs["input_ids"][0]),
            [token for token, attended in zip(outputs["instruct_input_ids"][0], mask, strict=True) if attended],
            [int(end) for end in outputs["prompt_end_positions"][0]],
        )

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """Cut an image into tiles `(5, 3, H, W)`, float32."""
        return self.chat_model.processor.image_processor([image], return_tensors="pt")["pixel_values"][0]

    @torch.inference_mode()
    def encode(self, row: StagedQuestion, batch: Sequence[StagedQuestion] = ()) -> Features:
        """
        Encode the image of a question.

        Args:
            row: The question.
            batch: Further questions that are computed together with it.
        """
        inputs = self._pad([row, *batch])
        encoded = self.chat_model.model.model.encode_image(
            inputs["pixel_values"],
            inputs["instruct_input_ids"],
            inputs["instruct_attention_mask"],
            output_hidden_states=True,
        )
        assert encoded.guided.hidden_states is not None, "they were asked for"
        length = encoded.image_features.shape[1] + len(row.ids.instruct_ids)
        layers = tuple(layer[0, :length] for layer in encoded.guided.hidden_states)
        return Features(encoded.image_features[0], encoded.global_features[0], layers)

    @torch.inference_mode()
    def compute_logits(
        self,
        row: StagedQuestion,
        features: Features | None,
        answer: Sequence[int],
        batch: Sequence[StagedQuestion] = (),
    ) -> dict[str, torch.Tensor]:
        """
        Read a prompt and an answer to it.

        Args:
            row: The prompt.
            features: Of its image; None without an image.
            answer: Ids behind the prompt.
            batch: Further prompts that are read together with it.

        Returns:
            What enters the layers of the language model `(S, D)` and the logits `(S, V)`, by name.
        """
        ids = PromptIds([*row.ids.input_ids, *answer], row.ids.instruct_ids, row.ids.prompt_ends)
        rows = [StagedQuestion(ids, row.pixels), *batch]
        with self._given(features, len(rows)):
            outputs = self.chat_model.model(**self._pad(rows), **self.budget._asdict(), output_hidden_states=True)
        count = len(ids.input_ids)
        layers = {f"language layer {i}": state[0, -count:] for i, state in enumerate(outputs.hidden_states)}
        return {**layers, "logits": outputs.logits[0, -count:]}

    @torch.inference_mode()
    def generate(
        self, row: StagedQuestion, features: Features | None, decoding: Decoding, batch: Sequence[StagedQuestion] = ()
    ) -> list[int]:
        """Choose the ids of an answer, its end included; arguments as of `compute_logits`."""
        inputs = self._pad([row, *batch])
        length = inputs["input_ids"].shape[1]
        config = copy.deepcopy(decoding.config)
        room = min(decoding.wanted.max_new_tokens, self.chat_model.max_length - length)
        config.update(max_new_tokens=room, **decoding.wanted.keywords())
        with self._given(features, 1 + len(batch)):
            output = self.chat_model.model.generate(**inputs, **self.budget._asdict(), generation_config=config)
        ids = output[0, length:].tolist()
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        last = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        return ids[: last + 1]  # without what fills the row up to the batch's longest answer

    def decode(self, ids: Sequence[int], wanted: Generation) -> str:
        """Write ids as the text that is scored."""
        return wanted.cut(self.chat_model.processor.batch_decode([list(ids)], skip_special_tokens=True)[0])

    @contextmanager
    def _given(self, features: Features | None, rows: int) -> Iterator[None]:
        """Let the first of the rows of a batch have these features, whatever its image."""
        if features is None:
            yield
            return
        model = self.chat_model.model.model
        encode = model.encode_image

        def encode_others(pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> EncodedImage:
            encoded = encode(pixel_values, *args, **kwargs)
            image, tiles = encoded.image_features.clone(), encoded.global_features.clone()
            first = len(image) // rows  # a row for each of its beams
            image[:first], tiles[:first] = features.image_features.to(image), features.global_features.to(tiles)
            return encoded._replace(image_features=image, global_features=tiles)

        model.__dict__["encode_image"] = encode_others  # in front of the class's method
        try:
            yield
        finally:
            del model.__dict__["encode_image"]

    def _pad(self, rows: Sequence[StagedQuestion]) -> dict[str, torch.Tensor]:
        """The inputs of the model for rows, padded on the left as an evaluation pads them."""
        processor, device = self.chat_model.processor, self.chat_model.model.device
        longest = max(len(row.ids.input_ids) for row in rows)
        gaps = [longest - len(row.ids.input_ids) for row in rows]
        pad, instruct_pad = processor.tokenizer.pad_token_id, processor.instruct_pad_token_id
        pairs = list(zip(rows, gaps, strict=True))
        questions = [row.ids.instruct_ids for row in rows]
        inputs = {
            "input_ids": [[pad] * gap + row.ids.input_ids for row, gap in pairs],
            "attention_mask": [[0] * gap + [1] * len(row.ids.input_ids) for row, gap in pairs],
            "instruct_input_ids": pad_rows([ids or [instruct_pad] for ids in questions], instruct_pad),
            "instruct_attention_mask": pad_rows([[1] * len(ids) or [0] for ids in questions], 0),
            "prompt_end_positions": pad_rows(
                [[end + gap for end in row.ids.prompt_ends] for row, gap in pairs], NO_END
            ),
        }
        tensors = {name: torch.tensor(values, dtype=torch.long, device=device) for name, values in inputs.items()}
        if rows[0].pixels is not None:
            pixels = torch.stack([row.pixels for row in rows if row.pixels is not None])
            tensors["pixel_values"] = pixels.to(device, self.chat_model.model.dtype)
        return tensors
