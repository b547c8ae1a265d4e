"""`fusion-hf chat`: through pipes, and in a terminal."""

import contextlib
import os
import select
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from fusion_hf.cli.model_loading import AnswerStreamer
from fusion_hf.inference import ChatModel, Conversation

QUESTIONS = ("what color is the shape?", "what shape is it?")
SECONDS = 120


@pytest.fixture(scope="module")
def chat_model(nano: Path) -> ChatModel:
    return ChatModel.load()


@pytest.fixture(scope="module")
def answers(chat_model: ChatModel, image_path: str) -> list[str]:
    """To both questions in one conversation."""
    conversation = Conversation(chat_model, chat_model.open_image(image_path), max_new_tokens=16)
    return [conversation.ask(question) for question in QUESTIONS]


def test_two_turns_through_pipes(run, image_path, answers):
    result = run("chat", image_path, "--max-new-tokens", 16, stdin="\n".join(QUESTIONS))
    assert (result.returncode, result.stdout, result.stderr) == (0, "\n".join(answers) + "\n", "")


def test_commands_and_errors_do_not_end_it(run, image_path, answers):
    lines = [QUESTIONS[0], "/help", "", "why? " * 20_000, "/reset", *QUESTIONS, "/exit", "what?"]
    result = run("chat", image_path, "--max-new-tokens", 16, stdin="\n".join(lines))
    assert result.stdout.splitlines() == [answers[0], *answers]
    errors = result.stderr.splitlines()
    assert errors[0] == "error: A command must be /reset or /exit, got /help."
    assert errors[1].startswith("error: A prompt must have at most ") and errors[1].endswith("/reset.")
    assert len(errors) == 2
    assert result.returncode == 0


def test_history_is_kept_and_forgotten(chat_model, image_path, monkeypatch):
    seen = []

    def answer(self, messages, *_, **__):
        seen.append([(message["role"], message["content"]) for message in messages])
        return f"answer {len(seen)}"

    monkeypatch.setattr(ChatModel, "answer", answer)
    image = chat_model.open_image(image_path)
    conversation = Conversation(chat_model, image, 16)
    for question in QUESTIONS:
        conversation.ask(question)
    conversation.reset()
    conversation.ask(QUESTIONS[1])

    def first(question: str) -> tuple:
        return "user", [{"type": "image", "image": image}, {"type": "text", "text": question}]

    second = ("user", [{"type": "text", "text": QUESTIONS[1]}])
    assert seen[0] == [first(QUESTIONS[0])]
    assert seen[1] == [first(QUESTIONS[0]), ("assistant", "answer 1"), second]
    assert seen[2] == [first(QUESTIONS[1])]


def test_answers_are_streamed_without_control_characters(chat_model, capsys):
    tokenizer = chat_model.processor.tokenizer
    streamer = AnswerStreamer(tokenizer)
    for _ in range(2):  # one streamer serves a whole conversation
        streamer.put(tokenizer("prompt", return_tensors="pt").input_ids)
        streamer.put(tokenizer(" red and ", return_tensors="pt").input_ids[0])
        assert capsys.readouterr().out == "red and "
        streamer.put(tokenizer("\x1b[2Jblue", return_tensors="pt").input_ids[0])
        streamer.end()
        assert capsys.readouterr().out == "[2Jblue\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo terminals")
class TestTerminal:
    """In a pseudo terminal."""

    @pytest.fixture
    def terminal(self, command, offline, image_path):
        import pty

        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [*command, "chat", image_path, "--max-new-tokens", "16"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**offline, "TERM": "dumb"},
            start_new_session=True,
            # a shell that runs the tests in the background has them, and so their children, ignore Ctrl-C
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        os.close(theirs)
        yield process, ours
        process.kill()
        process.wait()
        os.close(ours)

    def read(self, ours: int) -> bytes:
        """What comes next; fails, rather than waits for ever, if nothing does."""
        readable, _, _ = select.select([ours], [], [], SECONDS)
        assert readable, f"nothing was written for {SECONDS} s"
        return os.read(ours, 1000)

    def read_until(self, ours: int, end: str) -> str:
        text = ""
        while not text.endswith(end):
            text += self.read(ours).decode()
        return text

    def read_rest(self, ours: int) -> str:
        text = b""
        with contextlib.suppress(OSError):  # how Linux says that the other side is closed
            while piece := self.read(ours):
                text += piece
        return text.decode()

    def test_two_turns_and_the_end_of_the_input(self, terminal, image_path, answers):
        process, ours = terminal
        assert image_path in self.read_until(ours, "> ")
        for question, answer in zip(QUESTIONS, answers, strict=True):
            os.write(ours, f"{question}\n".encode())
            assert f"{answer}\r\n> " in self.read_until(ours, f"{answer}\r\n> ")
        os.write(ours, b"\x04")
        assert "Traceback" not in self.read_rest(ours)
        assert process.wait(SECONDS) == 0

    def test_interrupt_leaves(self, terminal):
        process, ours = terminal
        self.read_until(ours, "> ")
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):
            os.write(ours, b"\n")  # an interrupt between the prompt and the wait for keys is noticed with the next key
        assert "Traceback" not in self.read_rest(ours)
        assert process.wait(SECONDS) == 0
