"""Exported graphs answer as the model does, and as the authors' code did."""

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.docs.markdown import ROOT, fenced_blocks
from tests.helpers.tiny import QUERY_LEN, Sample, make_inputs, tiny_config, tiny_model
from tests.parity.conftest import FIXTURES, Recording
from torch import nn

from fusion_hf import FusionForConditionalGeneration
from fusion_hf.cli import main
from fusion_hf.cli.convert import main as convert
from fusion_hf.common import extras
from fusion_hf.common.errors import InputError
from fusion_hf.drawing.drawn_images import draw_spec
from fusion_hf.inference import ChatModel, nano_path, question_message
from fusion_hf.model.configuration_fusion import TokenBudget
from fusion_hf.onnx_export.export import max_pool, write_graphs
from fusion_hf.onnx_export.exported_folder import IMAGE_GRAPH, LANGUAGE, ExportSettings
from fusion_hf.onnx_export.runtime import CPU, NO_TURN, ExportedFusion

TOLERANCE = 1e-4  # of logits, absolute
STEPS = 4
SAMPLES = (Sample([5]), Sample([1], seed=1), Sample([9, 2, 6], [3, 4], seed=2))
QUESTIONS = {
    "single": "what color is the shape?",
    "count": "how many shapes are there?",
    "text": "what word is written?",
}
SETTINGS = ExportSettings(query_len=4, image_token_grid=4, max_length=512, eos_token_ids=[], suppressed_ids=[])


def arrays(inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in inputs.items() if isinstance(value, torch.Tensor)}


def write(
    model: FusionForConditionalGeneration, folder: Path, query_len: int, grid: int | None = None
) -> ExportedFusion:
    """The graphs of a model without a tokenizer."""
    from onnxruntime import InferenceSession

    with torch.no_grad():
        write_graphs(model, TokenBudget.of(model.config, query_len, grid), folder)
    sessions = (InferenceSession(folder / name, providers=[CPU]) for name in (IMAGE_GRAPH, LANGUAGE))
    return ExportedFusion(*sessions, processor=None, settings=SETTINGS)  # type: ignore[arg-type]


@torch.no_grad()
def assert_same_logits(model: FusionForConditionalGeneration, exported: ExportedFusion, inputs: dict) -> None:
    """Of the prompt, and of steps behind it."""
    budget = {"query_len": inputs["query_len"]}
    outputs = model(**inputs, use_cache=True)
    given = arrays(inputs)
    image_features, past = exported.encode_image(given), exported.empty_cache()
    logits, past = exported.run_language_model(given["input_ids"], given["prompt_end_positions"], image_features, past)
    for _ in range(STEPS):
        expected = outputs.logits[:, -1:].numpy()
        assert np.abs(expected).max() > 100 * TOLERANCE  # so that the comparison can fail
        np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)
        ids = outputs.logits[:, -1:].argmax(-1)
        mask = torch.ones(1, outputs.past_key_values.get_seq_length() + 1, dtype=torch.long)
        outputs = model(ids, mask, cache=outputs.past_key_values, use_cache=True, **budget)
        logits, past = exported.run_language_model(ids.numpy(), NO_TURN, image_features, past)


@pytest.mark.parametrize("sides", [(12, 4), (12, 8), (13, 5), (54, 36), (48, 36), (5, 7), (6, 1)])
def test_pooling_of_the_graph(sides: tuple[int, int]):
    length, cells = sides
    features = torch.randn(2, 3, length, length, generator=torch.Generator().manual_seed(0))
    assert torch.equal(max_pool(features, [cells, cells])[0], nn.functional.adaptive_max_pool2d(features, cells))


@pytest.mark.parametrize("name", ["onnx", "onnxscript"])
def test_a_missing_package_names_the_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(extras, "find_spec", lambda wanted: None if wanted == name else object())
    assert main(["export", "--output", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err == (
        f"error: Export to ONNX needs {name}, which is not installed: pip install 'fusion_hf[onnx]'.\n"
    )


def test_no_exported_folder(tmp_path: Path):
    with pytest.raises(InputError, match="is not an exported folder"):
        ExportedFusion.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_values": None}, "must be one prompt with an image"),
        ({"input_ids": np.zeros((2, 9))}, "2 prompts"),
        ({"input_ids": np.zeros((1, 512))}, "fewer than 512 tokens, got 512"),
    ],
)
def test_what_the_graphs_cannot_read(changes: dict, message: str):
    inputs = {"input_ids": np.zeros((1, 9)), "pixel_values": np.zeros(1)} | changes
    exported = ExportedFusion(None, None, None, SETTINGS)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        exported.generate({name: value for name, value in inputs.items() if value is not None}, 4)


