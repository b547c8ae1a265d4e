"""What a conversion or an assembly reads and writes, checked as far as it can be without torch."""

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
# as `DECODER_LAYERS` has them, which imports torch
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


@dataclass(frozen=True)
class ConversionOptions:
    """
    What the command line of `convert` says; see its help. `dtype` is one of `DTYPE_NAMES`.

    Attributes:
        hub: how the Hub is asked for the checkpoint.
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
    """What the command line of `build` says; see its help. `dtype` is one of `DTYPE_NAMES`."""

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
    """Folders that a conversion reads, the content of the checkpoint's `config.json`, and where the tokenizer is."""

    checkpoint: InputLocation
    upstream: dict[str, Any]
    base: InputLocation | None
    vision: InputLocation | None
    tokenizer: InputLocation | None


@dataclass(frozen=True)
class BuildInputs:
    """Folders that an assembly reads, the language model's `config.json`, and where the tokenizer is."""

    text: InputLocation
    values: dict[str, Any]
    vision: InputLocation
    tokenizer: InputLocation | None


def find_conversion_inputs(options: ConversionOptions, flag: str = "--model") -> ConversionInputs:
    """
    Fetch what is on the Hub, and see that everything is there and can be put where it is to go.

    Args:
        options: What to convert.
        flag: The option that names the checkpoint, for errors.

    Raises:
        ConversionError, InputError: for the first thing that does not fit.
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
    The same for an assembly.

    Raises:
        ConversionError, InputError: for the first thing that does not fit.
    """
    _check_result(options)
    text, vision = locate(options.text, "--text"), locate(options.vision, "--vision")
    values = read_json(text.path / "config.json")
    if values.get("model_type") not in DECODER_TYPES:
        shown, allowed = short_name(repr(values.get("model_type"))), ", ".join(DECODER_TYPES)
        raise ConversionError(f"--text: {text.name} is a {shown} model; FUSION supports: {allowed}.")
    for location in (text, vision):
        check_weights(location)
    return BuildInputs(text, values, vision, find_tokenizer(options.tokenizer, text))


def locate(source: str, flag: str, wanted: Wanted = "all", hub: HubOptions = DEFAULT_HUB) -> InputLocation:
    """Locate a local path, or a repository that is downloaded into the cache.

    Args:
        source: what the user gave; a repository may have a revision behind `@`.
        flag: the option that it was given with, for errors.
        wanted: what to download of a repository. `"headers"` leaves safetensors where they are; `"configuration"`
            fetches no weights at all.
        hub: how the Hub is asked.

    Raises:
        ConversionError: if it is neither, or the download fails.
    """
    path = Path(source).expanduser()
    try:
        if path.exists():
            path = path.resolve()
            return InputLocation(path, path.name, local_revision(path))
    except (OSError, ValueError):  # longer than a name can be, or with a null character
        pass
    repository, revision = split_revision(source)
    if not REPOSITORY.fullmatch(repository):
        shown = short_name(repr(source))
        raise ConversionError(f"{flag}: {shown} is neither an existing path nor the name of a Hub repository.")
    from fusion_hf.conversion.repositories import download  # its client takes longer to import than all of this

    path, is_remote = download(repository, revision, flag, wanted, hub)
    return InputLocation(path, repository, local_revision(path), is_remote)


def find_named_tower(upstream: dict[str, Any]) -> InputLocation | None:
    """The folder of the tower that the checkpoint names, if it is on this disk.

    Raises:
        ConversionError: if the name is a CLIP tower's.
    """
    name = upstream.get(TOWER_FIELD)
    if not isinstance(name, str):
        return None  # `named_tower` says what is wrong with it
    path = Path(name)
    try:
        if (path / "config.json").is_file():
            path = path.resolve()
            return InputLocation(path, path.name, local_revision(path))
    except (OSError, ValueError):  # longer than a name can be, or with a null character
        pass
    if CLIP.search(name) and "siglip" not in name.lower():
        raise ConversionError(
            f"config.json: {TOWER_FIELD} is {name!r}, a CLIP tower; allowed: the name or the folder of a SigLIP tower."
        )
    return None


def local_revision(path: Path) -> str | None:
    """Return the commit that a folder was downloaded at, from the traces that huggingface_hub leaves."""
    if path.parent.name == "snapshots" and REVISION.fullmatch(path.name):
        return path.name
    trace = path / ".cache" / "huggingface" / "download" / "config.json.metadata"
    if trace.is_file():
        lines = trace.read_text(encoding="utf-8", errors="replace").splitlines()
        if lines and REVISION.fullmatch(lines[0]):
            return lines[0]
    return None


