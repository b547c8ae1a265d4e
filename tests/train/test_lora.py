"""LoRA runs: what they train, what they leave, that it is loaded strictly, and that a merged model is the same."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.helpers.training_runs import Run, write_model, write_records
from transformers.quantizers.quantizers_utils import should_convert_module

from fusion_hf import FusionForConditionalGeneration, FusionProcessor
from fusion_hf.cli import main
from fusion_hf.common.errors import InputError
from fusion_hf.model.quantization_fusion import NOT_QUANTIZED
from fusion_hf.training import adapters, recipe
from fusion_hf.training.adapters import add_lora, find_targets, load_adapter, quantization_config
from fusion_hf.training.arguments import FusionTrainingArguments
from fusion_hf.training.parameter_groups import LANGUAGE_MODEL, PARTS, PROJECTORS, SAMPLERS, VISION_TOWER, part_of
from fusion_hf.training.run import load_start, make_trainer

KEYS = {"lora_rank": 4, "learning_rate": 1e-2, "max_steps": 6, "lr_scheduler_type": "constant", "warmup_steps": 0}
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, data: Path) -> Run:
    run = Run.make(tmp_path_factory.mktemp("runs") / "whole", model_folder, data, **KEYS)
    run.finish()
    return run


@pytest.fixture
def adapter(trained: Run, tmp_path: Path) -> Path:
    """The trained adapter, to be spoilt."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in (adapters.ADAPTER_CONFIG, adapters.ADAPTER_WEIGHTS):
        shutil.copy(trained.output / name, folder)
    return folder


def make_arguments(folder: Path, **keys: Any) -> FusionTrainingArguments:
    settings: dict[str, Any] = {"model": "base", "output_dir": str(folder), "lora_rank": 2, "report_to": "none"}
    return FusionTrainingArguments(**{**settings, **keys})


def load_base(folder: Path) -> FusionForConditionalGeneration:
    return FusionForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: torch.nn.Module, folder: Path) -> torch.Tensor:
    processor = FusionProcessor.from_pretrained(folder)
    image = Image.linear_gradient("L").convert("RGB")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what color is the circle ?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    ).to(next(model.parameters()).device)
    with torch.no_grad():
        return model(**inputs).logits.cpu()


# ---- what is trained ----


def test_default_trains_all_but_the_tower(tmp_path: Path) -> None:
    assert set(make_arguments(tmp_path).train) == {PROJECTORS, SAMPLERS, LANGUAGE_MODEL}
    assert make_arguments(tmp_path, lora_rank=0).train == list(PARTS)


