"""Where inputs come from and where results go: local folders first, else repositories of the Hub."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,  # of the client that it uses: httpx or httpx2
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    SafetensorsParsingError,
)

from fusion_hf.conversion.checkpoint import SAFETENSORS_DTYPES, StoredTensor, first_line
from fusion_hf.conversion.errors import ConversionError
from fusion_hf.errors import InputError
from fusion_hf.publishing import check_repository, upload

Wanted = Literal["all", "headers", "configuration"]
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
SAFE_WEIGHTS = ("*.safetensors",)
BIN_WEIGHTS = ("pytorch_model*.bin", "adapter_model.bin")
TRAINED_WHOLE = ("non_lora_trainables.bin", "mm_projector.bin")
IN_FOLDERS = "*/*"
REPOSITORY = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
REVISION = re.compile(r"[0-9a-f]{40}")
FINGERPRINT_DIGITS = 16
HUB_ERRORS = (OSError, HTTPError, HFValidationError, NotASafetensorsRepoError, SafetensorsParsingError)


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
    if path.exists():
        path = path.resolve()
        return Location(path, path.name, _local_revision(path))
    if not REPOSITORY.fullmatch(source) or ".." in source:
        raise ConversionError(f"{flag}: {source!r} is neither an existing path nor the name of a Hub repository.")
    patterns, is_remote = list(SMALL_FILES), False
    try:
        if wanted != "configuration":
            names = HfApi().list_repo_files(source)
            is_full = any(name in names for name in ("model.safetensors", "model.safetensors.index.json"))
            is_remote = is_full and wanted == "headers"
            if not is_remote:
                patterns += (*SAFE_WEIGHTS, *TRAINED_WHOLE, *(() if is_full else BIN_WEIGHTS))
        folder = snapshot_download(source, allow_patterns=patterns, ignore_patterns=[IN_FOLDERS])
    except LocalEntryNotFoundError as error:
        raise ConversionError(
            f"{flag}: {source!r} is no local path, and the Hub cannot be reached: check the name or the network."
        ) from error
    except HUB_ERRORS as error:
        raise ConversionError(f"{flag}: {source!r} cannot be fetched from the Hub: {first_line(error)}.") from error
    path = Path(folder)
    return Location(path, source, _local_revision(path), is_remote=is_remote)


def _local_revision(path: Path) -> str | None:
    """The commit that a folder was downloaded at, from the traces that huggingface_hub leaves."""
    if path.parent.name == "snapshots" and REVISION.fullmatch(path.name):
        return path.name
    trace = path / ".cache" / "huggingface" / "download" / "config.json.metadata"
    if trace.is_file():
        lines = trace.read_text(encoding="utf-8", errors="replace").splitlines()
        if lines and REVISION.fullmatch(lines[0]):
            return lines[0]
    return None


def read_remote_headers(location: Location) -> dict[str, StoredTensor]:
    """What a repository's safetensors hold, from their headers alone: nothing else is downloaded.

    Raises:
        ConversionError: if the repository has no safetensors, or cannot be reached.
    """
    try:
        metadata = HfApi().get_safetensors_metadata(location.name, revision=location.revision)
    except HUB_ERRORS as error:
        raise ConversionError(
            f"The weights' headers of {location.name} cannot be read: {first_line(error)}."
        ) from error
    return {
        key: StoredTensor(
            location.path / file, key, tuple(tensor.shape), SAFETENSORS_DTYPES.get(tensor.dtype, tensor.dtype)
        )
        for file, content in metadata.files_metadata.items()
        for key, tensor in content.tensors.items()
    }


def describe(location: Location) -> str:
    """Name and revision; for a local folder of unknown revision, a fingerprint of its configuration."""
    if location.revision is not None:
        return f"`{location.name}`, revision `{location.revision}`"
    file = location.path / "config.json" if location.path.is_dir() else location.path
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:FINGERPRINT_DIGITS]
    return f"`{location.name}`, local, revision unknown (SHA-256 of `{file.name}` begins with `{digest}`)"


def check_can_push(repository: str) -> None:
    """Refuse a push that is bound to fail before hours of work.

    Raises:
        ConversionError: for an impossible name, or if nobody is logged in.
    """
    try:
        check_repository(repository, "--push-to-hub")
    except InputError as error:
        raise ConversionError(first_line(error)) from error


def push(folder: Path, repository: str, private: bool, message: str) -> str:
    """Upload a folder in one commit; returns the commit's address.

    Raises:
        ConversionError: if the upload fails; the folder stays.
    """
    names = sorted(path.name for path in folder.iterdir())
    try:
        return upload(folder, names, repository, private, message)
    except InputError as error:
        raise ConversionError(
            f"The result is complete in {folder}, but pushing it to {repository} failed: {first_line(error)}."
        ) from error