LONG_ROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    },
    "original_max_position_embeddings": 100,
}


@pytest.mark.parametrize(
    ("backbone", "text", "limit"),
    [("llama", {}, 512), ("phi3", LONG_ROPE, 100)],
)
def test_longest_sequence(backbone: str, text: dict, limit: int):
    """Of long RoPE, beside the model's own."""
    processor = ChatModel.load(device="cpu").processor
    assert processor.tokenizer.model_max_length > 512
    assert ChatModel(tiny_model(tiny_config(backbone, text)), processor).short_rope_length == limit


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3"])
def test_every_backbone(backbone: str, tmp_path: Path):
    """One turn and three, short questions and long ones, with one graph."""
    model = tiny_model(tiny_config(backbone))
    exported = write(model, tmp_path, QUERY_LEN)
    for sample in SAMPLES:
        assert_same_logits(model, exported, make_inputs(model.config, [sample]))


@pytest.mark.slow
@pytest.mark.parametrize("early", ["uniform_padded", "masked"])
def test_early_text_attention(early: str, tmp_path: Path):
    model = tiny_model(tiny_config(early_text_attention=early))
    assert_same_logits(model, write(model, tmp_path, QUERY_LEN), make_inputs(model.config, [SAMPLES[0]]))


@pytest.mark.slow
def test_a_sliding_window_shorter_than_the_prompt(tmp_path: Path):
    model = tiny_model(tiny_config("mistral", {"sliding_window": 6}))
    assert_same_logits(model, write(model, tmp_path, QUERY_LEN), make_inputs(model.config, [SAMPLES[1]]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-siglip2", "phi3-siglip"])
def test_the_authors_tokens(name: str, tmp_path: Path):
    source = FIXTURES / name
    arguments = ["--model", str(source / "checkpoint"), "--vision-config", str(source / "vision_config.json")]
    assert convert([*arguments, "--tokenizer", "none", "--output", str(tmp_path / "converted")]) == 0
    recording = Recording(name, tmp_path / "converted")
    model = recording.model("uniform")
    case, recorded = recording.meta["cases"]["generate"], recording.tensors("generate")
    exported = write(model, tmp_path, case["query_len"])
    inputs = arrays(recording.inputs(case, recorded, model))
    inputs["instruct_attention_mask"] = np.ones_like(inputs["instruct_input_ids"])
    expected = recorded["generated_ids"][0].tolist()
    settings = ExportSettings(case["query_len"], model.config.grid_side(), 4096, eos_token_ids=[], suppressed_ids=[])
    whole = ExportedFusion(exported.image_graph, exported.language_graph, None, settings)  # type: ignore[arg-type]
    assert whole.generate(inputs, len(expected)) == expected


@pytest.mark.slow
def test_the_command_and_its_answers(tmp_path: Path):
    """Of the bundled model with another budget than its own, in one turn and in two."""
    folder, budget = tmp_path / "exported", {"query_len": 4, "image_token_grid": 4}
    options = ["--query-len", "4", "--image-token-grid", "4"]
    assert main(["export", "--model", nano_path(), "--output", str(folder), *options]) == 0
    exported, chat_model = ExportedFusion.load(folder), ChatModel.load(device="cpu")
    answers = []
    for kind, question in QUESTIONS.items():
        for index in range(3):
            messages = [question_message(question, draw_spec(kind, "test", index).render())]
            for _ in range(2):
                answers.append(chat_model.answer(messages, 8, **budget))
                assert exported.answer(messages, 8) == answers[-1]
                turn = {"role": "assistant", "content": [{"type": "text", "text": answers[-1]}]}
                messages += [turn, question_message("what shape is in the image?")]
    assert len(set(answers)) > 5
    assert main(["export", "--output", str(folder)]) == 2  # it is not empty


@pytest.mark.slow
def test_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The command and the snippet of docs/interchange.md."""
    (tmp_path / "docs").symlink_to(ROOT / "docs", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    (command,), (snippet,) = (fenced_blocks("docs/interchange.md", language) for language in ("bash", "python"))
    assert main(shlex.split(command, comments=True)[1:]) == 0
    capsys.readouterr()
    exec(snippet, {})
    assert capsys.readouterr().out == "red\n"
