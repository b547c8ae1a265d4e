"""`benchmarks/engine.py`: what it sums up, and that the document has what was measured."""

import json

import serving_report
import torch
from engine import ONEDNN, WAYS, Layers, summarize_all
from serving_report import DOCUMENT, ENGINE_TABLE, ENGINE_WAYS, ENGINES, RESULTS
from tests.helpers.tiny import tiny_config, tiny_model


def test_document_is_up_to_date():
    text = DOCUMENT.read_text()
    assert serving_report.update(text, RESULTS) == text, "run: python benchmarks/report.py"


def test_ratios_are_taken_within_rounds(tmp_path):
    seconds = {way: [2.0 + index, 4.0] for index, way in enumerate(WAYS)}
    parts = {WAYS[0]: [{"tiles": 1.0, "overviews": 0.5, "language model": 0.2}] * 2}
    result = summarize_all(8, seconds, parts)
    assert result["rate_ratios"]["vllm by batch"] == {"median": 1.25, "min": 1.0, "max": 1.5}
    assert set(ENGINES) < set(result["rate_ratios"]) and set(ENGINE_WAYS) == set(WAYS)
    settings = {
        "size": "middle",
        "dtype": "float32",
        "threads": 2,
        "rounds": 2,
        "new_tokens": 32,
        "photo": [1280, 960],
    }
    about = {"machine": {"device": "a processor"}, "versions": {"torch": "2.13.0", "transformers": "5.17.0"}}
    (tmp_path / ENGINE_TABLE.columns["CPU"]).write_text(json.dumps({**about, "settings": settings, **result}))
    text = serving_report.update(DOCUMENT.read_text(), tmp_path)
    assert "both without oneDNN |  | 1.25 (1.00-1.50) | not measured |" in text
    assert "seconds of tiles, vLLM without oneDNN |  | 1.00 (1.00-1.00) | not measured |" in text


def test_layers_change_back_and_forth():
    assert sum(ONEDNN in way for way in WAYS) == len(WAYS) / 2
    model = tiny_model(tiny_config())
    kinds = [type(module) for module in model.modules()]
    layers = Layers(model)
    changed = [type(module) for module in model.modules()]
    assert (changed != kinds) == torch.backends.mkldnn.is_available()
    layers.use(False)
    assert [type(module) for module in model.modules()] == kinds
    layers.use(True)
    assert [type(module) for module in model.modules()] == changed
