"""Where inputs come from: local folders first, else repositories of the Hub. Imports nothing heavy before it must."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fusion_hf.common.errors import short_name
from fusion_hf.conversion.errors import ConversionError
from fusion_hf.hub.folders import REPOSITORY

Wanted = Literal["all", "headers", "configuration"]
REVISION = re.compile(r"[0-9a-f]{40}")
FINGERPRINT_DIGITS = 16


@dataclass(frozen=True)
class Location:
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


def locate(source: str, flag: str, wanted: Wanted = "all") -> Location:
    """A local path, or a repository that is downloaded into the cache.

    Args:
        source: what the user gave.
        flag: the option that it was given with, for errors.
        wanted: what to download of a repository. `"headers"` leaves safetensors where they are; `"configuration"`
            fetches no weights at all.

    Raises:
        ConversionError: if it is neither, or the download fails.
    """
    path = Path(source).expanduser()
    try:
        if path.exists():
            path = path.resolve()
            return Location(path, path.name, local_revision(path))
    except (OSError, ValueError):  # longer than a name can be, or with a null character
        pass
    if not REPOSITORY.fullmatch(source):
        shown = short_name(repr(source))
        raise ConversionError(f"{flag}: {shown} is neither an existing path nor the name of a Hub repository.")
    from fusion_hf.conversion.hub import download  # its client takes longer to import than all of this

    path, is_remote = download(source, flag, wanted)
    return Location(path, source, local_revision(path), is_remote)


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


def describe(location: Location) -> str:
    """Name and revision; for a local folder of unknown revision, a fingerprint of its configuration."""
    if location.revision is not None:
        return f"`{location.name}`, revision `{location.revision}`"
    file = location.path / "config.json" if location.path.is_dir() else location.path
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:FINGERPRINT_DIGITS]
    return f"`{location.name}`, local, revision unknown (SHA-256 of `{file.name}` begins with `{digest}`)"
