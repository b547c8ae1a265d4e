"""The objects of OpenAI's API that this server returns."""

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from fusion_hf.inference.model_info import FINGERPRINT, INFO, MAX_LENGTH, ModelInfo
from fusion_hf.serving.engine import Finished

END = b"data: [DONE]\n\n"


def model_object(name: str, created: int, info: ModelInfo) -> dict[str, Any]:
    """
    Describe a model in a list. In addition to OpenAI's fields, it has the maximum length, named as in vLLM, and
    other facts.

    Args:
        name: the name of the model.
        created: the time of the server's start in seconds since the epoch.
        info: the information about the model.
    """
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "fusion_hf",
        MAX_LENGTH: info.max_length,
        FINGERPRINT: info.fingerprint,
        INFO: info.write(),
    }


def sse(content: dict[str, Any]) -> bytes:
    """
    Return a server-sent event.

    Args:
        content: the JSON value.
    """
    return f"data: {json.dumps(content)}\n\n".encode()


def usage(finished: Finished) -> dict[str, int]:
    """
    Return the numbers of tokens of a request.

    Args:
        finished: the end of the answer.
    """
    return {
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
    }


@dataclass(frozen=True)
class Completion:
    """The answer to one request, complete or in chunks."""

    model: str
    fingerprint: str  # identifies the model and its settings
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, finished: Finished) -> dict[str, Any]:
        """
        Return the reply to a request that does not stream.

        Args:
            text: the answer.
            finished: the end of the answer.
        """
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": finished.reason,
        }
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage(finished)}

    def chunk(self, delta: dict[str, str], with_usage: bool, reason: str | None = None) -> bytes:
        """
        Return a piece of a streamed answer.

        Args:
            delta: the new part of the message.
            with_usage: whether the stream ends with the usage.
            reason: the finish reason, in the last piece.
        """
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        more = {"usage": None} if with_usage else {}
        return sse({**self._head("chat.completion.chunk"), "choices": [choice], **more})

    def usage_chunk(self, finished: Finished) -> bytes:
        """
        Return the last chunk, for requests that ask for the usage.

        Args:
            finished: the end of the answer.
        """
        return sse({**self._head("chat.completion.chunk"), "choices": [], "usage": usage(finished)})

    def _head(self, kind: str) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, FINGERPRINT: self.fingerprint}
