"""Recipes: the published values, overrides, and errors that name what is meant."""

from pathlib import Path

import pytest

from fusion_hf.common.errors import InputError
from fusion_hf.training import run
from fusion_hf.training.recipe import changed_keys, load_recipe, make_arguments, split_batch

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"
# the paper's table of stages: global batch, learning rate, the tower's, longest sequence
PUBLISHED = {
    ("fusion-3b", "stage1"): (256, 2e-5, 2e-5, 2048),
    ("fusion-3b", "stage1.5"): (128, 2e-5, 2e-6, 4096),
    ("fusion-3b", "stage2"): (128, 1e-5, 1e-6, 4096),
    ("fusion-x-3b", "stage1"): (256, 2e-5, 2e-5, 2048),
    ("fusion-x-3b", "stage1.5"): (128, 2e-5, 2e-6, 4096),
    ("fusion-x-3b", "stage2"): (128, 1e-5, 1e-6, 4096),
    ("fusion-8b", "stage1"): (256, 2e-5, 2e-5, 2048),
    ("fusion-8b", "stage1.5"): (128, 2e-5, 2e-6, 4096),
    ("fusion-8b", "stage2"): (128, 1e-5, 1e-6, 4096),
    ("fusion-x-8b", "stage1"): (256, 2e-5, 2e-5, 2048),
    ("fusion-x-8b", "stage1.5"): (128, 2e-5, 2e-6, 4096),
    ("fusion-x-8b", "stage2"): (128, 1e-5, 1e-6, 3072),
}
BEFORE = {"stage1": "untrained", "stage1.5": "stage1", "stage2": "stage1.5"}
EVERYWHERE = {
    "train": ["vision_tower", "projectors", "samplers", "language_model"],
    "query_lens": [4, 16, 36, 64, 144],
    "group_by": "modality_length",
    "num_train_epochs": 1.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "optim": "adamw_torch",
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "loss_average": "micro_batches",
    "query_len_draw": "micro_batch",
    "on_truncated": "load",
    "max_image_pixels": 933_120_000,
    "bf16": True,
    "tf32": True,
    "gradient_checkpointing": True,
}


def test_there_are_no_other_published_recipes():
    found = {(path.parent.name, path.stem) for path in RECIPES.glob("*/stage*.yaml")}
    assert {pair for pair in found if pair[0] != "fusion-nano"} == set(PUBLISHED)


@pytest.mark.parametrize(("model", "stage"), PUBLISHED)
def test_values_are_the_published_ones(model, stage):
    values = load_recipe(RECIPES / model / f"{stage}.yaml")
    batch, rate, tower_rate, length = PUBLISHED[model, stage]
    assert values["global_batch_size"] == batch
    assert values["learning_rate"] == rate
    assert values["vision_tower_learning_rate"] == tower_rate
    assert values["max_length"] == length
    assert {key: values[key] for key in EVERYWHERE} == EVERYWHERE
    assert values["model"] == f"runs/{model}/{BEFORE[stage]}"
    assert values["output_dir"] == f"runs/{model}/{stage}"
    assert Path(values["data"]).resolve() == RECIPES.parent / "data" / f"{stage}.yaml"
    assert Path(values["data"]).is_file()


@pytest.mark.parametrize(("model", "stage"), PUBLISHED)
def test_transformers_takes_them_on_the_authors_32_processes(model, stage):
    values = load_recipe(RECIPES / model / f"{stage}.yaml")
    arguments = make_arguments({**values, "bf16": False}, world_size=32)
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * 32
    assert batch == values["global_batch_size"]


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: some/model\ndata: records.json\noutput_dir: out\nlearning_rate: 1e-5\n")
    (tmp_path / "records.json").write_text("[]")
    return path


def test_overrides_win_and_numbers_are_numbers(recipe):
    values = load_recipe(recipe, ["learning_rate=2e-4", "query_lens=[4, 16]", "train=samplers", "max_steps=3"])
    assert values["learning_rate"] == 2e-4
    assert values["query_lens"] == [4, 16]
    assert values["train"] == ["samplers"]
    assert values["max_steps"] == 3
    assert load_recipe(recipe)["learning_rate"] == 1e-5


def test_no_is_a_strategy(recipe):
    """YAML reads it as false."""
    assert load_recipe(recipe, ["eval_strategy=no"])["eval_strategy"] == "no"
    with pytest.raises(InputError, match="gradient_checkpointing"):
        load_recipe(recipe, ["gradient_checkpointing=never"])


