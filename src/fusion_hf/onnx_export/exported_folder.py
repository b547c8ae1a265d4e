"""What an exported folder holds: two graphs, the names of their inputs and outputs, and settings."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fusion_hf.common.errors import InputError
from fusion_hf.common.extras import require

IMAGE_GRAPH, LANGUAGE, SETTINGS = "picture.onnx", "language.onnx", "export.json"
IMAGE_INPUTS = ("pixel_values", "instruct_input_ids", "instruct_attention_mask")
IMAGE_OUTPUTS = ("image_features", "latents", "windows")
LANGUAGE_INPUTS = ("input_ids", "attention_mask", *IMAGE_OUTPUTS, "prompt_end_positions")
LOGITS, PAST, PRESENT = "logits", "past", "present"


@dataclass(frozen=True)
class ExportSettings:
    """
    query_len, image_token_grid: those of the graphs.
    max_length: tokens of prompt and answer together.
    eos_token_ids: end an answer.
    suppressed_ids: are never written.
    """

    query_len: int
    image_token_grid: int
    max_length: int
    eos_token_ids: list[int]
    suppressed_ids: list[int]

    def write(self, folder: Path) -> None:
        (folder / SETTINGS).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "ExportSettings":
        """Read the settings of an exported folder, or raise an `InputError` if it is none."""
        try:
            return cls(**json.loads((folder / SETTINGS).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{folder} is no exported folder: {error}") from error


def check_packages() -> None:
    """Raise an `InputError` that names the extra if what writes ONNX is not installed."""
    require(("onnx", "onnxscript"), "Export to ONNX", "onnx")


def cache_names(prefix: str, layers: int) -> list[str]:
    """Of keys and values, as the language model's graph takes and returns them."""
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
