"""This package's side of `authors.py`, with `ChatModel` and `FusionTrainer`; see `authors_timing`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from authors_timing import Clock, serve
from safetensors.torch import load_file

from fusion_hf.inference.chat_model import ChatModel, question_message
from fusion_hf.inference.image_feature_cache import ImageFeatureCache


class OurSide:
    """A model loaded by `ChatModel.load`. Random weights must not end an answer early."""

    def __init__(self, job: dict[str, Any]):
        self.chat_model = ChatModel.load(job["folder"], "cpu", job["dtype"])
        self.model = self.chat_model.model
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.suppress_tokens = None

    def preprocess(self, path: str) -> Callable[[], Any]:
        image = self.chat_model.open_image(path)
        return lambda: self.chat_model.preprocess([image])

    def prepare(self, path: str, question: str) -> Any:
        return self.chat_model.prepare([question_message(question, self.chat_model.open_image(path))])

    def generate(self, prompt: Any, tokens: int, clock: Clock) -> list[int]:
        output = self.chat_model.generate(prompt, tokens, streamer=clock)
        return output.sequences[0, -tokens:].tolist()

    def answer(self, paths: list[str], questions: list[str], tokens: int) -> list[str]:
        from fusion_hf.inference.batching import batch_generate  # not needed for a cold start

        records = [{"image": path, "question": text} for path, text in zip(paths, questions, strict=True)]
        # rounds ask about the same images again
        chat_model = replace(self.chat_model, image_cache=ImageFeatureCache())
        results = batch_generate(records, chat_model, max_new_tokens=tokens, progress=False)
        return [result["answer"] for result in results]

    def answer_each(self, path: str, questions: list[str], tokens: int) -> list[str]:
        return self.answer([path] * len(questions), questions, tokens)

    def train(self) -> None:
        from fusion_hf.training.gradient_checkpointing import enable_checkpointing

        self.model.train()
        enable_checkpointing(self.model)

    def read_batch(self, path: str) -> dict[str, Any]:
        """Make a batch like those of `FusionTrainer`, which computes logits for labelled tokens only."""
        from fusion_hf.training.collator import find_loss_positions

        batch = load_file(path)
        positions = {"loss_positions": find_loss_positions(batch["labels"])}
        return batch | positions | {"query_len": self.model.config.query_len}

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        return self.model(**batch, use_cache=False).loss


if __name__ == "__main__":
    serve(OurSide)
