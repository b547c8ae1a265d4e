"""JSON that has the same bytes for the same value."""

import json
from typing import Any


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """JSON with sorted keys and a line end; the same bytes for the same value."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, indent=indent)
    return f"{text}\n".encode("utf-8", "backslashreplace")  # half a character becomes JSON's escape of it