def describe(location: InputLocation) -> str:
    """Tell name and revision; for a local folder of unknown revision, a fingerprint of its configuration."""
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
            check_can_push,  # its client takes longer to import than all of this
        )

        check_can_push(options.repo_id, options.private)


def check_upstream(upstream: dict[str, Any]) -> None:
    """Raise a `ConversionError` for missing fields and impossible values of the authors' `config.json`."""
    model_type = upstream.get("model_type")
    if model_type not in TEXT_MODEL_TYPES:
        allowed = ", ".join(map(repr, TEXT_MODEL_TYPES))
        raise ConversionError(f"config.json: model_type is {model_type!r}; allowed: {allowed}.")
    projector = upstream.get(PROJECTOR_FIELD, PROJECTOR_TYPE)
    if projector != PROJECTOR_TYPE:
        raise ConversionError(f"config.json: {PROJECTOR_FIELD} is {projector!r}; allowed: {PROJECTOR_TYPE!r}.")
    missing = [name for name in FUSION_FIELDS if name not in upstream]
    if missing:
        raise ConversionError(f"config.json lacks {', '.join(missing)}: it is no FUSION checkpoint's.")
    counts = {name: upstream[name] for name in FUSION_FIELDS[1:]}
    wrong = [f"{name} is {value!r}" for name, value in counts.items() if type(value) is not int]
    if wrong:
        raise ConversionError(f"config.json: {', '.join(wrong)}; allowed: whole numbers.")


def is_adapter(checkpoint: InputLocation) -> bool:
    """Return whether a checkpoint is a LoRA or adapter-only run, without the weights that it was trained on."""
    folder = checkpoint.path
    parts = any((folder / name).is_file() for name in (ADAPTER_CONFIG, PROJECTOR))
    return parts and not checkpoint.is_remote and not find_weight_files(folder)


def check_layout(checkpoint: InputLocation, base: InputLocation | None, text_type: str) -> None:
    """Raise a `ConversionError` if the checkpoint needs a `--base` that is not there, another one, or none."""
    if not is_adapter(checkpoint):
        if base is not None:
            reason = f"{checkpoint.name} is a full checkpoint"
            raise ConversionError(f"--base is for LoRA and adapter-only runs, but {reason}.")
        check_weights(checkpoint)
        return
    if base is None:
        kind = "a LoRA run" if (checkpoint.path / ADAPTER_CONFIG).is_file() else "an adapter-only run"
        needed = "`fusion-hf convert` needs the model that it was trained on, as --base"
        raise ConversionError(f"{checkpoint.name} is {kind}: {needed}.")
    base_type = read_json(base.path / "config.json").get("model_type")
    if TEXT_MODEL_TYPES.get(str(base_type), base_type) != text_type:
        raise ConversionError(f"--base: {base.name} is a {base_type!r} model; the checkpoint needs {text_type!r}.")
    check_weights(base)


def check_weights(location: InputLocation) -> None:
    """Raise a `ConversionError` if a folder has no weights."""
    if not location.is_remote and not (location.path.is_dir() and find_weight_files(location.path)):
        zero = sorted(path.name for path in location.path.glob(ZERO_FOLDERS) if path.is_dir())
        if zero:
            raise ConversionError(
                f"{location.name} has no weights but the state of DeepSpeed's ZeRO in {', '.join(zero)}. Where "
                f"DeepSpeed is installed, make one file of it: python {ZERO_SCRIPT} . pytorch_model.bin (in that "
                f"folder; since DeepSpeed 0.16 python {ZERO_SCRIPT} . . --safe_serialization), then convert again."
            )
        raise ConversionError(
            f"{location.name} has no weights; allowed: model.safetensors or pytorch_model.bin, in one file or in "
            "shards with their index."
        )


def find_tokenizer(wanted: str | None, *locations: InputLocation | None) -> InputLocation | None:
    """
    Where the tokenizer asked for is, or the first that a location has; None: there is none.

    Args:
        wanted: a folder, a repository, `"none"`, or nothing.
        locations: where to look if nothing is wanted.

    Raises:
        ConversionError: if what is wanted has no tokenizer.
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
    """Return whether a folder has a tokenizer's files."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)
