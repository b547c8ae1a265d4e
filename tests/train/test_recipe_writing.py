"""`fusion-hf init-recipe`: numbers that suit the records, a recipe that can be read, and a held-out part."""

import json
from pathlib import Path

import pytest
import yaml
from tests.helpers.training_data import write_format
from tests.train.conftest import make_records

from fusion_hf.cli import main
from fusion_hf.common.errors import InputError
from fusion_hf.data import load_records
from fusion_hf.training.recipe import check_files, load_recipe, make_arguments
from fusion_hf.training.recipe_writing import BATCHES, METHODS, RecipeRequest, Steps, write_recipe


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("records", "batch", "per_epoch", "epochs"),
    [
        (1, 1, 1, 10),
        (3, 3, 1, 10),
        (36, 4, 9, 10),
        (200, 4, 50, 3),
        (1000, 16, 63, 3),
        (50_000, 128, 391, 3),
        (100_000, 128, 782, 1),
    ],
)
def test_steps(records: int, batch: int, per_epoch: int, epochs: int) -> None:
    steps = Steps.of(records)
    assert (steps.batch, steps.per_epoch, steps.epochs) == (batch, per_epoch, epochs)
    assert steps.total == per_epoch * epochs
    assert 1 <= steps.between_evaluations <= max(1, steps.total)


def test_batches_are_powers_of_two() -> None:
    """So that any power of two of processes divides them."""
    assert all(batch & (batch - 1) == 0 for batch in BATCHES)


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_can_be_read_and_names_what_is_there(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_records(tmp_path / "data", 40)
    assert main(["init-recipe", "data/records.json", "--method", method]) == 0
    assert "36 records to train on, 4 held out; 9 steps per epoch, 90 in all" in capsys.readouterr().out
    values = load_recipe("recipe.yaml")
    check_files(values)
    assert values.get("load_in_4bit", False) == (method == "qlora")
    assert (values.get("lora_rank", 0) > 0) == (method != "full")
    arguments = make_arguments(values, 1)
    assert arguments.eval_strategy == "steps" and arguments.eval_steps == arguments.save_steps == 18
    assert arguments.eval_samples == 4 and arguments.load_best_model_at_end


def test_what_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    made = make_records(tmp_path / "data", 40)
    write_recipe(RecipeRequest("data/records.json", tmp_path / "sub.yaml", "lora", "model"))
    values = load_recipe("sub.yaml")
    trained, held_out = ([record["id"] for record in load_records(values[key])] for key in ("data", "eval_data"))
    assert trained + held_out == [record["id"] for record in made] and len(held_out) == 4


@pytest.mark.parametrize("kind", ["json", "parquet_bytes", "folder", "tar"])
def test_each_kind_of_records(kind: str, tmp_path: Path) -> None:
    """Too few records to hold one out: nothing is measured, and the recipe says so."""
    (tmp_path / "data").mkdir()
    source = write_format(tmp_path / "data", kind)
    written = write_recipe(RecipeRequest(str(source), tmp_path / "recipe.yaml", "full", "model"))
    values = load_recipe("recipe.yaml")
    assert (written.held_out, written.files) == (0, (tmp_path / "recipe.yaml",))
    assert "eval_data" not in values and values["eval_strategy"] == "no"
    assert len(load_records(values["data"])) == written.steps.records == 7


def test_images_are_found_from_another_folder(tmp_path: Path) -> None:
    make_records(tmp_path / "data", 12, text_every=0)
    (tmp_path / "recipes").mkdir()
    write_recipe(RecipeRequest("data/records.json", tmp_path / "recipes" / "a.yaml", "lora", "model"))
    values = load_recipe("recipes/a.yaml")
    assert all(record["image"] is not None for key in ("data", "eval_data") for record in load_records(values[key]))


def test_a_root_for_the_images(tmp_path: Path) -> None:
    make_records(tmp_path / "data", 12, text_every=0)
    (tmp_path / "lists").mkdir()
    (tmp_path / "data" / "records.json").rename(tmp_path / "lists" / "records.json")
    write_recipe(RecipeRequest("lists/records.json", tmp_path / "a.yaml", "lora", "model", data_root="data"))
    values = load_recipe("a.yaml")
    assert all(record["image"] is not None for key in ("data", "eval_data") for record in load_records(values[key]))


def test_held_out_records_of_their_own(tmp_path: Path) -> None:
    make_records(tmp_path / "data", 12)
    make_records(tmp_path / "held", 5)
    request = RecipeRequest("data/records.json", tmp_path / "a.yaml", "lora", "model", eval_data="held/records.json")
    written = write_recipe(request)
    assert (written.steps.records, written.held_out) == (12, 5)
    values = load_recipe("a.yaml")
    assert len(load_records(values["eval_data"])) == 5


def test_long_answers_are_not_compared_word_for_word(tmp_path: Path) -> None:
    records = make_records(tmp_path / "data", 12, text_every=1)
    for record in records:
        record["conversations"][1]["value"] = "it is a long story of many words about all of them"
    (tmp_path / "data" / "records.json").write_text(json.dumps(records))
    write_recipe(RecipeRequest("data/records.json", tmp_path / "a.yaml", "lora", "model"))
    assert "eval_samples" not in yaml.safe_load((tmp_path / "a.yaml").read_text())


def test_names_that_yaml_would_read_otherwise(tmp_path: Path) -> None:
    make_records(tmp_path / "yes: #1", 12)
    write_recipe(RecipeRequest("yes: #1/records.json", tmp_path / "a.yaml", "lora", "null"))
    values = load_recipe("a.yaml")
    assert values["model"] == "null" and len(load_records(values["data"])) == 11


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    make_records(tmp_path / "data", 12)
    (tmp_path / "a.eval.yaml").write_text("mine")
    with pytest.raises(InputError, match=r"a\.eval\.yaml exists"):
        write_recipe(RecipeRequest("data/records.json", tmp_path / "a.yaml", "lora", "model"))
    assert sorted(path.name for path in tmp_path.glob("*.yaml")) == ["a.eval.yaml"]