@pytest.mark.parametrize("whole", [[], [PROJECTORS], [SAMPLERS, VISION_TOWER], [PROJECTORS, SAMPLERS, VISION_TOWER]])
def test_parts_train_whole_if_named(model_folder: Path, tmp_path: Path, whole: list[str]) -> None:
    adapted = add_lora(load_base(model_folder), make_arguments(tmp_path, train=[*whole, LANGUAGE_MODEL]))
    trained = [(name, parameter) for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert {part_of(name) for name, _ in trained} == {*whole, LANGUAGE_MODEL}
    assert all(("lora_" in name) == (part_of(name) == LANGUAGE_MODEL) for name, _ in trained)
    base = load_base(model_folder)
    for part in whole:
        expected = sum(p.numel() for name, p in base.named_parameters() if part_of(name) == part)
        assert sum(p.numel() for name, p in trained if part_of(name) == part) == expected


def test_targets_are_linear_layers_of_the_language_model(model_folder: Path) -> None:
    model = load_base(model_folder)
    names = find_targets(model)
    assert len(names) == 7 * model.config.text_config.num_hidden_layers
    assert all(part_of(f"{name}.") == LANGUAGE_MODEL for name in names)
    chosen = find_targets(model, ["q_proj", "layers.0.mlp.up_proj", "lm_head"])
    assert len(chosen) == model.config.text_config.num_hidden_layers + 2
    with pytest.raises(InputError, match=r"`lora_targets` must contain .*q_proj.*got 'qproj'"):
        find_targets(model, ["qproj"])


def test_injected_layers_are_the_targets(model_folder: Path, tmp_path: Path) -> None:
    """PEFT shortens long lists of names; what it then matches must be the same layers."""
    base = load_base(model_folder)
    names = find_targets(base)
    adapted = add_lora(base, make_arguments(tmp_path))
    injected = {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A." in name}
    assert injected == {PREFIX + name for name in names}


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"train": [PROJECTORS]}, "`train` must contain language_model, since `lora_parts` does"),
        ({"train": [PROJECTORS], "lora_parts": [SAMPLERS]}, "`train` must contain samplers, since `lora_parts` does"),
        (
            {"train": [LANGUAGE_MODEL, SAMPLERS], "lora_parts": [SAMPLERS]},
            "`lora_parts` must contain language_model, since `train` does",
        ),
        ({"lora_parts": ["tower"]}, "`lora_parts` must be one of vision_tower, .*got 'tower'"),
        ({"lora_parts": []}, r"`lora_parts` must contain at least one of vision_tower.*got \[\]"),
        (
            {"lora_rank": 0, "lora_parts": [SAMPLERS]},
            "`lora_parts` requires a `lora_rank` of 1 or more, got .*lora_rank = 0",
        ),
        ({"lora_rank": 0, "lora_dora": True}, "`lora_dora` requires a `lora_rank` .*lora_dora = True"),
        ({"lora_rank": 0, "lora_rslora": True}, "`lora_rslora` requires a `lora_rank` .*lora_rslora = True"),
        ({"lora_rank": 0, "lora_bias": "all"}, "`lora_bias` requires a `lora_rank` .*lora_bias = 'all'"),
        ({"lora_bias": "some"}, "`lora_bias` must be one of none, lora_only, all, got 'some'"),
        ({"lora_rank": 0, "load_in_8bit": True}, "`lora_rank` must be 1 or more if `load_in_8bit` is set"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "Only one of `load_in_4bit` and `load_in_8bit`"),
        ({"lora_dora": True, "load_in_8bit": True}, "`lora_dora` must be false if `load_in_8bit` is set"),
    ],
)
def test_keys_that_contradict_each_other(tmp_path: Path, keys: dict[str, Any], error: str) -> None:
    with pytest.raises(InputError, match=error):
        make_arguments(tmp_path, **keys)


# ---- which parts get LoRA, and of which kind ----

