"""Requests of real clients.

`tests/fixtures/client_requests` holds what a small server recorded from the packages named in it; the image is a mark
there, and long texts are shortened. Those of `by_hand.json` are written after the code of tools.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.helpers.serving import ROOT, red_circle

FOLDER = ROOT / "tests" / "fixtures" / "client_requests"
IMAGE_MARK = "data:image/png;base64,RED_CIRCLE"


@dataclass(frozen=True)
class Recording:
    """A client's request; `refused` is the field, or "path", that a server without tools refuses."""

    client: str
    call: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    refused: str | None

    def __str__(self) -> str:
        return f"{self.client}: {self.call}"

    @property
    def has_image(self) -> bool:
        return IMAGE_MARK in json.dumps(self.body)

    @property
    def content(self) -> str:
        """The body as JSON, with the image."""
        return json.dumps(self.body).replace(IMAGE_MARK, red_circle())


def read_recordings() -> Iterator[Recording]:
    """All of them, client by client."""
    for file in sorted(FOLDER.glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        for request in content["requests"]:
            yield Recording(
                file.stem,
                request["call"],
                request["path"],
                content["headers"],
                request["body"],
                request.get("refused"),
            )
