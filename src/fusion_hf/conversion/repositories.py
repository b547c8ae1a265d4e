"""Requests to the Hub: downloads of inputs, and the upload of a result."""

from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # from its HTTP client, httpx or httpx2
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    SafetensorsParsingError,
)

from fusion_hf.common.errors import InputError
from fusion_hf.conversion.inputs import InputLocation, Wanted
from fusion_hf.conversion.model_files import ConversionError, first_line
from fusion_hf.hub.folders import HubOptions
from fusion_hf.hub.publishing import check_remote, check_repository, upload

if TYPE_CHECKING:
    from fusion_hf.conversion.stored_tensors import StoredTensor

SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
SAFE_WEIGHTS = ("*.safetensors",)
BIN_WEIGHTS = ("pytorch_model*.bin", "adapter_model.bin")
TRAINED_WHOLE = ("non_lora_trainables.bin", "mm_projector.bin")
IN_FOLDERS = "*/*"
SECONDS = 10.0  # until the Hub answers the first request
HUB_ERRORS = (OSError, HTTPError, HFValidationError, NotASafetensorsRepoError, SafetensorsParsingError)


def download(source: str, revision: str | None, flag: str, wanted: Wanted, hub: HubOptions) -> tuple[Path, bool]:
    """
    Download a repository into the cache.

    Args:
        source: Name of the repository.
        revision: Branch, tag or commit.
        flag: Option that was used, for errors.
        wanted: Files to download, see `inputs.locate`.
        hub: Options for requests to the Hub.

    Returns:
        The folder in the cache, and whether the weights were not downloaded.

    Raises:
        ConversionError: If there is no such repository, or if the Hub cannot be reached.
    """
    patterns, is_remote = list(SMALL_FILES), False
    is_offline = hub.local_files_only or is_offline_mode()
    try:
        if wanted != "configuration" and is_offline:
            patterns += (*SAFE_WEIGHTS, *TRAINED_WHOLE, *BIN_WEIGHTS)  # those that are in the cache
        elif wanted != "configuration":
            # a single request, because listing files takes several, each of which is tried for half a minute
            info = HfApi().model_info(source, revision=revision, timeout=SECONDS, token=hub.token)
            names = [file.rfilename for file in info.siblings or ()]
            is_full = any(name in names for name in ("model.safetensors", "model.safetensors.index.json"))
            is_remote = is_full and wanted == "headers"
            if not is_remote:
                patterns += (*SAFE_WEIGHTS, *TRAINED_WHOLE, *(() if is_full else BIN_WEIGHTS))
        folder = snapshot_download(
            source,
            revision=revision,
            cache_dir=hub.cache_dir,
            token=hub.token,
            local_files_only=is_offline,
            allow_patterns=patterns,
            ignore_patterns=[IN_FOLDERS],
        )
        return Path(folder), is_remote
    except HUB_ERRORS as error:
        answered = isinstance(error, HfHubHTTPError) or not isinstance(error, HTTPError)
        if not answered or isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            raise ConversionError(
                f"{flag}: {source!r} is not a local path, and the Hub cannot be reached. Check the name or the "
                "network."
            ) from error
        raise ConversionError(f"{flag}: {source!r} cannot be fetched from the Hub: {first_line(error)}.") from error


def read_remote_headers(location: InputLocation) -> "dict[str, StoredTensor]":
    """
    Read the headers of a repository's safetensors. Nothing else is downloaded.

    Args:
        location: The repository.

    Returns:
        The tensors by name.

    Raises:
        ConversionError: If the repository has no safetensors, or cannot be reached.
    """
    from fusion_hf.conversion.stored_tensors import SAFETENSORS_DTYPES, StoredTensor  # which import torch

    try:
        metadata = HfApi().get_safetensors_metadata(location.name, revision=location.revision)
    except HUB_ERRORS as error:
        raise ConversionError(
            f"The headers of the weights of {location.name} cannot be read: {first_line(error)}."
        ) from error
    return {
        key: StoredTensor(
            location.path / file, key, tuple(tensor.shape), SAFETENSORS_DTYPES.get(tensor.dtype, tensor.dtype)
        )
        for file, content in metadata.files_metadata.items()
        for key, tensor in content.tensors.items()
    }


def check_can_push(repository: str, private: bool = False) -> None:
    """
    Check that an upload can succeed, before hours of work.

    Args:
        repository: Name of the repository.
        private: Whether the repository must be private.

    Raises:
        ConversionError: If the name is invalid, nobody is logged in, or the Hub cannot be reached.
    """
    try:
        check_repository(repository, "--repo-id")
        check_remote(repository, private)
    except InputError as error:
        raise ConversionError(first_line(error)) from error


def push(folder: Path, repository: str | None, private: bool, message: str) -> str:
    """
    Upload a folder in one commit, if a repository is given.

    Args:
        folder: Folder to upload.
        repository: Name of the repository, or None.
        private: Whether to make a new repository private.
        message: Commit message.

    Returns:
        Text to append to the line about the folder: the URL of the commit, or an empty text.

    Raises:
        ConversionError: If the upload fails. The folder is kept.
    """
    if repository is None:
        return ""
    names = sorted(path.name for path in folder.iterdir())
    try:
        return f" Pushed: {upload(folder, names, repository, private, message)}"
    except InputError as error:
        raise ConversionError(
            f"The result in {folder} is complete, but pushing it to {repository} failed: {first_line(error)}."
        ) from error
