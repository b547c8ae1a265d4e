"""One image, many questions: what sharing work saves, and what fast mode costs in accuracy.

    python benchmarks/conversation.py --threads 1 --output benchmarks/results/conversation_cpu.json

Times are of the middle-sized FUSION with random weights of `inference.py`; a round measures every variant once, in an
order that changes from round to round, and ratios are taken within a round. Accuracy is that of fusion-nano, on
conversations about drawn images of its test split.
"""

import argparse
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from measure import (
    DTYPES,
    add_machine_options,
    generation_seconds,
    paired_ratios,
    parse_on_machine,
    positive,
    seconds,
    surroundings,
    turned,
    write_result,
)
from tqdm import tqdm
from transformers import DynamicCache
from workload import (
    ANSWER_TOKENS,
    QUESTION_TOKENS,
    SIZES,
    Request,
    Size,
    build_model,
    make_image_processor,
    make_photo,
    make_prompt,
    make_words,
)

from fusion_hf.inference import ChatModel, Conversation, question_message
from fusion_hf.nano.training_records import DrawnMixture, NanoRecord, draw_images, question_records

SEED = 1
LONGEST_ANSWER = 6  # tokens
TIMED_TOKENS = 2  # only the first one counts
MODES = ("faithful", "fast", "by itself")


class Times:
    """A model, the first two turns of a conversation about a photo, and the measurements."""

    def __init__(self, size: Size, dtype: torch.dtype, device: torch.device, questions: int):
        self.device = device
        self.model = build_model(size, dtype, device)
        pixel_values = make_image_processor(size)(make_photo(size.photo), return_tensors="pt")["pixel_values"]
        self.first, self.whole = (
            make_prompt(self.model.config, pixel_values.to(device, dtype), Request(turns=turns)) for turns in (1, 2)
        )
        words = partial(make_words, self.model.config, np.random.default_rng(SEED))
        self.questions = [torch.tensor([words(QUESTION_TOKENS)], device=device) for _ in range(questions)]
        self.measured: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def encode_separately(self) -> None:
        """Run the tower, connector and projectors in one call per question."""
        for question in self.questions:
            self.model.model.encode_image(self.first["pixel_values"], question, None)

    def encode_sharing(self) -> None:
        features = self.model.get_global_features(self.first["pixel_values"])
        for question in self.questions:
            self.model.model.encode_image(self.first["pixel_values"], question, None, features)

    def first_token(self, **given: Any) -> float:
        return generation_seconds(self.model, given, TIMED_TOKENS)[0]

    def first_token_fast(self, features: torch.Tensor) -> float:
        """Run the second turn on a cache of the first turn and its answer, except for the answer's last token."""
        held = self.first["input_ids"].shape[1] + ANSWER_TOKENS - 1
        before = {name: self.whole[name][:, :held] for name in ("input_ids", "attention_mask")}
        cache = DynamicCache(config=self.model.config.text_config)
        self.model(**self.first | before, cache=cache, logits_to_keep=1)
        return self.first_token(**self.whole, global_features=features, cache=cache)

    def round(self, index: int) -> None:
        features = self.model.get_global_features(self.first["pixel_values"])
        encoders: dict[str, Callable[[], None]] = {"separate": self.encode_separately, "shared": self.encode_sharing}
        for name in turned(list(encoders), index):
            self.measured["tower_seconds"][name].append(seconds(encoders[name], self.device))
        turns: dict[str, Callable[[], float]] = {
            "first turn": partial(self.first_token, **self.first),
            "second turn, faithful": partial(self.first_token, **self.whole, global_features=features),
            "second turn, fast": partial(self.first_token_fast, features),
        }
        for name in turned(list(turns), index):
            self.measured["first_token_seconds"][name].append(turns[name]())

    def ratios(self) -> dict[str, dict[str, float]]:
        tower, turns = self.measured["tower_seconds"], self.measured["first_token_seconds"]
        return {
            "tower, shared / separate": paired_ratios(tower["shared"], tower["separate"]),
            **{f"{name} / first turn": paired_ratios(turns[name], turns["first turn"]) for name in list(turns)[1:]},
        }


