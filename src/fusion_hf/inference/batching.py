"""Answers to any number of questions in batches. Runs are offline and resumable, and match single-prompt answers."""

import hashlib
import json
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from PIL import Image
from tqdm import tqdm

from fusion_hf.common.errors import InputError, short_name
from fusion_hf.common.user_values import dtype_name, is_address
from fusion_hf.data.record_parsing import RecordProblem
from fusion_hf.inference.answer_file import ANSWERS, LLAVA, OUTPUT_FORMATS, AnswerFile, Result
from fusion_hf.inference.chat_model import ChatModel, check_call
from fusion_hf.inference.devices import AUTO
from fusion_hf.inference.halving import run_halving
from fusion_hf.inference.image_digests import hash_image
from fusion_hf.inference.image_features import ImageFeatures, join_features
from fusion_hf.inference.llava_answers import llava_answers
from fusion_hf.inference.question_files import (
    Entry,
    Question,
    Records,
    digest_entries,
    entry_id,
    parse_question,
    read_entries,
)
from fusion_hf.inference.sampling import generate_keywords
from fusion_hf.inference.sampling_options import MOST_LIKELY, SamplingOptions
from fusion_hf.model.configuration_fusion import TokenBudget
from fusion_hf.model.processing_fusion import IMAGE_TOKEN
from fusion_hf.model.quantization_fusion import plain_tensors

BATCH_SIZE = 8
MAX_NEW_TOKENS = 256
DIGEST_VALUES = 16  # of each tensor: enough to tell two trained models apart, and fast to read


class Prompt(Protocol):
    """A prompt whose length `plan_batches` reads."""

    @property
    def length(self) -> int: ...


PromptT = TypeVar("PromptT", bound=Prompt)


@dataclass(frozen=True, eq=False)
class _Prompt:
    """A question, the index of its record, and an upper bound for its number of tokens."""

    index: int
    question: Question
    length: int


@dataclass(frozen=True, eq=False)
class _Whole:
    """A prompt with an open image. The messages mark where the image is."""

    prompt: _Prompt
    messages: list[dict[str, Any]]
    image: Image.Image | None


def batch_generate(
    records: Records,
    model: str | ChatModel | None = None,
    output: str | os.PathLike[str] | None = None,
    batch_size: int = BATCH_SIZE,
    max_new_tokens: int = MAX_NEW_TOKENS,
    query_len: int | None = None,
    image_token_grid: int | None = None,
    device: str = AUTO,
    dtype: str = AUTO,
    progress: bool = True,
    image_root: str | os.PathLike[str] | None = None,
    output_format: str = ANSWERS,
    sampling: SamplingOptions = MOST_LIKELY,
    bits: int | None = None,
) -> list[Result]:
    """
    Answer records in batches, by greedy decoding unless `sampling` says otherwise.

    Long prompts are answered first, so that you notice at once if a batch is too large. A batch that exceeds the
    memory of a GPU is halved. Images are opened when their batch is processed.

    Args:
        records: Records with a `question`, or with `messages` or LLaVA's `conversations` that end with a question.
            They may have an `image` (a path, an http(s) URL, the bytes of a file, or a PIL image) and an `id`
            (default: the index). Or the path of a JSONL file of records, whose folder is the root of relative image
            paths. `text` and `question_id` of LLaVA's `question.jsonl` are read as `question` and `id`.
        model: A [`ChatModel`], a model folder, or a repository of the Hub. Defaults to the bundled `fusion-nano`.
        output: JSONL file for the results. To resume a run that was killed, call this again with the same arguments
            (`batch_size` and `device` may differ).
        batch_size: Maximum number of prompts per batch. A prompt that may exceed the model's maximum length or Phi-3's
            short RoPE is answered alone, because only then does the answer match single-prompt answers.
        max_new_tokens, query_len, image_token_grid: See [`ChatModel.answer`].
        device, dtype, bits: See [`ChatModel.load`]. Do not pass them with a [`ChatModel`].
        progress: Whether to show a progress bar in a terminal.
        image_root: Root of relative image paths.
        sampling: How answers are chosen. Defaults to greedy decoding. The seed of a record's answer is `seed` plus the
            record's index, so that a sampled answer depends neither on the batch nor on a kill.
        output_format: `answers` writes the returned results to `output`, `llava` writes the lines of LLaVA's
            `answers.jsonl`.

    Returns:
        One result per record, in order: `{"id", "answer"}`, or `{"id", "error"}` for a record that cannot be answered.

    Raises:
        InputError: If an argument is invalid, or if `output` exists or was begun with other arguments.

    Example:
        >>> from fusion_hf import batch_generate
        >>> batch_generate([{"image": "docs/assets/red_circle.png", "question": "what color is the shape?"}])
        [{'id': 0, 'answer': 'red'}]
    """
    check_call(model, device, dtype, batch_size=batch_size, max_new_tokens=max_new_tokens)
    if output_format not in OUTPUT_FORMATS:
        allowed = ", ".join(map(repr, OUTPUT_FORMATS))
        raise InputError(f"`output_format` must be one of {allowed}, got {output_format!r}.")
    entries, root = read_entries(records)
    root = root if image_root is None else Path(image_root)
    with nullcontext() if output is None else AnswerFile(Path(output)) as answer_file:
        chat_model = model if isinstance(model, ChatModel) else ChatModel.load(model, device, dtype, bits=bits)
        if answer_file is not None and output_format == LLAVA:
            answer_file.as_line = llava_answers(entries, Path(chat_model.model.config.name_or_path).name)
        budget = chat_model.token_budget(query_len, image_token_grid)
        results: dict[int, Result] = {}
        if answer_file is not None:
            settings = _settings(entries, chat_model, max_new_tokens, budget)
            answer_file.begin(settings | sampling.as_settings())
            results = answer_file.results
        run = _Run(chat_model, root, max_new_tokens, budget, sampling)
        with tqdm(total=len(entries), initial=len(results), unit="record", disable=None if progress else True) as bar:
            for answered in run.results(entries, set(results), batch_size):
                if answer_file is not None:
                    answer_file.append(answered)
                results.update(answered)
                bar.update(len(answered))
        if answer_file is not None:
            answer_file.finish()
    return [results[index] for index in range(len(entries))]


