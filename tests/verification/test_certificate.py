"""A converted folder is equal to what it was converted from; one that was altered differs where it was altered."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.verification.conftest import NUM_QUESTIONS, STAND_IN, Converted

from fusion_hf.cli import main
from fusion_hf.common.errors import InputError
from fusion_hf.hub.parity import PARITY
from fusion_hf.verification.certificate import Certificate
from fusion_hf.verification.stages import TOLERANCES

Certify = Callable[..., Certificate]
NEAREST = 0  # PIL's number
UNUSED = 17  # a token that is in no question


def alter(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights[name] = change(weights[name]).contiguous()
    save_file(weights, file, metadata={"format": "pt"})


def first(certificate: Certificate) -> tuple[str, str | None]:
    assert not certificate.is_equal
    difference = certificate.content["first_difference"]
    return difference["stage"], difference["part"]


def test_converted_folder(certify: Certify, copy: Path):
    certificate = certify(copy)
    assert certificate.is_equal and certificate.content["first_difference"] is None
    content = json.loads((copy / PARITY).read_text())
    assert content == json.loads(json.dumps(certificate.content))
    assert content["weights"]["compared"] > 0 and content["weights"]["different"] == []
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in content["weights"]["folder"].values())
    assert content["dtype"] == "float32" and content["query_len"] == 36
    names = [row["name"] for row in content["stages"]]
    assert names[0] == "pixels" and names[-1] == "logits" and "language model" in names
    for row in (*content["stages"], *content["features"].values()):
        assert row["relative"] <= row["tolerance"]
    # four kept layers of the tower and their input, for overview and tiles; two samplers; what is between them
    assert sum(name.startswith("tower.") for name in content["features"]) == 2 * 5
    assert [name for name in content["features"] if name.startswith("samplers")] == ["samplers.1", "samplers.3"]
    assert len(content["questions"]) == NUM_QUESTIONS
    for question in content["questions"]:
        assert len(question["tokens"]) == 16 and question["tokens"] == question["authors_tokens"]
    assert set(content["authors"]["versions"]) == {"python", "torch", "transformers"}


@pytest.mark.parametrize(
    ("name", "stage", "part"),
    [
        ("model.vision_tower.layers.2.mlp.fc2.bias", "features", "tower.overview.layers.2"),
        ("model.vision_projector_back.linear_1.bias", "features", "projector_back"),
        ("model.vision_projector.linear_2.bias", "features", "projector.overview"),
        ("model.language_model.layers.2.input_layernorm.weight", "features", "text.layers.2"),
        ("model.language_model.layers.3.vision_sampler.v_norm.bias", "features", "samplers.3"),
        ("model.language_model.norm.weight", "features", "text.norm"),
    ],
)
def test_one_altered_number(certify: Certify, copy: Path, name: str, stage: str, part: str):
    alter(copy, name, lambda weight: weight + 100 * torch.eye(1, weight.numel()).view(weight.shape))
    certificate = certify(copy)
    assert first(certificate) == (stage, part)
    assert certificate.weights.different == [name]
    # what is computed before that layer is equal
    names = list(certificate.content["features"])
    before = [certificate.content["features"][known] for known in names[: names.index(part)]]
    assert all(row["relative"] <= row["tolerance"] for row in before)


def test_transposed_sampler(certify: Certify, copy: Path):
    alter(copy, "model.language_model.layers.1.vision_sampler.linear_1.weight", torch.t)
    assert first(certify(copy)) == ("features", "samplers.1")


def test_head(certify: Certify, copy: Path):
    alter(copy, "lm_head.weight", lambda weight: weight + torch.eye(*weight.shape))
    assert first(certify(copy)) == ("logits", None)


def test_weight_that_no_question_needs(certify: Certify, copy: Path):
    name = "model.language_model.embed_tokens.weight"
    rows = torch.zeros(32_013, 1).index_fill(0, torch.tensor([UNUSED]), 1.0)
    alter(copy, name, lambda weight: weight + rows)
    certificate = certify(copy)
    assert first(certificate) == ("weights", name)
    assert all(not stage.differs for question in certificate.questions for stage in question.stages)


def test_resize_filter(certify: Certify, copy: Path):
    for name in ("preprocessor_config.json", "processor_config.json"):
        content = json.loads((copy / name).read_text())
        content.get("image_processor", content)["resample"] = NEAREST
        (copy / name).write_text(json.dumps(content))
    assert first(certify(copy)) == ("pixels", None)


def test_blank_in_the_template(certify: Certify, copy: Path):
    template = copy / "chat_template.jinja"
    text = template.read_text()
    assert "helpful AI" in text
    template.write_text(text.replace("helpful AI", "helpful  AI"))
    certificate = certify(copy)
    assert first(certificate) == ("ids", None)
    assert "from position" in certificate.content["first_difference"]["detail"]


def test_tolerance(certify: Certify, copy: Path):
    name = "model.vision_tower.layers.2.mlp.fc2.bias"
    alter(copy, name, lambda weight: weight + 0.1)
    assert first(certify(copy)) == ("features", "tower.overview.layers.2")
    certificate = certify(copy, tolerance=0.5)
    assert first(certificate) == ("weights", name)
    assert TOLERANCES["float32"] < certificate.content["features"]["tower.overview.layers.2"]["relative"] < 0.5


def test_other_kinds_of_folders(certify: Certify, copy: Path):
    config = json.loads((copy / "config.json").read_text())
    for change, message in (
        ({"image_token_grid": 2}, "FUSION-L"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "is quantized"),
    ):
        (copy / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=message):
            certify(copy)
    assert not (copy / PARITY).exists()


@pytest.mark.slow
def test_command(converted: Converted, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """In real processes: the worker by another Python, a file of questions; the status is 1 where anything differs."""
    image = Path(__file__).parents[2] / "docs" / "assets" / "red_circle.png"
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"image": str(image), "question": "what color is the shape?"}) + "\n")
    line = [
        "verify",
        "--model",
        str(copy),
        "--checkpoint",
        str(converted.checkpoint),
        "--vision-config",
        str(converted.sizes),
    ]
    line += ["--authors-code", str(STAND_IN), "--authors-python", sys.executable, "--input", str(questions)]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert "tokens: 16 of each answer, equal in 1 of 1" in out and PARITY in out.splitlines()[-1]
    assert json.loads((copy / PARITY).read_text())["questions"][0]["question"] == "what color is the shape?"

    alter(copy, "model.language_model.layers.1.vision_sampler.linear_1.weight", torch.t)
    assert main(line) == 1
    assert "first at: features, samplers.1 (question 1)" in capsys.readouterr().out.splitlines()[-1]
    assert json.loads((copy / PARITY).read_text())["equal"] is False
