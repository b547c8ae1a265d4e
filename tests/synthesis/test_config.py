"""Configs of a run: what is read, and which errors name what."""

from pathlib import Path

import pytest
import yaml

from fusion_hf.common.errors import InputError
from fusion_hf.synthesis.category import load_categories
from fusion_hf.synthesis.run_config import load_config

FOLDER = Path(__file__).parents[2] / "configs" / "synthesis"
POOL = {"source": "captions.txt", "kind": "text"}
WRITER = {"model": "m", "url": "http://localhost:8000"}
IMAGES = {"kind": "diffusers", "model": "black-forest-labs/FLUX.1-dev"}
MINIMAL = {"output": "runs/x", "records": 10, "pool": POOL, "writer": WRITER, "images": IMAGES}


def write(folder: Path, values: object) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_defaults_and_shares(tmp_path: Path):
    config = load_config(write(tmp_path, MINIMAL))
    assert config.executor.kind == "local" and config.writer.structured == "json_schema"
    assert set(config.shares) == set(load_categories()) and sum(config.shares.values()) == pytest.approx(1)


def test_shares_of_a_choice_add_up_to_one(tmp_path: Path):
    config = load_config(write(tmp_path, {**MINIMAL, "categories": {"SynthColor": 1, "SynthText": 3}}))
    assert config.shares == {"SynthColor": 0.25, "SynthText": 0.75}


def test_overrides_reach_into_sections(tmp_path: Path):
    overrides = ["records=7", "writer.temperature=1e-1", "executor.tasks=4", "judge.model=j", "judge.url=https://h/v1"]
    config = load_config(write(tmp_path, MINIMAL), overrides)
    assert (config.records, config.writer.temperature, config.executor.tasks) == (7, 0.1, 4)
    assert config.judge.model == "j"


def changed(section: str | None, **values: object) -> dict[str, object]:
    if section is None:
        return {**MINIMAL, **values}
    return {**MINIMAL, section: {**MINIMAL.get(section, {}), **values}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed(None, recods=3), r"key 'recods'. Did you mean 'records'"),
        (changed("writer", modle="x"), r"config.yaml: writer has the unknown key 'modle'. Did you mean 'model'"),
        (changed("writer", temperature="hot"), r"writer.temperature.*a number.*got 'hot'"),
        (changed("writer", tries=True), r"writer.tries.*a whole number.*got True"),
        (changed("writer", tries=0), r"tries.*more than 0.*got 0"),
        (changed("writer", url="ftp://host"), r"url.*http://HOST.*got 'ftp://host'"),
        (
            changed("writer", url="https://name:secret@host"),
            r"url must have only a scheme.* key by key_variable",
        ),
        (changed("writer", url=None), r"`url` must be given .*got None for 'endpoint'"),
        (changed("writer", server="vllm"), r"`url` must be given .*got 'http://localhost:8000' for 'vllm'"),
        (changed("writer", structured="xml"), r"structured.*'json_schema', 'json_object', 'prompt'.*got 'xml'"),
        (changed("pool", kind="csv"), r"pool.kind.*'text', 'jsonl', 'parquet', 'hub'.*got 'csv'"),
        (changed("images", kind="openai"), r"`url` must be given .*got None for 'openai'"),
        (changed(None, pool=None), r"`pool` must be given for the backend `models`"),
        (
            changed(None, categories={"SynthColour": 1}),
            r"`categories` must contain only names from Synth.*got 'SynthColour'",
        ),
        (changed(None, categories={"SynthColor": 0}), r"`categories.SynthColor` must be above 0, got 0.0"),
        (changed(None, records=0), r"records.*more than 0.*got 0"),
        (
            changed(None, executor={"kind": "slurm"}),
            r"`options` must have time and partition for Slurm, but lacks time",
        ),
        (
            changed(None, executor={"options": {"time": "1"}}),
            r"`options` and `stages` must be empty unless `kind` is slurm or ray",
        ),
        (changed(None, executor={"workers": 0}), r"`workers` must be 1 or more, or -1 .*got 0"),
        (changed(None, image_check={}), r"exactly one of `endpoint` and `fusion`"),
        ({"records": 3}, r"config.yaml has no output"),
        (["records"], r"must be a mapping of keys to values, got a list"),
    ],
)
def test_errors_name_key_value_and_what_is_allowed(values: object, message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        load_config(write(tmp_path, values))


@pytest.mark.parametrize("text", ["a: [", "\x00", "!!python/object/apply:os.getcwd []"])
def test_what_is_no_yaml(text: str, tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="is not valid YAML"):
        load_config(path)


def test_an_override_needs_a_value(tmp_path: Path):
    with pytest.raises(InputError, match="An override must be"):
        load_config(write(tmp_path, MINIMAL), ["records"])
    with pytest.raises(InputError, match=r"`records` must be a section to set records.x, got 10"):
        load_config(write(tmp_path, MINIMAL), ["records.x=1"])


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configs_of_the_project_are_configs(path: Path):
    config = load_config(path)
    names = set(config.shares)
    assert names == (set(load_categories()) if path.stem == "mix" else {path.stem})


def test_there_is_a_config_for_each_category():
    names = {path.stem for path in FOLDER.glob("Synth*.yaml")}
    assert names == set(load_categories())
