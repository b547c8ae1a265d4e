"""Judges on this machine: servers of OpenAI's protocol."""

from tests.helpers.openai_server import Payload, Scripted

# what each benchmark's scoring takes for a good mark, by what its prompt says
VERDICTS = (
    ("Correctness", "1.0"),
    ("Extracted answer", "A"),
    ("Reference answer", "correct"),
    ("[System]", "8 8"),
    ("the word yes", "yes"),
)


def give_verdict(payload: Payload) -> str:
    return next(verdict for mark, verdict in VERDICTS if mark in payload["messages"][0]["content"])


def judge() -> Scripted:
    """Give every answer a good mark."""
    return Scripted(give_verdict)


def mortal_judge() -> Scripted:
    """Answer nothing but the first word."""
    return Scripted(
        give_verdict,
        faults=lambda payload, repeat: None if "the word yes" in payload["messages"][0]["content"] else "500",
    )
