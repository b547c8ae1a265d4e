"""LoRA on a language model that is kept in 4 or 8 bits: it trains, is saved, loaded and merged into exact weights."""

from pathlib import Path

import pytest
import torch
from tests.helpers.training_runs import Run, write_model, write_records
from tests.train.test_lora import KEYS, load_base, logits

from fusion_hf.cli import main
from fusion_hf.data import load_records
from fusion_hf.training import FusionDataCollator, recipe
from fusion_hf.training.adapters import find_targets, load_adapter
from fusion_hf.training.run import load_start, make_trainer

pytestmark = pytest.mark.quant

LAYERS = {"load_in_4bit": "Linear4bit", "load_in_8bit": "Linear8bitLt"}


@pytest.mark.parametrize(
    ("key", "more"), [("load_in_4bit", {}), ("load_in_4bit", {"lora_dora": True}), ("load_in_8bit", {})]
)
def test_it_trains_and_is_merged(key: str, more: dict[str, bool], tmp_path: Path) -> None:
    model_folder, data = write_model(tmp_path / "model"), write_records(tmp_path / "data")
    run = Run.make(tmp_path / "run", model_folder, data, **KEYS, **more, **{key: True}, save_strategy="no")
    arguments = recipe.make_arguments(recipe.load_recipe(run.recipe), 1)
    processor, model = load_start(arguments)
    base = load_base(model_folder)
    quantized = {
        name
        for name, module in model.named_modules()
        if type(module).__name__ == LAYERS[key] and type(module).__module__.startswith("bitsandbytes.")  # PEFT's too
    }
    assert quantized == {f"base_model.model.{name}.base_layer" for name in find_targets(base)}
    trainer = make_trainer(model, processor, arguments)
    trainer.train()
    ups = [parameter for name, parameter in model.named_parameters() if ".lora_B." in name]
    assert ups and all(parameter.abs().max() > 0 for parameter in ups)
    trainer.save_model(str(run.output))

    loaded = load_adapter(load_base(model_folder), run.output)  # into exact weights
    weights = dict(loaded.named_parameters())
    for name, parameter in model.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            assert torch.equal(weights[name], parameter), name
    exact = logits(loaded, model_folder)
    assert not torch.equal(exact, logits(base, model_folder))
    merged = tmp_path / "merged"
    assert main(["merge", "--model", str(run.output), "--output", str(merged)]) == 0
    torch.testing.assert_close(logits(load_base(merged), merged), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key", LAYERS)
def test_gradients_after_an_evaluation_are_those_before(key: str, tmp_path: Path) -> None:
    """A kernel for inference that stayed in place would pass no gradient on to the layers below."""
    model_folder, data = write_model(tmp_path / "model"), write_records(tmp_path / "data", 4)
    run = Run.make(tmp_path / "run", model_folder, data, **KEYS, **{key: True}, lora_dropout=0.0)
    arguments = recipe.make_arguments(recipe.load_recipe(run.recipe), 1)
    processor, model = load_start(arguments)
    records = load_records(data)
    batch = FusionDataCollator(processor, query_lens=[4])([records[index] for index in range(len(records))])

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model.train()(**batch).loss.backward()
        return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}

    before = gradients()
    with torch.no_grad():
        model.eval()(**batch)
    after = gradients()
    assert before and before.keys() == after.keys()
    assert all(torch.equal(after[name], gradient) for name, gradient in before.items())
