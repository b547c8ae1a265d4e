"""Run a model stage by stage, where each stage can take values of another model from earlier stages.

Shapes: S prompt tokens, T question tokens, N patches of a tile, P patches per side of a tile, D width of the language
model, V vocabulary size.
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

NO_END = -1  # padding of prompt ends


@dataclass(frozen=True)
class WrittenPrompt:
    """The prompt of the language model as text, and the question that guides the vision tower."""

    text: str
    question: str


@dataclass(frozen=True)
class PromptIds:
    """
    The ids of a prompt without padding.

    Attributes:
        input_ids: the ids of the prompt.
        instruct_ids: the ids of the question for the vision tower.
        prompt_ends: the positions where turns end.
    """

    input_ids: list[int]
    instruct_ids: list[int]
    prompt_ends: list[int]


@dataclass(frozen=True, eq=False)
class Features:
    """
    The features of an image.

    Attributes:
        image_features: features of the overview with its question (N, D).
        global_features: features of the tiles (D, 2P, 2P).
        layers: hidden states (N + T, width) before each layer of the vision tower and after the last one.
    """

    image_features: torch.Tensor
    global_features: torch.Tensor
    layers: tuple[torch.Tensor, ...]

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors by name, in the order of computation."""
        layers = {f"vision layer {number}": layer for number, layer in enumerate(self.layers)}
        return {**layers, "image tokens": self.image_features, "tiles": self.global_features}


@dataclass(frozen=True, eq=False)
class Decoding:
    """How tokens are chosen: the generation settings of the model's folder, and those of the question."""

    config: GenerationConfig
    wanted: Generation


@dataclass(frozen=True, eq=False)
class StagedQuestion:
    """A question in a batch. Without an image, `pixels` is None."""

    ids: PromptIds
    pixels: torch.Tensor | None  # (5, 3, H, W), float32


class StagedModel:
    """
    Run one stage of a model at a time.

    Args:
        chat_model: the model.
        budget: the numbers of image tokens and latent tokens.
    """

    def __init__(self, chat_model: ChatModel, budget: TokenBudget):
        self.chat_model = chat_model
        self.budget = budget

    def write_prompt(self, messages: Messages) -> WrittenPrompt:
        """
        Apply the chat template to a conversation that ends with a question.

        Args:
            messages: the conversation.
        """
        blocks = [block for message in messages if message["role"] == "user" for block in message["content"]]
        question = "".join(block["text"] for block in blocks if block["type"] == "text").strip()
        return WrittenPrompt(render(self.chat_model, messages, self.budget), question)

    def tokenize(self, prompt: WrittenPrompt) -> PromptIds:
        """
        Convert a prompt to ids.

        Args:
            prompt: the prompt.
        """
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
        """
        Cut an image into tiles and an overview.

        Args:
            image: the image.

        Returns:
            The pixels `(5, 3, H, W)` in float32.
        """
        return self.chat_model.processor.image_processor([image], return_tensors="pt")["pixel_values"][0]

    @torch.inference_mode()
    def encode(self, row: StagedQuestion, batch: Sequence[StagedQuestion] = ()) -> Features:
        """
        Encode the image of a question.

        Args:
            row: the question.
            batch: further questions that are encoded in the same batch.
        """
        inputs = self._pad([row, *batch])
        encoded = self.chat_model.model.model.encode_image(
            inputs["pixel_values"],
            inputs["instruct_input_ids"],
            inputs["instruct_attention_mask"],
            output_hidden_states=True,
        )
        assert encoded.guided.hidden_states is not None, "hidden states were requested"
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
        Compute the hidden states and logits of a prompt and an answer to it.

        Args:
            row: the prompt.
            features: the features of its image, or None without an image.
            answer: the ids of the answer.
            batch: further prompts that are computed in the same batch.

        Returns:
            The inputs of the language model's layers `(S, D)` and the logits `(S, V)`, by name.
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
        """
        Generate an answer.

        Args:
            row: the prompt.
            features: the features of its image, or None without an image.
            decoding: how tokens are chosen.
            batch: further prompts that are computed in the same batch.

        Returns:
            The ids of the answer, including its end token.
        """
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
        return ids[: last + 1]  # removes the padding up to the longest answer of the batch

    def decode(self, ids: Sequence[int], wanted: Generation) -> str:
        """
        Convert ids to the text that is scored.

        Args:
            ids: the ids.
            wanted: the generation settings, which include the stop texts.
        """
        return wanted.cut(self.chat_model.processor.batch_decode([list(ids)], skip_special_tokens=True)[0])

    @contextmanager
    def _given(self, features: Features | None, rows: int) -> Iterator[None]:
        """Let the first row of a batch use these features, whatever its image is, while the context is active."""
        if features is None:
            yield
            return
        model = self.chat_model.model.model
        encode = model.encode_image

        def encode_others(pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> EncodedImage:
            encoded = encode(pixel_values, *args, **kwargs)
            image, tiles = encoded.image_features.clone(), encoded.global_features.clone()
            first = len(image) // rows  # one row per beam
            image[:first], tiles[:first] = features.image_features.to(image), features.global_features.to(tiles)
            return encoded._replace(image_features=image, global_features=tiles)

        model.__dict__["encode_image"] = encode_others  # hides the method of the class
        try:
            yield
        finally:
            del model.__dict__["encode_image"]

    def _pad(self, rows: Sequence[StagedQuestion]) -> dict[str, torch.Tensor]:
        """Make the inputs of the model for several rows, padded on the left as in an evaluation."""
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
