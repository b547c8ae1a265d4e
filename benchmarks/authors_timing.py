"""What both sides of `authors.py` are asked, in a process of their own: theirs with their Python, ours with this one.

A process is given its job as JSON, and then one command a line: it answers each with a line of JSON. This file imports
nothing of the package, and nothing of theirs.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from memory import peak_allocated, peak_resident, resident_status

LEARNING_RATE = 1e-5
CPU = torch.device("cpu")


class Clock:
    """A streamer of `generate`: notes when it hands out the prompt and each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Side(Protocol):
    """One implementation with its model loaded."""

    model: torch.nn.Module

    def preprocess(self, path: str) -> Callable[[], Any]:
        """Open an image; what is returned makes pixel values of it."""

    def prepare(self, path: str, question: str) -> Any:
        """Everything that `generate` takes."""

    def generate(self, prompt: Any, tokens: int, clock: Clock) -> list[int]:
        """So many greedy tokens, whatever they are."""

    def answer(self, paths: list[str], questions: list[str], tokens: int) -> list[str]:
        """Answers to as many questions, each about the image in its file."""

    def answer_each(self, path: str, questions: list[str], tokens: int) -> list[str]:
        """Answers to questions about one image."""

    def train(self) -> None:
        """Get the model ready for training with gradient checkpointing."""

    def read_batch(self, path: str) -> dict[str, Any]:
        """A batch for training, from the file in which both sides have it."""

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """Its loss `()`."""


class Commands:
    """What a process can be asked: each method is a command."""

    def __init__(self, side: Side):
        self.side = side
        self.optimizer: torch.optim.Optimizer | None = None

    def preprocess(self, image: str) -> dict[str, Any]:
        """Seconds of an image that is decoded already."""
        function = self.side.preprocess(image)
        return {"preprocessing": _seconds(function)}

    def generate(self, image: str, question: str, tokens: int) -> dict[str, Any]:
        """Seconds to the first token from the prepared prompt, and of each later one."""
        prompt, clock = self.side.prepare(image, question), Clock()
        start = time.perf_counter()
        ids = self.side.generate(prompt, tokens, clock)
        first, last = clock.times[1], clock.times[-1]  # times[0] is the prompt's
        later = {"later_token": (last - first) / (tokens - 1)} if tokens > 1 else {}
        return {"first_token": first - start, **later, "tokens": ids}

    def answer(self, images: list[str], questions: list[str], tokens: int) -> dict[str, Any]:
        """Seconds from files to answers, a question about each image."""
        return self._answers("eight_on_eight", lambda: self.side.answer(images, questions, tokens))

    def answer_each(self, image: str, questions: list[str], tokens: int) -> dict[str, Any]:
        """The same of questions about one image."""
        return self._answers("ten_on_one", lambda: self.side.answer_each(image, questions, tokens))

    def memory(self, image: str, question: str, tokens: int) -> dict[str, Any]:
        """Resident memory as it is, and its growth while tokens are made: of the first call, and of a later one."""
        loaded = resident_status("VmRSS")
        prompt = self.side.prepare(image, question)
        growths = [peak_resident(lambda: self.side.generate(prompt, tokens, Clock()), CPU) for _ in range(2)]
        return {
            "resident": loaded,
            "first_growth": growths[0],
            "growth": growths[1],
            "resident_after": resident_status("VmRSS"),
        }

    def step(self, batch: str) -> dict[str, Any]:
        """Seconds of a training step: forward, backward, and AdamW's update of all weights."""
        if self.optimizer is None:
            self.side.train()
            self.optimizer = torch.optim.AdamW(self.side.model.parameters(), lr=LEARNING_RATE, fused=True)
        losses: list[float] = []
        inputs = self.side.read_batch(batch)
        passes = _seconds(lambda: losses.append(self._passes(inputs)))
        update = _seconds(self.optimizer.step)
        self.optimizer.zero_grad(set_to_none=True)
        return {"passes": passes, "step": passes + update, "loss": losses[0]}

    def step_memory(self, batch: str) -> dict[str, Any]:
        """Most bytes that forward and backward add to weights and optimizer state, after a step."""
        inputs = self.side.read_batch(batch)
        grown = peak_resident(lambda: self._passes(inputs), CPU)
        self.side.model.zero_grad(set_to_none=True)
        allocated = peak_allocated(lambda: self._passes(inputs), CPU)
        self.side.model.zero_grad(set_to_none=True)
        return {"step_resident": grown, "step_allocated": allocated}

    def _passes(self, batch: dict[str, Any]) -> float:
        loss = self.side.loss(batch)
        loss.backward()
        return loss.item()

    def _answers(self, figure: str, function: Callable[[], list[str]]) -> dict[str, Any]:
        answers: list[str] = []
        return {figure: _seconds(lambda: answers.extend(function())), "answers": answers}


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def serve(load: Callable[[dict[str, Any]], Side]) -> None:
    """Do the job in the command line, and whatever is asked on standard input, until that ends."""
    job = json.loads(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the model's code prints is no reply

    def reply(content: dict[str, Any]) -> None:
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    torch.set_num_threads(job["threads"])
    side = load(job)
    if "cold" in job:
        side.generate(side.prepare(**job["cold"]), 1, Clock())
        return
    commands = Commands(side)
    reply({"parameters": sum(weight.numel() for weight in side.model.parameters())})
    for line in sys.stdin:
        command = json.loads(line)
        reply(getattr(commands, command.pop("do"))(**command))