def test_data_is_relative_to_the_recipe_and_an_override_to_the_working_directory(recipe):
    assert load_recipe(recipe)["data"] == str(recipe.parent / "records.json")
    assert load_recipe(recipe, ["data=mine.json"])["data"] == "mine.json"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rte=1", "The command line has the unknown key 'learning_rte'. Did you mean 'learning_rate'?"),
        ("learning_rate=fast", "`learning_rate` must be a number, got 'fast'."),
        ("max_steps=1.5", "`max_steps` must be a whole number, got 1.5."),
        ("bf16=maybe", "`bf16` must be true or false, got 'maybe'."),
        ("learning_rate", "An override must be key=value, such as learning_rate=1e-5, got 'learning_rate'."),
        ("data=", "must set `data`."),
    ],
)
def test_wrong_overrides_are_named(recipe, override, message):
    with pytest.raises(InputError) as error:
        load_recipe(recipe, [override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "train",
            ["tower"],
            "`train` must be one of vision_tower, projectors, samplers, language_model, got 'tower'.",
        ),
        ("query_lens", [4, 5], "`query_lens` must contain perfect squares (1, 4, 9, 16, ...), got 5."),
        ("on_broken", "ignore", "`on_broken` must be one of error, skip, got 'ignore'."),
        ("load_in_4bit", True, "`lora_rank` must be 1 or more"),
    ],
)
def test_impossible_values_are_named(recipe, key, value, message):
    with pytest.raises(InputError) as error:
        make_arguments({**load_recipe(recipe), key: value}, world_size=1)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("values", "world_size", "expected"),
    [
        ({"global_batch_size": 256}, 32, (8, 1)),
        ({"global_batch_size": 256, "per_device_train_batch_size": 4}, 32, (4, 2)),
        ({"global_batch_size": 128, "per_device_train_batch_size": 4}, 32, (4, 1)),
        ({"global_batch_size": 128, "gradient_accumulation_steps": 16}, 1, (8, 16)),
        ({"per_device_train_batch_size": 3}, 2, (3, 1)),
    ],
)
def test_a_global_batch_is_split(values, world_size, expected):
    assert split_batch(values, world_size) == expected


@pytest.mark.parametrize(
    ("values", "world_size"),
    [
        ({"global_batch_size": 100}, 32),
        ({"global_batch_size": 128, "per_device_train_batch_size": 3}, 1),
        ({"global_batch_size": 128, "per_device_train_batch_size": 256}, 1),
        ({"global_batch_size": 128, "gradient_accumulation_steps": 3}, 1),
        ({"global_batch_size": 0}, 1),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(values, world_size):
    with pytest.raises(InputError, match=r"`global_batch_size` (must be .* got|is) \d+"):
        split_batch(values, world_size)


def test_a_key_that_is_not_given_has_its_default():
    began = {"learning_rate": 1e-5, "max_steps": 5}
    assert changed_keys(began, {**began, "max_grad_norm": 1.0, "loss_average": "tokens", "seed": 42}) == {}
    assert changed_keys({**began, "query_len_draw": "step", "train": None}, began) == {}
    changed = changed_keys(began, {**began, "max_grad_norm": 0.0, "on_truncated": "load", "max_image_pixels": 9})
    assert changed == {"max_grad_norm": (1.0, 0.0), "on_truncated": ("error", "load"), "max_image_pixels": (None, 9)}


@pytest.mark.parametrize("stage", ["stage1", "stage1.5", "stage2"])
def test_fusion_nano_is_trained_by_recipes_on_two_processes(stage):
    values = load_recipe(RECIPES / "fusion-nano" / f"{stage}.yaml")
    arguments = make_arguments(values, world_size=2)
    assert arguments.per_device_train_batch_size == 8
    assert arguments.get_warmup_steps(arguments.max_steps) == round(0.03 * arguments.max_steps)
    before = {"stage1": "start", "stage1.5": "stage1", "stage2": "stage1.5"}
    assert values["model"] == f"runs/fusion-nano/{before[stage]}"


def test_a_broken_recipe_of_a_begun_run_is_named(tmp_path, monkeypatch):
    (tmp_path / run.RECIPE_FILE).write_text("model: [")
    monkeypatch.setattr(run, "find_last", lambda folder: folder)
    values = {"model": "m", "data": "d", "output_dir": str(tmp_path), "report_to": "none"}
    with pytest.raises(InputError, match=r"The recipe .*recipe\.yaml is not valid YAML"):
        run._begin(tmp_path, values, make_arguments(values, 1))
