"""The card of a run says what was trained, on what and how well, and nothing that is nobody's business."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from fusion_hf import nano_path
from fusion_hf.training import run_card
from fusion_hf.training.run_card import find_evaluations, write_run_card

SECRET = "hf_secret"
EVALUATIONS = [
    {"step": 0, "eval_loss": 2.5, "eval_runtime": 1.0},
    {"step": 0, "eval_accuracy": 0.125, "eval_answers": 40.0},
    {"step": 5, "loss": 1.0},
    {"step": 10, "eval_loss": 0.5, "eval_accuracy": 0.975, "eval_answers": 40.0},
    {"step": 10, "train_loss": 1.2345678},
]


def make_run(folder: Path, base: str, log: list[dict[str, Any]] | None = None, **keys: Any) -> Path:
    """A run's folder as far as its card reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / "records.json").write_text("[]")
    values = {
        "model": base,
        "data": str(folder.parent / "records.json"),
        "eval_data": str(folder.parent / "held-out.json"),
        "output_dir": str(folder),
        "learning_rate": 1e-5,
        "hub_token": SECRET,
        "run_name": "secret plans",
        **keys,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    (folder / "finished.json").write_text(json.dumps({"steps": 10, "records": 1234, "skipped": 2, "best_step": 10}))
    lines = [json.dumps(entry) for entry in (EVALUATIONS if log is None else log)]
    (folder / "log.jsonl").write_text("\n".join([*lines, '{"step": 11, "lo']))
    return folder


def card_of(run: Path, base: str = nano_path(), name: str = "mine", **settings: Any) -> ModelCard:
    (run / "config.json").write_bytes((Path(nano_path()) / "config.json").read_bytes())
    write_run_card(run, run, base, name, **settings)
    return ModelCard.load(run / "README.md")


def test_what_a_card_says(tmp_path: Path) -> None:
    card = card_of(make_run(tmp_path / "run", nano_path()), name="me/mine")
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "image-text-to-text", "apache-2.0")
    assert {"fusion", "custom_code"} <= set(data.tags) and "lora" not in data.tags
    assert "# mine\n" in card.text and 'model_id = "me/mine"' in card.text
    assert "trained further from `fusion-nano`" in card.text
    assert "`records.json`: 1,234 records, 10 optimizer steps; 2 broken records were left out." in card.text
    assert "| 0 | 2.5 | 0.125 |" in card.text and "| 10 | 0.5 | 0.975 |" in card.text
    assert "40 questions" in card.text and "model of step 10" in card.text and "1.235" in card.text
    assert "learning_rate: 1.0e-05" in card.text
    for part in ("## Use", "## Limits", "## License", "arxiv.org/abs/2504.09925"):
        assert part in card.text


def test_what_a_card_keeps_to_itself(tmp_path: Path) -> None:
    text = card_of(make_run(tmp_path / "run", nano_path())).content
    for private in (SECRET, "secret plans", str(tmp_path), nano_path()):
        assert private not in text


def test_data_sets_of_the_hub_are_linked(tmp_path: Path) -> None:
    mixture = tmp_path / "mixture.yaml"
    entries = [{"json_path": "owner/photos"}, {"json_path": "owner/photos:test"}, {"json_path": "records.json"}]
    mixture.write_text(yaml.safe_dump({"datasets": entries}))
    card = card_of(make_run(tmp_path / "run", nano_path(), data=str(mixture)))
    assert card.data.datasets == ["owner/photos"]
    assert "[owner/photos](https://huggingface.co/datasets/owner/photos), `records.json`" in card.text
    mixture.unlink()  # the data have moved since
    card = card_of(make_run(tmp_path / "run", nano_path(), data=str(mixture)))
    assert card.data.datasets is None and "`mixture.yaml`" in card.text


def test_without_evaluations(tmp_path: Path) -> None:
    card = card_of(make_run(tmp_path / "run", nano_path(), log=[{"step": 1, "loss": 1.0}]))
    assert "Nothing was measured" in card.text


def test_a_base_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_card, "find_folder", lambda name: Path(nano_path()))
    card = card_of(make_run(tmp_path / "run", "owner/base"), base="owner/base")
    assert card.data.base_model == "owner/base" or card.data.base_model == ["owner/base"]
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    assert "trained further from [owner/base](https://huggingface.co/owner/base)" in card.text


def test_a_base_whose_licence_nobody_names(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_bytes((Path(nano_path()) / "config.json").read_bytes())
    card = card_of(make_run(tmp_path / "run", str(base)), base=str(base))
    assert (card.data.license, card.data.license_name) == ("other", "unknown")
    assert "**Not known here**" in card.text
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: https://a.b/c\n---\n")
    card = card_of(tmp_path / "run", base=str(base))
    assert (card.data.license_name, card.data.license_link) == ("mine", "https://a.b/c")
    assert "[mine](https://a.b/c)" in card.text
    (base / "README.md").write_text("---\nlicense: [\n---\n")  # a broken card is none
    assert card_of(tmp_path / "run", base=str(base)).data.license_name == "unknown"


def test_an_adapter_says_how_it_becomes_a_model(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", nano_path(), lora_rank=8)
    write_run_card(run, run, nano_path(), "run", is_adapter=True)
    card = ModelCard.load(run / "README.md")
    assert "fusion-hf merge --model path/to/run --output run-merged --base" in card.text and "lora" in card.data.tags
    assert "from_pretrained" not in card.text


def test_an_adapter_without_its_run(tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    folder.mkdir()
    (folder / "config.json").write_bytes((Path(nano_path()) / "config.json").read_bytes())
    write_run_card(folder, tmp_path / "nothing", nano_path(), "merged")
    assert "came without the recipe" in (folder / "README.md").read_text()


def test_lines_of_one_evaluation_are_one_row() -> None:
    assert find_evaluations(EVALUATIONS) == {
        0: {"loss": 2.5, "accuracy": 0.125},
        10: {"loss": 0.5, "accuracy": 0.975},
    }


def test_a_long_run_shows_its_first_and_last_evaluations(tmp_path: Path) -> None:
    log = [{"step": step, "eval_loss": 1.0} for step in range(0, 1000, 10)]
    text = card_of(make_run(tmp_path / "run", nano_path(), log=log)).text
    steps = [int(line.split()[1]) for line in text.splitlines() if line.endswith("| 1 |")]
    assert steps[0] == 0 and steps[1:] == list(range(890, 1000, 10))
