"""Where inputs lie: in local folders, or in folders that were downloaded from the Hub. Imports nothing heavy."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Wanted = Literal["all", "headers", "configuration"]
REVISION = re.compile(r"[0-9a-f]{40}")
FINGERPRINT_DIGITS = 16


@dataclass(frozen=True)
class InputLocation:
    """A folder or file on disk.

    Attributes:
        path: where it is.
        name: the repository, or the folder's own name (never its full path: it goes into the model card).
        revision: commit of the repository, as far as it is known.
        is_remote: whether the weights are in a repository and only their headers are to be read.
    """

    path: Path
    name: str
    revision: str | None
    is_remote: bool = False


def local_revision(path: Path) -> str | None:
    """The commit that a folder was downloaded at, from the traces that huggingface_hub leaves."""
    if path.parent.name == "snapshots" and REVISION.fullmatch(path.name):
        return path.name
    trace = path / ".cache" / "huggingface" / "download" / "config.json.metadata"
    if trace.is_file():
        lines = trace.read_text(encoding="utf-8", errors="replace").splitlines()
        if lines and REVISION.fullmatch(lines[0]):
            return lines[0]
    return None


def describe(location: InputLocation) -> str:
    """Name and revision; for a local folder of unknown revision, a fingerprint of its configuration."""
    if location.revision is not None:
        return f"`{location.name}`, revision `{location.revision}`"
    file = location.path / "config.json" if location.path.is_dir() else location.path
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:FINGERPRINT_DIGITS]
    return f"`{location.name}`, local, revision unknown (SHA-256 of `{file.name}` begins with `{digest}`)"
