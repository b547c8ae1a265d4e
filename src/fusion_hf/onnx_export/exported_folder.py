"""Content of an exported folder: two graphs, the names of their inputs and outputs, and settings."""

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
    Settings of an exported model.

    Attributes:
        query_len, image_token_grid: Token counts that are fixed in the graphs.
        max_length: Maximum number of tokens of a prompt and its answer together.
        eos_token_ids: Ids that end an answer.
        suppressed_ids: Ids that are never generated.
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
        """Read the settings of an exported folder. Raise an `InputError` if it is not one."""
        try:
            return cls(**json.loads((folder / SETTINGS).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{folder} is not an exported folder: {error}") from error


def check_packages() -> None:
    """Raise an `InputError` that names the extra, if the packages for writing ONNX are not installed."""
    require(("onnx", "onnxscript"), "Export to ONNX", "onnx")


def cache_names(prefix: str, layers: int) -> list[str]:
    """Return the names of keys and values in the inputs and outputs of the language model's graph."""
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