VARIANTS: dict[str, dict[str, Any]] = {
    "all parts": {"lora_parts": list(PARTS)},
    "tower and samplers": {"lora_parts": [VISION_TOWER, SAMPLERS]},
    "projectors, beside a whole tower": {"lora_parts": [PROJECTORS], "train": [PROJECTORS, VISION_TOWER]},
    "some layers of two parts": {"lora_parts": [VISION_TOWER, LANGUAGE_MODEL], "lora_targets": ["fc1", "q_proj"]},
    "DoRA": {"lora_dora": True, "lora_parts": list(PARTS)},
    "rsLoRA": {"lora_rslora": True},
    "biases of layers with LoRA": {"lora_bias": "lora_only", "lora_parts": [VISION_TOWER, LANGUAGE_MODEL]},
    "all biases": {"lora_bias": "all", "lora_parts": [VISION_TOWER, LANGUAGE_MODEL]},
    "all, with activation checkpoints": {"lora_parts": list(PARTS), "gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_train_save_reload_and_merge(name: str, model_folder: Path, data: Path, tmp_path: Path) -> None:
    run = Run.make(tmp_path / "run", model_folder, data, **KEYS, **VARIANTS[name], save_strategy="no")
    arguments = recipe.make_arguments(recipe.load_recipe(run.recipe), 1)
    processor, model = load_start(arguments)
    trained = [part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert set(trained) == set(arguments.train)
    trainer = make_trainer(model, processor, arguments)
    trainer.train()
    trainer.save_model(str(run.output))
    expected = logits(model.eval(), model_folder)
    base = load_base(model_folder)
    assert not torch.equal(expected, logits(base, model_folder))
    _check_what_changed(model, base, arguments)
    loaded = load_adapter(load_base(model_folder), run.output)
    weights = dict(loaded.named_parameters())
    assert all(torch.equal(weights.pop(name), parameter) for name, parameter in model.named_parameters())
    assert weights == {}
    # the last bit of a product may depend on where in the memory its sides lie
    torch.testing.assert_close(logits(loaded, model_folder), expected, rtol=1e-6, atol=1e-6)
    assert main(["merge", "--model", str(run.output), "--output", str(tmp_path / "merged")]) == 0
    torch.testing.assert_close(
        logits(load_base(tmp_path / "merged"), tmp_path / "merged"), expected, rtol=1e-5, atol=1e-5
    )


def _check_what_changed(adapted: torch.nn.Module, base: torch.nn.Module, arguments: FusionTrainingArguments) -> None:
    """Every layer that got LoRA has learned, in the parts that were to get it; frozen weights are as they were."""
    last = f".layers.{base.config.text_config.num_hidden_layers - 1}.vision_sampler."  # which nothing reads
    ups = {name: parameter for name, parameter in adapted.named_parameters() if ".lora_B." in name}
    assert {part_of(name) for name in ups} == set(arguments.adapted_parts)
    assert all((parameter.abs().max() > 0) == (last not in name) for name, parameter in ups.items())
    before = base.state_dict()
    for name, parameter in adapted.named_parameters():
        plain = name.removeprefix(PREFIX).replace(".base_layer", "")
        if plain in before and not parameter.requires_grad:
            assert torch.equal(parameter, before[plain]), name
    biases = [
        name
        for name, parameter in adapted.named_parameters()
        if name.endswith("bias") and ".lora_" not in name and parameter.requires_grad and "modules_to_save" not in name
    ]
    assert bool(biases) == (arguments.lora_bias != "none")
    assert all(".base_layer." in name for name in biases) or arguments.lora_bias == "all"


def test_default_train_follows_the_parts(tmp_path: Path) -> None:
    assert make_arguments(tmp_path, lora_parts=[VISION_TOWER]).train == [VISION_TOWER, PROJECTORS, SAMPLERS]
    assert make_arguments(tmp_path, lora_parts=[LANGUAGE_MODEL]).train == [PROJECTORS, SAMPLERS, LANGUAGE_MODEL]


def test_frozen_stay_and_trained_change(trained: Run, model_folder: Path) -> None:
    base = load_base(model_folder)
    before, last = base.state_dict(), f".layers.{base.config.text_config.num_hidden_layers - 1}.vision_sampler."
    after = load_adapter(load_base(model_folder), trained.output).state_dict()
    seen = set()
    for name, tensor in before.items():
        part, place, leaf = part_of(name), *name.rsplit(".", 1)
        if part in (PROJECTORS, SAMPLERS):
            whole = re.sub(r"\.(vision_\w+)\.", r".\1.modules_to_save.default.", PREFIX + name)
            # nothing reads what the last layer's sampler writes
            assert torch.equal(after[whole], tensor) == (last in name), name
        else:
            lies_in = f"{PREFIX}{name}" if f"{PREFIX}{name}" in after else f"{PREFIX}{place}.base_layer.{leaf}"
            assert torch.equal(after[lies_in], tensor), name
        seen.add(part)
    assert seen == set(PARTS)
    ups = [tensor for name, tensor in after.items() if ".lora_B." in name]
    assert ups and all(tensor.abs().max() > 0 for tensor in ups)


# ---- what a run leaves ----


def test_adapter_gives_the_trained_models_logits(model_folder: Path, data: Path, tmp_path: Path) -> None:
    run = Run.make(tmp_path / "run", model_folder, data, **KEYS, save_strategy="no")
    arguments = recipe.make_arguments(recipe.load_recipe(run.recipe), 1)
    processor, model = load_start(arguments)
    trainer = make_trainer(model, processor, arguments)
    trainer.train()
    trainer.save_model(str(run.output))
    expected = logits(model.eval(), model_folder)
    assert not torch.equal(expected, logits(load_base(model_folder), model_folder))
    assert torch.equal(logits(load_adapter(load_base(model_folder), run.output), model_folder), expected)


def test_files_of_a_finished_run(trained: Run, model_folder: Path) -> None:
    names = {path.name for path in trained.output.iterdir()}
    assert {adapters.ADAPTER_CONFIG, adapters.ADAPTER_WEIGHTS, "processor_config.json", "finished.json"} <= names
    assert "model.safetensors" not in names
    config = json.loads((trained.output / adapters.ADAPTER_CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(model_folder)
    with safe_open(trained.output / adapters.ADAPTER_WEIGHTS, framework="pt") as file:
        assert {part_of(name) for name in file.keys()} == {PROJECTORS, SAMPLERS, LANGUAGE_MODEL}  # noqa: SIM118


@pytest.mark.parametrize("more", [{}, pytest.param({"gradient_checkpointing": True}, marks=pytest.mark.slow)])
def test_resumed_run_equals_the_whole_one(
    trained: Run, model_folder: Path, data: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    run = Run.make(tmp_path / "run", model_folder, data, **KEYS, **more)
    run.finish()
    exact = run.exact_log()
    if not more:
        assert exact == trained.exact_log()
    weights = (run.output / adapters.ADAPTER_WEIGHTS).read_bytes()
    for name in ("finished.json", adapters.ADAPTER_WEIGHTS):
        (run.output / name).unlink()
    shutil.rmtree(run.output / "checkpoint-6")
    run.finish()
    assert run.exact_log() == exact
    assert (run.output / adapters.ADAPTER_WEIGHTS).read_bytes() == weights


def test_resume_is_strict(trained: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "recipe.yaml", tmp_path / "output")
    shutil.copytree(trained.output, run.output)
    (run.output / "finished.json").unlink()
    shutil.rmtree(run.output / "checkpoint-6")
    text = trained.recipe.read_text().replace(str(trained.output), str(run.output))
    run.recipe.write_text(text)
    weights = run.output / "checkpoint-3" / adapters.ADAPTER_WEIGHTS
    renamed = {name.replace("layers.1", "layers.7"): tensor for name, tensor in load_file(weights).items()}
    save_file(renamed, weights, {"format": "pt"})  # same names' lengths: the checkpoint's sizes agree
    started = run.start()
    assert started.end() == 2
    assert "keys are missing, such as" in started.stderr() and "layers.1" in started.stderr()


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(trained: Run, model_folder: Path, data: Path, tmp_path: Path) -> None:
    for reentrant in (False, True):
        run = Run.make(
            tmp_path / str(reentrant),
            model_folder,
            data,
            **KEYS,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )
        run.finish()
        for entry, expected in zip(run.log(), trained.log(), strict=True):
            assert entry["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert entry["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


# ---- merging ----


def test_merged_folder_answers_as_base_and_adapter(trained: Run, model_folder: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    assert main(["merge", "--model", str(trained.output), "--output", str(merged)]) == 0
    expected = logits(load_adapter(load_base(model_folder), trained.output), model_folder)
    torch.testing.assert_close(logits(load_base(merged), merged), expected, rtol=1e-6, atol=1e-6)
    whole = {path.name for path in model_folder.iterdir()}
    assert {path.name for path in merged.iterdir()} == {*whole, "README.md"}
    with (
        safe_open(merged / "model.safetensors", framework="pt") as file,
        safe_open(model_folder / "model.safetensors", framework="pt") as base,
    ):
        assert set(file.keys()) == set(base.keys())


def test_merge_casts(trained: Run, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    assert main(["merge", "--model", str(trained.output), "--output", str(merged), "--dtype", "bfloat16"]) == 0
    assert {tensor.dtype for tensor in load_file(merged / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((merged / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (["--output", "{used}"], "--output must be a new or an empty folder"),
        (["--output", "{new}", "--base", "{used}/nothing here"], "nothing here is neither a folder"),
    ],
)
def test_merge_refuses(
    trained: Run, tmp_path: Path, more: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"used": trained.output, "new": tmp_path / "new"}
    assert main(["merge", "--model", str(trained.output), *(text.format(**places) for text in more)]) == 2
    assert error in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_ask_names_merge(trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    assert main(["ask", str(tmp_path / "a.png"), "what color?", "--model", str(trained.output)]) == 2
    assert f"fusion-hf merge --model {trained.output}" in capsys.readouterr().err


# ---- strictness ----


def spoil_weights(folder: Path, key: str, change: str) -> None:
    path = folder / adapters.ADAPTER_WEIGHTS
    weights = load_file(path)
    tensor = weights.pop(key)
    if change == "renamed":
        weights[f"{key}x"] = tensor
    elif change == "additional":
        weights |= {key: tensor, f"{key}x": tensor.clone()}
    elif change == "shape":
        weights[key] = tensor[..., :-1].contiguous()
    save_file(weights, path)


KEYS_OF_PARTS = (
    "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_B.weight",
    "base_model.model.model.language_model.layers.2.vision_sampler.q_proj.weight",
    "base_model.model.model.vision_projector_back.linear_1.weight",
)


@pytest.mark.parametrize("change", ["renamed", "missing", "additional", "shape"])
@pytest.mark.parametrize("key", KEYS_OF_PARTS)
def test_wrong_keys_are_errors(model_folder: Path, adapter: Path, key: str, change: str) -> None:
    spoil_weights(adapter, key, change)
    named = {"renamed": "keys are missing.*keys are unknown", "missing": "missing", "additional": "unknown"}
    with pytest.raises(InputError, match=named.get(change, "must have the shape")) as caught:
        load_adapter(load_base(model_folder), adapter)
    assert key.removesuffix("weight")[:60] in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"use_dora": "yes"}, "use_dora"),
        ({"use_dora": True}, "keys are missing"),  # it was trained without
        ({"bias": "some"}, "`bias` must be one of none, lora_only, all, got 'some'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"from_the_future": 1}, "from_the_future"),
        ({"r": 10**9}, "got 1000000000"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"target_modules": "(a+)+$"}, "target_modules"),
        ({"target_modules": ["nowhere"]}, "nowhere"),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save` may hold"),
        ({"peft_type": "IA3"}, "does not describe a LoRA adapter"),
    ],
)
def test_strange_configurations_are_errors(
    model_folder: Path, adapter: Path, changes: dict[str, Any], error: str
) -> None:
    path = adapter / adapters.ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError) as caught:
        load_adapter(load_base(model_folder), adapter)
    assert error in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"\xff" * 64])
def test_weights_that_are_no_safetensors(model_folder: Path, adapter: Path, content: bytes) -> None:
    (adapter / adapters.ADAPTER_WEIGHTS).write_bytes(content)
    with pytest.raises(InputError, match="cannot be read"):
        load_adapter(load_base(model_folder), adapter)


def test_pickled_weights_are_not_looked_at(model_folder: Path, adapter: Path) -> None:
    weights = load_file(adapter / adapters.ADAPTER_WEIGHTS)
    (adapter / adapters.ADAPTER_WEIGHTS).unlink()
    torch.save(weights, adapter / "adapter_model.bin")
    with pytest.raises(InputError, match="safetensors files only"):
        load_adapter(load_base(model_folder), adapter)


# ---- 4 bits ----


def test_quantized_are_the_layers_that_get_adapters(model_folder: Path) -> None:
    base = load_base(model_folder)
    linear = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)]
    assert [name for name in linear if should_convert_module(name, NOT_QUANTIZED)] == find_targets(base)


@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit"])
def test_missing_bitsandbytes_names_the_extra(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf"`{key}` requires bitsandbytes.*`quant`"):
        quantization_config(make_arguments(tmp_path, **{key: True}))
