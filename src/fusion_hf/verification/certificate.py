"""`fusion-hf verify`: comparison of a converted folder with the authors' code, written to `parity.json`."""

import hashlib
import math
import platform
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from fusion_hf import __version__
from fusion_hf.common.errors import InputError
from fusion_hf.common.outputs import check_space, json_bytes, write_atomically
from fusion_hf.common.user_values import dtype_name
from fusion_hf.conversion.from_authors import UPSTREAM_TOWER, Conversion, prepare
from fusion_hf.conversion.inputs import (
    REVISION,
    ConversionInputs,
    ConversionOptions,
    describe,
)
from fusion_hf.conversion.stored_tensors import read_folder
from fusion_hf.evaluation.stage_comparison import FEATURES, StageComparison
from fusion_hf.hub.parity import PARITY
from fusion_hf.inference.chat_model import ChatModel
from fusion_hf.inference.devices import choose_device
from fusion_hf.inference.loading import load_config
from fusion_hf.model.configuration_fusion import FusionConfig
from fusion_hf.verification.authors_process import AuthorsEnvironment, check_packages, run_worker
from fusion_hf.verification.questions import VerificationQuestion
from fusion_hf.verification.stages import TOLERANCES, AuthorsMarks, QuestionComparison, compare_question, record
from fusion_hf.verification.weights import WeightsComparison, compare_weights

NUM_TOKENS = 16
LONGEST_TEXT = 512  # tokens of a prompt besides the image's, to estimate the disk space
SPARE = 1.2
NAMED = 20  # maximum number of different weights that the file names
WEIGHTS = "weights"
REFERENCE = "ref: "
# prefixes of the names of features, and their names in the table
KINDS = {
    "tower.overview": "tower, overview and question",
    "tower.tiles": "tower, tiles",
    "projector": "projectors",
    "context": "samplers and their windows",
    "samplers": "samplers and their windows",
    "text": "language model",
}


@dataclass(frozen=True)
class VerificationOptions:
    """Options of the command `verify`, see its help."""

    folder: Path
    checkpoint: str
    vision_config: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    tolerance: float | None = None
    timeout: int = 3600


@dataclass(frozen=True)
class Certificate:
    """
    Result of a comparison.

    Attributes:
        weights: Comparison of all weights with the checkpoint.
        questions: Comparisons of all stages of each question.
        content: Content of `parity.json`.
    """

    weights: WeightsComparison
    questions: list[QuestionComparison]
    content: dict[str, Any]

    @property
    def is_equal(self) -> bool:
        """Whether no difference exceeds its tolerance."""
        return bool(self.content["equal"])


def verify(
    options: VerificationOptions,
    environment: AuthorsEnvironment,
    inputs: ConversionInputs,
    questions: Sequence[VerificationQuestion],
) -> Certificate:
    """
    Compare a converted folder with the authors' code, and write `parity.json` into the folder.

    The authors' process ends before this package's model is loaded, so that only one of them is in memory.

    Args:
        options: What to compare.
        environment: Environment of the authors' code, which is executed.
        inputs: Inputs of the conversion.
        questions: Questions for both models.

    Returns:
        The certificate.

    Raises:
        InputError: If the two cannot be compared.
    """
    config = _read_config(options.folder)
    options = replace(options, device=str(choose_device(options.device)))
    check_packages(environment)
    conversion = prepare(ConversionOptions(options.checkpoint, None, options.vision_config), inputs)
    if config.query_len not in conversion.config.query_lens:
        known = ", ".join(map(str, conversion.config.query_lens))
        raise InputError(
            f"{options.folder} was not converted from {options.checkpoint}: its `query_len` must be one of {known}, "
            f"got {config.query_len}."
        )
    weights = compare_weights(conversion, options.folder, _stored_dtype(config))
    tolerance = TOLERANCES[options.dtype] if options.tolerance is None else options.tolerance
    with tempfile.TemporaryDirectory(prefix="fusion-verify-") as name:
        folder = Path(name)
        check_space(folder, estimate_bytes(config, options.dtype) * len(questions))
        job = _make_job(options, config, inputs, questions, folder)
        report = run_worker(environment, job, folder, options.timeout)
        chat_model = ChatModel.load(str(options.folder), options.device, options.dtype)
        marks = AuthorsMarks(report["image_mark"], report["latent_mark"])
        compared = []
        for number, question in enumerate(questions):
            ours, theirs = record(chat_model, question, NUM_TOKENS), folder / f"question_{number}.safetensors"
            compared.append(compare_question(ours, theirs, config, marks, tolerance))
            theirs.unlink()
    content = _content(options, environment, questions, weights, compared, report, conversion, config)
    write_atomically(options.folder / PARITY, json_bytes(content, indent=1))
    return Certificate(weights, compared, content)