class _Run:
    """Settings that all batches of a run share."""

    def __init__(
        self, chat_model: ChatModel, root: Path, max_new_tokens: int, budget: TokenBudget, sampling: SamplingOptions
    ):
        self.chat_model = chat_model
        self.root = root
        self.max_new_tokens = max_new_tokens
        self.budget = budget
        self.sampling = sampling

    def results(self, entries: list[Entry], done: set[int], batch_size: int) -> Iterator[dict[int, Result]]:
        """Yield results by index, batch by batch, for all records that are not `done`."""
        prompts, broken = self._prompts(entries)
        if new := {index: result for index, result in broken.items() if index not in done}:
            yield new
        # batches are formed from all records, so that after a kill the same prompts share a batch
        most = longest_together(self.chat_model, self.max_new_tokens)
        planned = plan_batches(prompts, batch_size, lambda prompt: prompt.index if prompt.length > most else None)
        batches = ([prompt for prompt in batch if prompt.index not in done] for batch in planned)
        yield from run_halving(filter(None, batches), self._answer, _too_large)

    def _prompts(self, entries: list[Entry]) -> tuple[list[_Prompt], dict[int, Result]]:
        """Return the prompts of valid records, and error results by index for the others."""
        prompts, broken = [], {}
        for index, entry in enumerate(entries):
            where = "" if entry.line is None else f"line {entry.line}: "
            identity: str | int = index
            try:
                identity = entry_id(entry, index)
                question = parse_question(entry, identity)
                prompts.append(_Prompt(index, question, self._length(question)))
            except (RecordProblem, ValueError) as error:  # ValueError: from the processor
                broken[index] = _error(identity, f"{where}{error}")
        return prompts, broken

    def _length(self, question: Question) -> int:
        """Return an upper bound for the number of the prompt's tokens."""
        messages = question.with_image(None if question.image is None else {"type": "image"})
        return count_tokens(self.chat_model, render(self.chat_model, messages, self.budget), self.budget)

    def _answer(self, batch: list[_Prompt]) -> dict[int, Result]:
        """Answer a batch and return results by index. A prompt that cannot be answered does not affect the others."""
        results: dict[int, Result] = {}
        whole: list[_Whole] = []
        opened: dict[str, Image.Image] = {}  # for this batch only
        for prompt in batch:
            source = prompt.question.image
            try:
                if isinstance(source, str) and source not in opened:
                    opened[source] = self._open(source)
                image = opened[source] if isinstance(source, str) else None if source is None else self._open(source)
            except (ValueError, OSError) as error:  # OSError: an impossible file name
                results[prompt.index] = _error(prompt.question.id, str(error))
                continue
            block = None if image is None else {"type": "image"}
            whole.append(_Whole(prompt, prompt.question.with_image(block), image))
        if len(whole) > 1:
            answers = self._generate(whole)
            return results | {
                each.prompt.index: _answered(each.prompt, a) for each, a in zip(whole, answers, strict=True)
            }
        for each in whole:
            features = None if each.image is None else self._encode(whole)[0]
            sampling = self.sampling.of_answer(each.prompt.index)
            settings = {**self.budget._asdict(), "image_features": features, "sampling": sampling}
            try:
                answer = self.chat_model.answer(each.messages, self.max_new_tokens, **settings)
                results[each.prompt.index] = _answered(each.prompt, answer)
            except InputError as error:  # the prompt is longer than the model's maximum
                results[each.prompt.index] = _error(each.prompt.question.id, str(error))
        return results

    @torch.inference_mode()
    def _generate(self, batch: list[_Whole]) -> list[str]:
        """Answer prompts, none of which reaches the model's maximum length before `max_new_tokens`."""
        model, processor = self.chat_model.model, self.chat_model.processor
        conversations = [each.messages for each in batch]
        inputs = self.chat_model.prepare_batch(
            conversations, self.budget, process_images=False, add_generation_prompt=True
        )
        if any(each.image is not None for each in batch):
            inputs.update(join_features(self._encode(batch)))
        choice = generate_keywords([self.sampling.of_answer(each.prompt.index) for each in batch])
        output = model.generate(**inputs, **choice, max_new_tokens=self.max_new_tokens)
        answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [answer.strip() for answer in answers]

    def _encode(self, batch: list[_Whole]) -> list[ImageFeatures]:
        """Encode the images. A prompt without an image gets mid grey."""
        images = [each.image for each in batch]
        digests = [None if image is None else hash_image(image) for image in images]
        return self.chat_model.encode_images(images, self.budget.query_len, digests)

    def _open(self, image: str | bytes | Image.Image) -> Image.Image:
        """Open the image of a record. A broken one raises `InputError`, `ValueError` or `OSError`."""
        if not isinstance(image, str) or is_address(image) or image.startswith("data:"):
            return self.chat_model.open_image(image)
        path = self.root / image
        if not path.is_file():
            raise InputError(f"An image must be an existing file or an http(s) URL, got {short_name(image)!r}.")
        return self.chat_model.open_image(str(path))