def measure_times(arguments: argparse.Namespace) -> dict[str, Any]:
    size, device = SIZES[arguments.size], torch.device(arguments.device)
    times = Times(size, DTYPES[arguments.dtype], device, arguments.questions)
    with torch.inference_mode():
        times.model(**times.whole, logits_to_keep=1)  # warms up
        for index in tqdm(range(arguments.repeats), desc="times", unit="round"):
            times.round(index)
    tokens = {"first turn": times.first["input_ids"].shape[1], "both turns": times.whole["input_ids"].shape[1]}
    return {"prompt_tokens": tokens, "ratios": times.ratios(), "repeats": times.measured}


def make_conversations(count: int) -> list[NanoRecord]:
    """Make conversations of two and three turns about drawn images that training and validation do not use."""
    # enough of each category, since most have several questions
    images = draw_images("test", DrawnMixture(count, count, count, count), seed="conversation")
    generator = random.Random(SEED)
    records = [record for record in question_records(images, generator) if len(record.turns) > 1]
    return generator.sample(records, count)


def answers_of(chat_model: ChatModel, record: NanoRecord, mode: str) -> list[str]:
    """Answer the questions of a conversation, with each answer as context for the next question."""
    image, questions = record.open_image(), [question for question, _ in record.turns]
    if mode == "by itself":
        return [chat_model.answer([question_message(text, image)], LONGEST_ANSWER) for text in questions]
    conversation = Conversation(chat_model, image, LONGEST_ANSWER, fast=mode == "fast")
    return [conversation.ask(text) for text in questions]


def measure_accuracy(arguments: argparse.Namespace) -> dict[str, Any]:
    """Count exact answers by mode and turn, and later answers that only one of the two modes gets right."""
    chat_model = ChatModel.load(device=arguments.device, dtype=arguments.dtype)
    asked: Counter[str] = Counter()
    right: dict[str, Counter[str]] = {mode: Counter() for mode in MODES}
    only: Counter[str] = Counter()
    for record in tqdm(make_conversations(arguments.conversations), desc="accuracy", unit="conversation"):
        hits = {
            mode: [
                answer == expected
                for answer, (_, expected) in zip(answers_of(chat_model, record, mode), record.turns, strict=True)
            ]
            for mode in MODES
        }
        for turn in range(len(record.turns)):
            names = [f"turn {turn + 1}", *(["later turns"] if turn else [])]
            asked.update(names)
            for mode in MODES:
                right[mode].update(names if hits[mode][turn] else [])
            if turn and hits["faithful"][turn] != hits["fast"][turn]:
                only["faithful" if hits["faithful"][turn] else "fast"] += 1
    return {
        "asked": dict(sorted(asked.items())),
        "right": {mode: dict(sorted(counts.items())) for mode, counts in right.items()},
        "later answers right in one mode only": dict(only),
    }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="middle")
    parser.add_argument("--repeats", type=positive, default=3, help="number of rounds")
    parser.add_argument("--questions", type=positive, default=10, help="number of questions about one image")
    parser.add_argument("--conversations", type=positive, default=300, help="number of conversations with fusion-nano")
    add_machine_options(parser)
    return parser


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse_on_machine(make_parser(), arguments)
    names = ("size", "repeats", "questions", "conversations", "dtype", "device", "threads")
    result = {
        "settings": {name: getattr(options, name) for name in names},
        **surroundings(options.device),
        "accuracy": measure_accuracy(options),
        **measure_times(options),
    }
    write_result(result, options.output)
    print(json.dumps({name: result[name] for name in ("accuracy", "ratios")}, indent=1))
    return result


if __name__ == "__main__":
    main()
