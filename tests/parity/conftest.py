"""The recorded checkpoints, converted as a user converts them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.helpers.devices import DEVICES

from fusion_hf import FusionForConditionalGeneration, FusionImageProcessor
from fusion_hf.cli.convert import main

FIXTURES = Path(__file__).parents[1] / "fixtures" / "parity"
MODELS = ("fusion-l", "llama-siglip2", "phi3-siglip")
IMAGE_MARK, LATENT_MARK, PROMPT_END_LABEL, IGNORE = -200, -300, -400, -100
GRIDS = {"fusion-l": 12}  # the recording used 12 x 12 image tokens


@dataclass(frozen=True)
class Recording:
    """One model's recordings and its converted folder."""

    name: str
    output: Path

    @property
    def folder(self) -> Path:
        return FIXTURES / self.name

    @property
    def meta(self) -> dict[str, Any]:
        return json.loads((self.folder / "meta.json").read_text())

    def tensors(self, case: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{case}.safetensors")

    def model(self, early_text_attention: str, device: str = "cpu") -> FusionForConditionalGeneration:
        model = FusionForConditionalGeneration.from_pretrained(
            self.output, dtype=torch.float32, early_text_attention=early_text_attention
        )
        return model.eval().to(device)

    def pixel_values(self, images: list[int]) -> torch.Tensor:
        """One image per sample; -1 is a text-only sample, which carries zeros."""
        processor = FusionImageProcessor.from_pretrained(self.output)
        opened = [Image.open(self.folder / f"image_{max(i, 0)}.png") for i in images]
        pixel_values = processor(opened, return_tensors="pt").pixel_values
        return pixel_values * torch.tensor([float(i >= 0) for i in images]).view(-1, 1, 1, 1, 1)

    def inputs(
        self,
        case: dict[str, Any],
        recorded: dict[str, torch.Tensor],
        model: FusionForConditionalGeneration,
        max_len: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """A recorded batch as the model takes it, cut off at `max_len` tokens."""
        return expand(recorded, model, case["query_len"], max_len) | {
            "pixel_values": self.pixel_values(case["images"]),
            "instruct_input_ids": recorded["instruct_ids"],
        }


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the model computes on; the recordings are of full float32, which cuDNN does not use by itself."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return request.param


@pytest.fixture(scope="session", params=MODELS)
def recording(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    folder = FIXTURES / request.param
    output = tmp_path_factory.mktemp(request.param) / "converted"
    arguments = ["--model", str(folder / "checkpoint"), "--output", str(output), "--tokenizer", "none"]
    arguments += ["--vision-config", str(folder / "vision_config.json")]
    if request.param in GRIDS:
        arguments += ["--image-token-grid", str(GRIDS[request.param])]
    assert main(arguments) == 0
    return Recording(request.param, output)


def expand(
    recorded: dict[str, torch.Tensor], model: FusionForConditionalGeneration, query_len: int, max_len: int | None
) -> dict[str, torch.Tensor]:
    """The authors' ids with marks to ours: the first mark is the image, later ones latent blocks; right-padded."""
    config = model.config
    ids = recorded["input_ids"].numpy()
    mask = recorded.get("attention_mask", torch.ones_like(recorded["input_ids"])).bool().numpy()
    labels = recorded["labels"].numpy() if "labels" in recorded else None
    rows = []
    for index in range(len(ids)):
        row_labels = labels[index][mask[index]] if labels is not None else np.full(mask[index].sum(), IGNORE)
        rows.append(_expand_row(ids[index][mask[index]], row_labels, config, query_len, max_len, labels is None))
    return {
        "input_ids": _pad([row[0] for row in rows], 0),
        "attention_mask": _pad([[1] * len(row[0]) for row in rows], 0),
        "labels": _pad([row[1] for row in rows], IGNORE),
        "prompt_end_positions": _pad([row[2] for row in rows], -1),
    }


def _expand_row(
    ids: np.ndarray, labels: np.ndarray, config: Any, query_len: int, max_len: int | None, prompt_only: bool
) -> tuple[list[int], list[int], list[int]]:
    out_ids: list[int] = []
    out_labels: list[int] = []
    ends: list[int] = []
    waiting_for_image = IMAGE_MARK in ids
    for token, label in zip(ids.tolist(), labels.tolist(), strict=True):
        repeats = [token]
        if token in (IMAGE_MARK, LATENT_MARK):
            image = [config.image_token_id] * config.num_image_tokens
            repeats = image if waiting_for_image else [config.latent_token_id] * query_len
            waiting_for_image = False
        if label == PROMPT_END_LABEL:
            ends.append(len(out_ids))
            label = IGNORE
        out_ids += repeats
        out_labels += [label] * len(repeats)
    out_ids, out_labels = out_ids[:max_len], out_labels[:max_len]
    ends = [len(out_ids) - 1] if prompt_only else [end for end in ends if end < len(out_ids)]
    return out_ids, out_labels, ends


def _pad(rows: list[list[int]], value: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])
