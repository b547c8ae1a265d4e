"""A model in this process, which answers in batches and encodes the tiles of repeated images once."""

import hashlib
import json
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature

from fusion_hf.common.errors import InputError
from fusion_hf.evaluation.answer_cache import Answer
from fusion_hf.evaluation.answering import Outcome
from fusion_hf.evaluation.prompting import Continuation, EvaluationPrompt, Generation, Messages, RequestReader
from fusion_hf.evaluation.run_record import ModelRecord
from fusion_hf.hub.folders import nano_path
from fusion_hf.inference.batching import count_tokens, longest_together, plan_batches, render
from fusion_hf.inference.chat_model import ChatModel
from fusion_hf.inference.devices import AUTO
from fusion_hf.inference.halving import run_halving
from fusion_hf.inference.image_features import join_features
from fusion_hf.inference.model_info import ModelInfo

BATCH_SIZE = 1
NO_SETTINGS = (
    "auto_map",
    "image_processor_type",
    "processor_class",
    "transformers_version",
)  # keys that do not change answers
WINDOW = 64  # requests whose images are open at a time


class LocalModel:
    """
    A model in this process; see `answering.Model`.

    Args:
        chat_model: the model.
        batch_size: the number of prompts that are answered together. In float32 it does not change the answers.
        query_len: the number of latent tokens, see `ChatModel.answer`.
        image_token_grid: the side of the grid of image tokens, see `ChatModel.answer`.
        name: the name in the record. None means fusion-nano.

    Raises:
        InputError: if `batch_size` is less than 1.
    """

    window = WINDOW

    def __init__(
        self,
        chat_model: ChatModel,
        batch_size: int = BATCH_SIZE,
        query_len: int | None = None,
        image_token_grid: int | None = None,
        name: str | None = None,
    ):
        if batch_size < 1:
            raise InputError(f"`batch_size` must be an integer of at least 1, got {batch_size}.")
        self.chat_model = chat_model
        self.batch_size = batch_size
        self.name = Path(nano_path()).name if name is None else name
        self.device = chat_model.model.device
        self.budget = chat_model.token_budget(query_len, image_token_grid)
        self.info = ModelInfo.of(chat_model, self.budget)
        self.reader = RequestReader(
            self._identity(),
            chat_model.open_image,
            lambda messages: render(chat_model, messages, self.budget),
            lambda text: count_tokens(chat_model, text, self.budget),
        )

    @classmethod
    def load(cls, name: str | None = None, device: str = AUTO, dtype: str = AUTO, **settings: Any) -> "LocalModel":
        """
        Load a model.

        Args:
            name: a model folder or a repository of the Hub. None uses the bundled fusion-nano.
            device: the device, see `ChatModel.load`.
            dtype: the dtype, see `ChatModel.load`.
            **settings: further arguments of this class.

        Raises:
            InputError: if the model cannot be loaded.
        """
        return cls(ChatModel.load(name, device, dtype), name=name, **settings)

    def describe(self) -> ModelRecord:
        """Describe the model for the record of a run."""
        folder = Path(self.name) if Path(self.name).is_dir() else None
        place = None if folder is None else str(folder.resolve())
        return replace(ModelRecord.of(self.name, self.info), settings=describe_settings(self.chat_model, place))

    def answer(self, prompts: Sequence[EvaluationPrompt]) -> Iterator[Outcome]:
        """
        Answer prompts, and yield one outcome per batch.

        Args:
            prompts: the prompts.
        """
        return run_halving(self.plan(prompts), self._run, lambda batch, message: Outcome(batch, None, message))

    def plan(self, prompts: Sequence[EvaluationPrompt]) -> Iterator[list[EvaluationPrompt]]:
        """
        Divide prompts into batches of one kind and similar length, and yield the longest ones first.

        Args:
            prompts: the prompts.
        """
        return plan_batches(prompts, self.batch_size, self._kind)

    def _identity(self) -> str:
        image_processor = self.chat_model.processor.image_processor.to_dict()
        parts = [self.info.revision, str(self.chat_model.model.dtype), self.budget, image_processor]
        return json.dumps(parts, sort_keys=True, default=str)

    def _kind(self, prompt: EvaluationPrompt) -> Hashable:
        """Return what the prompts of a batch must have in common."""
        wanted = prompt.wanted if isinstance(prompt.wanted, Generation) else Continuation
        return prompt.key if self._is_alone(prompt) else (wanted, prompt.image is None)

    def _is_alone(self, prompt: EvaluationPrompt) -> bool:
        if isinstance(prompt.wanted, Generation):
            longest = longest_together(self.chat_model, prompt.wanted.max_new_tokens)
            return prompt.wanted.sampled or prompt.length > longest
        continuation = len(self.chat_model.processor.tokenizer(prompt.wanted.text)["input_ids"])
        return prompt.length > longest_together(self.chat_model, continuation)

    def _run(self, batch: list[EvaluationPrompt]) -> Outcome:
        """Answer a batch."""
        try:
            return Outcome(batch, self._answer_batch(batch))
        except InputError as error:  # concerns one prompt, since prompts that are too long never share a batch
            return Outcome(batch, None, str(error))

    @torch.inference_mode()
    def _answer_batch(self, batch: list[EvaluationPrompt]) -> list[Answer]:
        if isinstance(batch[0].wanted, Generation):
            return [{"answer": text} for text in self._generate(batch, batch[0].wanted)]
        return self._score(batch)

    def _generate(self, batch: list[EvaluationPrompt], wanted: Generation) -> list[str]:
        model, processor = self.chat_model.model, self.chat_model.processor
        inputs = self._inputs(batch, [prompt.messages for prompt in batch], add_generation_prompt=True)
        begin = inputs["input_ids"].shape[1]
        room = self.chat_model.max_length - begin
        if room < 1:
            raise InputError(f"The prompt must have fewer than {self.chat_model.max_length} tokens, got {begin}.")
        if wanted.sampled:  # seeded by the question, so that runs can be repeated and resumed
            torch.manual_seed(int(batch[0].key[:8], 16))
        output = model.generate(**inputs, max_new_tokens=min(wanted.max_new_tokens, room), **wanted.keywords())
        texts = processor.batch_decode(output[:, begin:], skip_special_tokens=True)
        return [wanted.cut(text) for text in texts]

    def _score(self, batch: list[EvaluationPrompt]) -> list[Answer]:
        """Return the summed log-probabilities of continuations, and whether each is the greedy one."""
        conversations = []
        for prompt in batch:
            assert isinstance(prompt.wanted, Continuation)
            text = prompt.wanted.text.lstrip()  # answers in a chat start without a space
            if not text:
                raise InputError(f"The continuation must be a text that is not empty, got {prompt.wanted.text!r}.")
            conversations.append([*prompt.messages, {"role": "assistant", "content": text}])
        inputs = self._inputs(batch, conversations, continue_final_message=True)
        ids = inputs["input_ids"]  # (B, S), padded on the left
        if ids.shape[1] > self.chat_model.max_length:
            raise InputError(f"The prompt must have at most {self.chat_model.max_length} tokens, got {ids.shape[1]}.")
        begins = inputs["prompt_end_positions"].amax(1)  # (B), positions of the tokens before the continuations
        kept = ids.shape[1] - int(begins.min())
        logits = self.chat_model.model(**inputs, logits_to_keep=kept).logits.float()  # (B, kept, V)
        answers: list[Answer] = []
        for row, row_ids, begin in zip(logits, ids, begins.tolist(), strict=True):
            count = len(row_ids) - 1 - begin
            logprobs, wanted = row[-1 - count : -1].log_softmax(-1), row_ids[-count:]
            total = logprobs.gather(1, wanted[:, None]).sum().item()
            answers.append({"logprob": total, "greedy": bool((logprobs.argmax(1) == wanted).all())})
        return answers

    def _inputs(self, batch: list[EvaluationPrompt], conversations: list[Messages], **template: Any) -> BatchFeature:
        """Make the inputs of the model for conversations that all have an image or all have none."""
        inputs = self.chat_model.prepare_batch(conversations, self.budget, process_images=False, **template)
        if batch[0].image is not None:
            images, digests = [prompt.image for prompt in batch], [prompt.image_hash for prompt in batch]
            inputs.update(join_features(self.chat_model.encode_images(images, self.budget.query_len, digests)))
        return inputs


def describe_settings(chat_model: ChatModel, folder: str | None) -> dict[str, Any]:
    """
    Describe what answers depend on, apart from the weights, the dtype and the token budget.

    Args:
        chat_model: the model.
        folder: the folder of the model, or None if it has none.
    """
    model, processor = chat_model.model, chat_model.processor
    image_processor, generation = processor.image_processor.to_dict(), model.generation_config.to_diff_dict()
    settings = {
        "folder": folder,
        "chat_template": str(processor.chat_template),
        "image_processor": {name: value for name, value in image_processor.items() if name not in NO_SETTINGS},
        "tokenizer_sha256": hashlib.sha256(processor.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "generation_config": {name: value for name, value in generation.items() if name not in NO_SETTINGS},
        "attn_implementation": model.config.text_config._attn_implementation,
        "torch_threads": torch.get_num_threads(),
    }
    return json.loads(json.dumps(settings, default=str))
