"""Inference with an exported model in onnxruntime. The processor prepares images and prompts, as for the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion_hf.common.errors import InputError
from fusion_hf.common.extras import require
from fusion_hf.model.processing_fusion import FusionProcessor
from fusion_hf.onnx_export.exported_folder import (
    IMAGE_GRAPH,
    IMAGE_INPUTS,
    IMAGE_OUTPUTS,
    LANGUAGE,
    LANGUAGE_INPUTS,
    LOGITS,
    PAST,
    PRESENT,
    ExportSettings,
)

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Arrays = dict[str, np.ndarray]
CPU = "CPUExecutionProvider"
NO_TURN = np.array([[-1]])  # prompt_end_positions of passes after the prompt


@dataclass(frozen=True)
class ExportedFusion:
    """An exported model with both graphs, ready to answer. It stores nothing between calls."""

    image_graph: "InferenceSession"
    language_graph: "InferenceSession"
    processor: FusionProcessor
    settings: ExportSettings

    @classmethod
    def load(cls, folder: str | Path, providers: Sequence[str] = (CPU,)) -> "ExportedFusion":
        """
        Load an exported model.

        Args:
            folder: Folder that `fusion-hf export` wrote.
            providers: Execution providers of onnxruntime. The first available one is used.

        Returns:
            The loaded model.

        Raises:
            InputError: If the folder is not an exported model, or if onnxruntime is not installed.
        """
        settings = ExportSettings.read(Path(folder))
        require(("onnxruntime",), "Running the graphs", "onnx")
        from onnxruntime import InferenceSession

        image, language = (
            InferenceSession(Path(folder) / name, providers=list(providers)) for name in (IMAGE_GRAPH, LANGUAGE)
        )
        return cls(image, language, FusionProcessor.from_pretrained(folder, trust_remote_code=False), settings)

    def answer(self, messages: list[dict[str, Any]], max_new_tokens: int) -> str:
        """
        Answer a conversation about an image that ends with a question, by greedy decoding.

        Args:
            messages: Chat messages with one image.
            max_new_tokens: Maximum number of tokens of the answer.

        Returns:
            The text of the answer.

        Raises:
            InputError: If there is no image, or if the conversation is too long.
        """
        try:
            inputs = self.processor.apply_chat_template(
                messages,
                query_len=self.settings.query_len,
                image_token_grid=self.settings.image_token_grid,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=True,
            )
        except ValueError as error:
            raise InputError(str(error)) from error
        ids = self.generate({name: value.numpy() for name, value in inputs.items()}, max_new_tokens)
        return self.processor.decode(ids, skip_special_tokens=True).strip()

    def generate(self, inputs: Arrays, max_new_tokens: int) -> list[int]:
        """
        Generate token ids greedily, up to the end of the answer.

        Args:
            inputs: Outputs of the processor for one prompt.
            max_new_tokens: Maximum number of new tokens.

        Returns:
            Ids of the new tokens.

        Raises:
            InputError: If there is no image, there are several prompts, or the prompt is too long.
        """
        prompt = inputs["input_ids"]
        if "pixel_values" not in inputs or len(prompt) != 1:
            got = f"{len(prompt)} prompts with {', '.join(sorted(inputs))}"
            raise InputError(f"The inputs must be one prompt with an image, got {got}.")
        room = self.settings.max_length - prompt.shape[1]
        if room < 1:
            most = self.settings.max_length
            raise InputError(f"The prompt must have fewer than {most} tokens, got {prompt.shape[1]}.")
        image_features = self.encode_image(inputs)
        past = self.empty_cache()
        logits, past = self.run_language_model(prompt, inputs["prompt_end_positions"], image_features, past)
        ids: list[int] = []
        while len(ids) < min(max_new_tokens, room):
            logits[..., self.settings.suppressed_ids] = -np.inf
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] in self.settings.eos_token_ids:
                break
            logits, past = self.run_language_model(np.array([ids[-1:]]), NO_TURN, image_features, past)
        return ids

    def encode_image(self, inputs: Arrays) -> Arrays:
        """
        Encode the image and the questions of a prompt.

        Args:
            inputs: Outputs of the processor for one prompt.

        Returns:
            Inputs for every pass of the language model.
        """
        outputs = self.image_graph.run(IMAGE_OUTPUTS, {name: inputs[name] for name in IMAGE_INPUTS})
        return dict(zip(IMAGE_OUTPUTS, outputs, strict=True))

    def empty_cache(self) -> Arrays:
        """Return empty keys and values `(1, G, 0, E)` for each layer."""
        cache = [node for node in self.language_graph.get_inputs() if node.name.startswith(PAST)]
        return {node.name: np.zeros((1, node.shape[1], 0, node.shape[3]), dtype=np.float32) for node in cache}

    def run_language_model(
        self, ids: np.ndarray, ends: np.ndarray, image_features: Arrays, past: Arrays
    ) -> tuple[np.ndarray, Arrays]:
        """
        Run one pass of the language model after a cache.

        Args:
            ids: Ids `(1, S)`.
            ends: `prompt_end_positions` `(1, R)`, counted from the first of `ids`.
            image_features: Result of [`encode_image`].
            past: Cache, which may be empty.

        Returns:
            Logits `(1, 1, V)` of the last id, and the extended cache.
        """
        length = next(iter(past.values())).shape[2] + ids.shape[1]
        given = dict(zip(LANGUAGE_INPUTS[:2], (ids, np.ones((1, length), dtype=np.int64)), strict=True))
        given |= image_features | {LANGUAGE_INPUTS[-1]: ends} | past
        names = [LOGITS, *(name.replace(PAST, PRESENT, 1) for name in past)]
        logits, *present = self.language_graph.run(names, given)
        return logits, dict(zip(past, present, strict=True))
