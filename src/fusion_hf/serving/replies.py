"""OpenAI's objects, as far as this server speaks of them."""

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from fusion_hf.inference.model_info import FINGERPRINT, INFO, MAX_LENGTH, ModelInfo
from fusion_hf.serving.engine import Finished

END = b"data: [DONE]\n\n"


def model_object(name: str, created: int, info: ModelInfo) -> dict[str, Any]:
    """A model in a list; beside OpenAI's fields its greatest length, called as vLLM does, and what else is known."""
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
    """Return an event of a stream."""
    return f"data: {json.dumps(content)}\n\n".encode()


def usage(finished: Finished) -> dict[str, int]:
    """Return tokens of a request."""
    return {
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
    }


@dataclass(frozen=True)
class Completion:
    """The answer to one request, whole or in chunks."""

    model: str
    fingerprint: str  # of what it is made by
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, finished: Finished) -> dict[str, Any]:
        """Return the reply of a request that does not stream."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": finished.reason,
        }
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage(finished)}

    def chunk(self, delta: dict[str, str], with_usage: bool, reason: str | None = None) -> bytes:
        """Return a piece of a streamed answer."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        more = {"usage": None} if with_usage else {}
        return sse({**self._head("chat.completion.chunk"), "choices": [choice], **more})

    def usage_chunk(self, finished: Finished) -> bytes:
        """Return the last chunk, for who asked for it."""
        return sse({**self._head("chat.completion.chunk"), "choices": [], "usage": usage(finished)})

    def _head(self, kind: str) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, FINGERPRINT: self.fingerprint}