def _read_config(folder: Path) -> FusionConfig:
    """Read the configuration of a folder, and check that the folder can be compared."""
    config = load_config(folder)
    if "quantization_config" in vars(config):
        raise InputError(f"{folder} is quantized. Verify the folder from which it was made.")
    if config.image_token_grid is not None:
        raise InputError(
            f"{folder} is a FUSION-L model, which the authors' code does not support. Verify the folder that the same "
            "checkpoint gives without --image-token-grid, because its weights are the same."
        )
    return config


def _stored_dtype(config: FusionConfig) -> torch.dtype:
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def estimate_bytes(config: FusionConfig, dtype: str) -> int:
    """Estimate the size in bytes of the worker's file for one question, rounded up."""
    vision, text = config.vision_config, config.text_config
    patches, tiles = config.num_patches_per_side**2, 5
    tower = (tiles * patches + LONGEST_TEXT) * ((vision.num_hidden_layers + 1) * vision.hidden_size + text.hidden_size)
    length = patches + config.query_len + LONGEST_TEXT
    language = length * (text.num_hidden_layers + 2) * text.hidden_size
    pixels = tiles * vision.num_channels * vision.image_size**2
    logits = NUM_TOKENS * text.vocab_size
    size = torch.finfo(getattr(torch, dtype)).bits // 8
    return int(SPARE * ((tower + language + pixels) * size + logits * torch.finfo(torch.float32).bits // 8))


def _make_job(
    options: VerificationOptions,
    config: FusionConfig,
    inputs: ConversionInputs,
    questions: Sequence[VerificationQuestion],
    folder: Path,
) -> dict[str, Any]:
    """Create the job of the worker. Images are written as decoded here, so that both sides read the same pixels."""
    asked = []
    for number, question in enumerate(questions):
        path = folder / f"image_{number}.png"
        question.image.save(path)
        asked.append({"image": str(path), "text": question.text})
    has_tower = any(key.startswith(UPSTREAM_TOWER) for key in read_folder(inputs.checkpoint.path))
    return {
        "checkpoint": str(inputs.checkpoint.path),
        "model_type": inputs.upstream["model_type"],
        "tower": str(_make_tower(inputs, has_tower, folder)),
        "has_tower": has_tower,
        "query_len": config.query_len,
        "weights_dtype": dtype_name(_stored_dtype(config)),
        "dtype": options.dtype,
        "device": options.device,
        "threads": torch.get_num_threads() if options.device == "cpu" else 0,
        "num_tokens": NUM_TOKENS,
        "questions": asked,
    }


def _make_tower(inputs: ConversionInputs, has_tower: bool, folder: Path) -> Path:
    """
    Create a folder that the authors' code accepts as the tower, with weights only if the checkpoint has none.

    Their classes depend on its name, and would fetch the named tower from the Hub to overwrite it later.
    """
    name = str(inputs.upstream.get("mm_vision_tower")).lower()
    tower = folder / ("siglip2-tower" if "siglip2" in name else "siglip-tower")
    sizes, vision = b"{}", inputs.vision  # without sizes, their classes use those of the published towers
    if vision is not None and not has_tower:
        tower.symlink_to(vision.path, target_is_directory=True)
        return tower
    if vision is not None:
        sizes = (vision.path / "config.json" if vision.path.is_dir() else vision.path).read_bytes()
    tower.mkdir()
    (tower / "config.json").write_bytes(sizes)
    save_file({}, tower / "model.safetensors", metadata={"format": "pt"})
    return tower


def _content(
    options: VerificationOptions,
    environment: AuthorsEnvironment,
    questions: Sequence[VerificationQuestion],
    weights: WeightsComparison,
    compared: list[QuestionComparison],
    report: dict[str, Any],
    conversion: Conversion,
    config: FusionConfig,
) -> dict[str, Any]:
    first = next(_differences(weights, compared), None)
    return {
        "equal": first is None,
        "first_difference": first,
        "dtype": options.dtype,
        "device": options.device,
        "query_len": config.query_len,
        "num_tokens": NUM_TOKENS,
        "checkpoint": describe(conversion.locations["checkpoint"]),
        "weights": {**asdict(weights), "different": weights.different[:NAMED]},
        "stages": _summarise(compared),
        "features": _features(compared),
        "questions": [_describe_question(*pair) for pair in zip(questions, compared, strict=True)],
        "authors": {
            "model_class": report["model_class"],
            "versions": report["versions"],
            "commit": read_commit(environment.code),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "fusion_hf": __version__,
        },
    }


def _differences(weights: WeightsComparison, compared: list[QuestionComparison]) -> Iterator[dict[str, Any]]:
    """Yield the differences of each question in the order of computation, and finally those of the weights."""
    for number, question in enumerate(compared):
        for stage in question.stages:
            if stage.differs:
                yield {"stage": stage.stage, "part": stage.part, "question": number, "detail": stage.detail}
    if weights.different:
        shown = f"{len(weights.different)} of {weights.compared} tensors differ"
        yield {"stage": WEIGHTS, "part": weights.different[0], "question": None, "detail": shown}


def _summarise(compared: list[QuestionComparison]) -> list[dict[str, Any]]:
    """Return the rows of a table with the largest figures of each kind over all questions."""
    rows: dict[str, list[StageComparison]] = {}
    for question in compared:
        for stage in question.stages:
            if stage.relative is not None:
                rows.setdefault(_kind(stage), []).append(stage)
    return [
        {"name": name, "parts": len({stage.part for stage in stages}), **_figures(stages)}
        for name, stages in rows.items()
    ]


def _kind(stage: StageComparison) -> str:
    if stage.stage != FEATURES or stage.part is None:
        return stage.stage
    return next(title for beginning, title in KINDS.items() if stage.part.startswith(beginning))


def _features(compared: list[QuestionComparison]) -> dict[str, dict[str, float | None]]:
    """Return the largest figures of each layer over all questions."""
    layers: dict[str, list[StageComparison]] = {}
    for question in compared:
        for stage in question.stages:
            if stage.stage == FEATURES and stage.part is not None:
                layers.setdefault(stage.part, []).append(stage)
    return {name: _figures(stages) for name, stages in layers.items()}


def _figures(stages: Sequence[StageComparison]) -> dict[str, float | None]:
    """Return the largest figures. A figure is None if shapes differ or if it is not finite."""
    relative = [math.inf if stage.relative is None else stage.relative for stage in stages]
    largest = [math.inf if stage.largest is None else stage.largest for stage in stages]
    figures = {"relative": max(relative), "largest": max(largest), "tolerance": stages[0].tolerance}
    return {name: number if math.isfinite(number) else None for name, number in figures.items()}


def _describe_question(question: VerificationQuestion, compared: QuestionComparison) -> dict[str, Any]:
    image = question.image
    return {
        "question": question.text,
        "image_size": list(image.size),
        "image_sha256": hashlib.sha256(image.tobytes()).hexdigest(),
        "tokens": compared.tokens,
        "authors_tokens": compared.authors_tokens,
    }


def read_commit(code: Path) -> str | None:
    """Read the commit of a checkout from git's files. Return None if it is not a checkout or its files are packed."""
    try:
        head = (code / ".git" / "HEAD").read_text(encoding="ascii").strip()
        if head.startswith(REFERENCE):
            name = PurePosixPath(head.removeprefix(REFERENCE))
            head = "" if ".." in name.parts else (code / ".git" / name).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return head if REVISION.fullmatch(head) else None
