"""Inputs and outputs of a conversion or an assembly, checked as far as possible without torch."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fusion_hf.common.errors import short_name
from fusion_hf.common.outputs import check_output
from fusion_hf.conversion.model_files import ConversionError, find_weight_files, read_json
from fusion_hf.hub.folders import DEFAULT_HUB, REPOSITORY, HubOptions, split_revision

Wanted = Literal["all", "headers", "configuration"]
REVISION = re.compile(r"[0-9a-f]{40}")
FINGERPRINT_DIGITS = 16
TEXT_MODEL_TYPES = {"fusion_phi": "phi3", "fusion_llama": "llama", "fusion_qwen": "qwen2", "fusion_mistral": "mistral"}
PROJECTOR_TYPE = "mlp2x_gelu"
TOWER_FIELD, PROJECTOR_FIELD = "mm_vision_tower", "mm_projector_type"
CLIP = re.compile(r"clip|^(?:openai|laion)/", re.IGNORECASE)
# same keys as `DECODER_LAYERS`, whose module imports torch
DECODER_TYPES = ("llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
FUSION_FIELDS = (
    "query_len",
    "window_size",
    "num_of_vision_sampler_layers",
    "start_of_vision_sampler_layers",
    "stride_of_vision_sampler_layers",
)
ADAPTER_CONFIG, PROJECTOR = "adapter_config.json", "mm_projector.bin"
NO_TOKENIZER = "none"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
MAX_SHARD_BYTES = 5 * 10**9
ZERO_FOLDERS, ZERO_SCRIPT = "global_step*", "zero_to_fp32.py"


@dataclass(frozen=True)
class InputLocation:
    """
    A folder or file on disk.

    Attributes:
        path: Path of the folder or file.
        name: Name of the repository, or the folder's own name. Never the full path, because it goes into the model
            card.
        revision: Commit of the repository, if it is known.
        is_remote: Whether the weights are in a repository and only their headers are read.
    """

    path: Path
    name: str
    revision: str | None
    is_remote: bool = False


@dataclass(frozen=True)
class ConversionOptions:
    """
    Options of the command `convert`, see its help. `dtype` is one of `DTYPE_NAMES`.

    Attributes:
        hub: Options for requests to the Hub.
    """

    checkpoint: str
    output: Path | None
    vision_config: str | None = None
    tokenizer: str | None = None
    base: str | None = None
    dtype: str | None = None
    image_token_grid: int | None = None
    repo_id: str | None = None
    private: bool = False
    dry_run: bool = False
    max_shard_bytes: int = MAX_SHARD_BYTES
    hub: HubOptions = DEFAULT_HUB


@dataclass(frozen=True)
class BuildOptions:
    """Options of the command `build`, see its help. `dtype` is one of `DTYPE_NAMES`."""

    text: str
    vision: str
    output: Path | None
    tokenizer: str | None = None
    query_lens: tuple[int, ...] = (4, 16, 36, 64, 144)
    window_size: int = 3
    num_samplers: int = 10
    start: int = 0
    stride: int = 3
    seed: int = 0
    dtype: str | None = None
    repo_id: str | None = None
    private: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class ConversionInputs:
    """Folders that a conversion reads, the content of the checkpoint's `config.json`, and the tokenizer's folder."""

    checkpoint: InputLocation
    upstream: dict[str, Any]
    base: InputLocation | None
    vision: InputLocation | None
    tokenizer: InputLocation | None


@dataclass(frozen=True)
class BuildInputs:
    """Folders that an assembly reads, the language model's `config.json`, and the tokenizer's folder."""

    text: InputLocation
    values: dict[str, Any]
    vision: InputLocation
    tokenizer: InputLocation | None


def find_conversion_inputs(options: ConversionOptions, flag: str = "--model") -> ConversionInputs:
    """
    Fetch the inputs of a conversion from the Hub, and check that they are complete and the result can be written.

    Args:
        options: What to convert.
        flag: The option that names the checkpoint, for errors.

    Raises:
        ConversionError, InputError: If something does not fit.
    """
    _check_result(options)
    wanted: Wanted = "headers" if options.dry_run else "all"
    checkpoint = locate(options.checkpoint, flag, wanted, options.hub)
    upstream = read_json(checkpoint.path / "config.json")
    check_upstream(upstream)
    base = None if options.base is None else locate(options.base, "--base", wanted)
    if options.vision_config is None:
        vision = find_named_tower(upstream)
    else:
        vision = locate(options.vision_config, "--vision-config", "configuration" if base is None else "all")
    check_layout(checkpoint, base, TEXT_MODEL_TYPES[upstream["model_type"]])
    tokenizer = find_tokenizer(options.tokenizer, checkpoint, base)
    return ConversionInputs(checkpoint, upstream, base, vision, tokenizer)


def find_build_inputs(options: BuildOptions) -> BuildInputs:
    """
    Fetch the inputs of an assembly from the Hub, and check that they are complete and the result can be written.

    Args:
        options: What to build.

    Returns:
        The inputs.

    Raises:
        ConversionError, InputError: If something does not fit.
    """
    _check_result(options)
    text, vision = locate(options.text, "--text"), locate(options.vision, "--vision")
    values = read_json(text.path / "config.json")
    if values.get("model_type") not in DECODER_TYPES:
        shown, allowed = short_name(repr(values.get("model_type"))), ", ".join(DECODER_TYPES)
        raise ConversionError(f"--text: the model type of {text.name} must be one of {allowed}, got {shown}.")
    for location in (text, vision):
        check_weights(location)
    return BuildInputs(text, values, vision, find_tokenizer(options.tokenizer, text))


def locate(source: str, flag: str, wanted: Wanted = "all", hub: HubOptions = DEFAULT_HUB) -> InputLocation:
    """
    Find a local path, or download a repository into the cache.

    Args:
        source: Path or repository that the user passed. A repository may have a revision behind `@`.
        flag: Option that was used, for errors.
        wanted: Files of a repository to download. `"headers"` does not download safetensors, `"configuration"`
            downloads no weights.
        hub: Options for requests to the Hub.

    Returns:
        The location of the files.

    Raises:
        ConversionError: If `source` is neither a path nor a repository, or if the download fails.
    """
    path = Path(source).expanduser()
    try:
        if path.exists():
            path = path.resolve()
            return InputLocation(path, path.name, local_revision(path))
    except (OSError, ValueError):  # the name is too long or contains a null character
        pass
    repository, revision = split_revision(source)
    if not REPOSITORY.fullmatch(repository):
        shown = short_name(repr(source))
        raise ConversionError(f"{flag} must be an existing path or the name of a Hub repository, got {shown}.")
    from fusion_hf.conversion.repositories import download  # its client takes longer to import than all of this file

    path, is_remote = download(repository, revision, flag, wanted, hub)
    return InputLocation(path, repository, local_revision(path), is_remote)


def find_named_tower(upstream: dict[str, Any]) -> InputLocation | None:
    """
    Find the folder of the tower that a checkpoint names, if it is on this disk.

    Args:
        upstream: Content of the checkpoint's `config.json`.

    Raises:
        ConversionError: If the name is that of a CLIP tower.
    """
    name = upstream.get(TOWER_FIELD)
    if not isinstance(name, str):
        return None  # `named_tower` reports the problem
    path = Path(name)
    try:
        if (path / "config.json").is_file():
            path = path.resolve()
            return InputLocation(path, path.name, local_revision(path))
    except (OSError, ValueError):  # the name is too long or contains a null character
        pass
    if CLIP.search(name) and "siglip" not in name.lower():
        raise ConversionError(
            f"config.json: `{TOWER_FIELD}` must be the name or the folder of a SigLIP tower, got the CLIP tower "
            f"{name!r}."
        )
    return None


def local_revision(path: Path) -> str | None:
    """Return the commit at which a folder was downloaded, from the files that huggingface_hub leaves, or None."""
    if path.parent.name == "snapshots" and REVISION.fullmatch(path.name):
        return path.name
    trace = path / ".cache" / "huggingface" / "download" / "config.json.metadata"
    if trace.is_file():
        lines = trace.read_text(encoding="utf-8", errors="replace").splitlines()
        if lines and REVISION.fullmatch(lines[0]):
            return lines[0]
    return None


def describe(location: InputLocation) -> str:
    """Describe a location by name and revision, or by a digest of its configuration if the revision is unknown."""
    if location.revision is not None:
        return f"`{location.name}`, revision `{location.revision}`"
    file = location.path / "config.json" if location.path.is_dir() else location.path
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:FINGERPRINT_DIGITS]
    return f"`{location.name}`, local, revision unknown (SHA-256 of `{file.name}` begins with `{digest}`)"


def _check_result(options: ConversionOptions | BuildOptions) -> None:
    if options.output is not None:
        check_output(options.output)
    if options.repo_id is not None:
        from fusion_hf.conversion.repositories import (
            check_can_push,  # its client takes longer to import than all of this file
        )

        check_can_push(options.repo_id, options.private)


def check_upstream(upstream: dict[str, Any]) -> None:
    """
    Check the content of the authors' `config.json`.

    Args:
        upstream: The content.

    Raises:
        ConversionError: If a field is missing or has an impossible value.
    """
    model_type = upstream.get("model_type")
    if model_type not in TEXT_MODEL_TYPES:
        allowed = ", ".join(map(repr, TEXT_MODEL_TYPES))
        raise ConversionError(f"config.json: `model_type` must be one of {allowed}, got {model_type!r}.")
    projector = upstream.get(PROJECTOR_FIELD, PROJECTOR_TYPE)
    if projector != PROJECTOR_TYPE:
        raise ConversionError(f"config.json: `{PROJECTOR_FIELD}` must be {PROJECTOR_TYPE!r}, got {projector!r}.")
    missing = [name for name in FUSION_FIELDS if name not in upstream]
    if missing:
        raise ConversionError(f"config.json lacks {', '.join(missing)}, so it does not belong to a FUSION checkpoint.")
    counts = {name: upstream[name] for name in FUSION_FIELDS[1:]}
    wrong = [f"`{name}` = {value!r}" for name, value in counts.items() if type(value) is not int]
    if wrong:
        raise ConversionError(
            f"config.json: the values of FUSION's fields must be whole numbers, got {', '.join(wrong)}."
        )


def is_adapter(checkpoint: InputLocation) -> bool:
    """Return whether a checkpoint is a LoRA or adapter-only run, without the weights of its base model."""
    folder = checkpoint.path
    parts = any((folder / name).is_file() for name in (ADAPTER_CONFIG, PROJECTOR))
    return parts and not checkpoint.is_remote and not find_weight_files(folder)


def check_layout(checkpoint: InputLocation, base: InputLocation | None, text_type: str) -> None:
    """
    Check that a checkpoint is complete, with a base model if and only if it needs one.

    Args:
        checkpoint: The checkpoint.
        base: Model that a LoRA or adapter-only run was trained on.
        text_type: Model type of the checkpoint's language model.

    Raises:
        ConversionError: If the base model is missing, wrong, or not needed.
    """
    if not is_adapter(checkpoint):
        if base is not None:
            reason = f"{checkpoint.name} is a full checkpoint"
            raise ConversionError(f"--base is only for LoRA and adapter-only runs, but {reason}.")
        check_weights(checkpoint)
        return
    if base is None:
        kind = "a LoRA run" if (checkpoint.path / ADAPTER_CONFIG).is_file() else "an adapter-only run"
        needed = "`fusion-hf convert` needs the model that it was trained on as --base"
        raise ConversionError(f"{checkpoint.name} is {kind}, so {needed}.")
    base_type = read_json(base.path / "config.json").get("model_type")
    if TEXT_MODEL_TYPES.get(str(base_type), base_type) != text_type:
        raise ConversionError(f"--base: the model type of {base.name} must be {text_type!r}, got {base_type!r}.")
    check_weights(base)


def check_weights(location: InputLocation) -> None:
    """Raise a `ConversionError` if a folder has no weights."""
    if not location.is_remote and not (location.path.is_dir() and find_weight_files(location.path)):
        zero = sorted(path.name for path in location.path.glob(ZERO_FOLDERS) if path.is_dir())
        if zero:
            raise ConversionError(
                f"{location.name} has no weights, only the state of DeepSpeed's ZeRO in {', '.join(zero)}. To merge "
                f"it into one file, run `python {ZERO_SCRIPT} . pytorch_model.bin` in that folder, with DeepSpeed "
                f"installed (since DeepSpeed 0.16: `python {ZERO_SCRIPT} . . --safe_serialization`). Then convert "
                "again."
            )
        raise ConversionError(
            f"{location.name} must have weights in model.safetensors or pytorch_model.bin, in one file or in shards "
            "with an index, but it has none."
        )


def find_tokenizer(wanted: str | None, *locations: InputLocation | None) -> InputLocation | None:
    """
    Find the requested tokenizer, or the first tokenizer in a list of locations.

    Args:
        wanted: A folder, a repository, or `"none"`. None looks into `locations`.
        locations: Where to look if no tokenizer is requested.

    Returns:
        The folder of the tokenizer, or None if there is none.

    Raises:
        ConversionError: If `wanted` has no tokenizer.
    """
    if wanted is None:
        return next((location for location in locations if location and has_tokenizer(location.path)), None)
    if wanted == NO_TOKENIZER:
        return None
    found = locate(wanted, "--tokenizer", "configuration")
    if not has_tokenizer(found.path):
        raise ConversionError(f"--tokenizer: {found.name} has no tokenizer files.")
    return found


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder contains the files of a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)
