"""The commands for both sides of `authors.py`, which run in processes of their own with their own Python.

A process gets its job as JSON, and then one command per line, which it answers with a line of JSON. This file imports
neither the package nor the authors' code.
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
    """A streamer for `generate` that records when the prompt and each token arrive."""

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
        """Open an image, and return a function that makes pixel values from it."""

    def prepare(self, path: str, question: str) -> Any:
        """Return all inputs of `generate`."""

    def generate(self, prompt: Any, tokens: int, clock: Clock) -> list[int]:
        """Generate a fixed number of tokens greedily."""

    def answer(self, paths: list[str], questions: list[str], tokens: int) -> list[str]:
        """Answer one question about each image."""

    def answer_each(self, path: str, questions: list[str], tokens: int) -> list[str]:
        """Answer several questions about one image."""

    def train(self) -> None:
        """Prepare the model for training with gradient checkpointing."""

    def read_batch(self, path: str) -> dict[str, Any]:
        """Read a batch for training from the file that both sides share."""

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return the loss `()` of a batch."""


class Commands:
    """The commands that a process accepts, one per method."""

    def __init__(self, side: Side):
        self.side = side
        self.optimizer: torch.optim.Optimizer | None = None

    def preprocess(self, image: str) -> dict[str, Any]:
        """Measure the time from a decoded image to pixel values, in seconds."""
        function = self.side.preprocess(image)
        return {"preprocessing": _seconds(function)}

    def generate(self, image: str, question: str, tokens: int) -> dict[str, Any]:
        """Measure the time from a prepared prompt to the first token, and of each later token, in seconds."""
        prompt, clock = self.side.prepare(image, question), Clock()
        start = time.perf_counter()
        ids = self.side.generate(prompt, tokens, clock)
        first, last = clock.times[1], clock.times[-1]  # times[0] belongs to the prompt
        later = {"later_token": (last - first) / (tokens - 1)} if tokens > 1 else {}
        return {"first_token": first - start, **later, "tokens": ids}

    def answer(self, images: list[str], questions: list[str], tokens: int) -> dict[str, Any]:
        """Measure the time from files to answers, with one question per image, in seconds."""
        return self._answers("eight_on_eight", lambda: self.side.answer(images, questions, tokens))

    def answer_each(self, image: str, questions: list[str], tokens: int) -> dict[str, Any]:
        """Measure the time from a file to the answers to several questions about it, in seconds."""
        return self._answers("ten_on_one", lambda: self.side.answer_each(image, questions, tokens))

    def memory(self, image: str, question: str, tokens: int) -> dict[str, Any]:
        """Measure the resident memory, and its growth during generation in the first call and a later one."""
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
        """Measure the time of a training step: forward, backward, and AdamW's update of all weights, in seconds."""
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
        """Measure the peak bytes that forward and backward add to weights and optimizer state, after one step."""
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
    """Do the job in the command line, and answer commands from the standard input until it ends."""
    job = json.loads(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of the model's code must not become a reply

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