def render(chat_model: ChatModel, messages: list[dict[str, Any]], budget: TokenBudget) -> str:
    """
    Render the prompt of a conversation that ends with a question.

    Args:
        chat_model: Model whose processor renders the prompt.
        messages: Chat messages.
        budget: Token counts of the call.

    Returns:
        The prompt as text, with one mark for the image.
    """
    return chat_model.processor.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, query_len=budget.query_len
    )


def count_tokens(chat_model: ChatModel, text: str, budget: TokenBudget) -> int:
    """
    Return an upper bound for the number of tokens of a prompt.

    Args:
        chat_model: Model whose tokenizer counts the tokens.
        text: Prompt from [`render`].
        budget: Token counts of the call.
    """
    prefix = 1  # the first token of some tokenizers
    image_tokens = text.count(IMAGE_TOKEN) * budget.num_image_tokens
    return prefix + len(chat_model.processor.tokenizer(text)["input_ids"]) + image_tokens


def plan_batches(
    prompts: Iterable[PromptT], batch_size: int, kind: Callable[[PromptT], Hashable]
) -> Iterator[list[PromptT]]:
    """
    Group prompts of the same kind and of similar length into batches, the longest first.

    Args:
        prompts: Prompts with the numbers of their tokens.
        batch_size: Maximum number of prompts per batch.
        kind: Function that returns the kind of a prompt. A prompt that must be answered alone has its own kind.

    Yields:
        Batches of prompts.
    """
    kinds: dict[Hashable, list[PromptT]] = {}
    for prompt in sorted(prompts, key=lambda prompt: -prompt.length):
        kinds.setdefault(kind(prompt), []).append(prompt)
    for group in kinds.values():
        yield from (group[begin : begin + batch_size] for begin in range(0, len(group), batch_size))


def longest_together(chat_model: ChatModel, max_new_tokens: int) -> int:
    """Return the length in tokens up to which a prompt has the same answer alone and in a batch."""
    return chat_model.short_rope_length - max_new_tokens


def _answered(prompt: _Prompt, answer: str) -> Result:
    return {"id": prompt.question.id, "answer": answer}


def _error(identity: str | int, message: str) -> Result:
    return {"id": identity, "error": " ".join(message.split())}


def _too_large(batch: list[_Prompt], message: str) -> dict[int, Result]:
    """Return the result of a prompt that exceeds the memory of a GPU on its own."""
    return {prompt.index: _error(prompt.question.id, message) for prompt in batch}


def _settings(entries: list[Entry], chat_model: ChatModel, max_new_tokens: int, budget: TokenBudget) -> dict[str, Any]:
    """Return the settings on which the answers depend."""
    return {
        "records": len(entries),
        "records_sha256": digest_entries(entries),
        "dtype": dtype_name(chat_model.model.dtype),
        "max_new_tokens": max_new_tokens,
        **budget._asdict(),
        "model": digest_model(chat_model),
    }


def digest_model(chat_model: ChatModel) -> str:
    """Return the name of a model's folder with a digest of its configuration, its template and its weights."""
    config = chat_model.model.config.to_dict()
    name = config.pop("_name_or_path", "")
    config.pop("transformers_version", None)
    digest = hashlib.sha256(json.dumps([config, chat_model.processor.chat_template], default=str).encode())
    for key, tensor in chat_model.model.state_dict().items():
        for stored in plain_tensors(tensor):
            values = stored.flatten()[:DIGEST_VALUES].double().cpu()
            digest.update(f"{key} {tuple(stored.shape)}".encode() + values.numpy().tobytes())
    return f"{Path(name).name}@{digest.hexdigest()[:16]}"
