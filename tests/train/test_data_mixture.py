"""Mixture files: what is taken from which file, in which order; the published ones are as they were published."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from tests.helpers.training_data import make_image, write_json, write_tar

from fusion_hf.common.errors import InputError
from fusion_hf.data import load_records
from fusion_hf.data.mixture import Strategy, read_entries

CONFIGS = Path(__file__).parents[2] / "configs" / "data"
PUBLISHED = {
    "stage1": """
        LLaVA-Pretrain-558k ShareCaptioner-1246k URSA_Alignment-860k SynthColor-244k SynthCount-300k SynthScene-268k
        SynthSpatial-300k SynthTextVQA-400k PixelProse-5500k""",
    "stage1.5": """
        ALLaVA_Cap-700k DataEngine-160k DVQA-100k GPT4Rewrote-137k LVISInstruct4V-220k MulBerry-100k
        PixmoAskModelAnything-70k PixmoCap-640k PixmoCapQA-160k PixmoDoc-250k QInstruct-400k SynthMultiChoice-200k
        SynthContrastLong-70k SynthContrastShort-70k SynthConvLong-200k SynthConvShort-200k SynthDog-300k
        SynthReasoning-70k SynthTextQA-100k MMathCoT-200k MathInstruct-100k OpenOrca-100k""",
    "stage2": """
        AI2D-15k DVQA-120k FinQA-5k ALLaVA_QA-700k ArxivQA-100k Chart2Text-25k ChartQA-28k DocVQA-39k CLEVR-150k
        DataEngine-160k GeoQA-170k GPT4V-8k LLaVA-Finetune-665k MathVision-4k PathVQA-32k PixmoDoc-250k ScienceQA-6k
        ScreenQA-80k ShareGPT4V-90k SynthDog-200k SynthMultiChoice-450k SynthConvLong-150k SynthConvShort-250k
        VizWiz-20k MMathCoT-640k OpenOrca-200k MulBerry-270k LNQA-300k TallyQA-100k DocMatix-920k ALLaVA_Cap-250k
        PixmoCap-150k TextVQA-23k GeomVerse-9k HiTab-2k IconQA-27k InfoVQA-2k LLaVAR-20k RAVEN-42k VisText-10k
        RenderedText-10k ST_VQA-17k TabMWP-23k TAT-QA-2k Visual7w-14k Visualmrc-3k WikiSQL-75k WTQ-38k""",
}
TOTALS = {"stage1": (9, 9_676_000), "stage1.5": (22, 4_547_000), "stage2": (48, 6_864_000)}


def make_file(path: Path, count: int) -> None:
    """Text-only records whose ids are the file's name and their number."""
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    write_json(path, [{"id": f"{path.stem}{number}", "conversations": turns} for number in range(count)])


def write_mixture(folder: Path, *entries: dict) -> Path:
    file = folder / "mixture.yaml"
    file.write_text(yaml.safe_dump({"datasets": list(entries)}), encoding="utf-8")
    return file


def ids(folder: Path, *entries: dict, **arguments) -> list[str]:
    records = load_records(write_mixture(folder, *entries), cache=folder / "cache", **arguments)
    return [records[number]["id"] for number in range(len(records))]


@pytest.mark.parametrize("stage", PUBLISHED)
def test_published_mixtures(stage: str):
    entries = read_entries(CONFIGS / f"{stage}.yaml")
    names = [f"{name}.json" for name in PUBLISHED[stage].split()]
    assert [entry.json_path for entry in entries] == names
    assert {entry.sampling_strategy for entry in entries} == {Strategy()}
    sizes = [int(re.fullmatch(r".*-(\d+)k\.json", entry.json_path)[1]) * 1000 for entry in entries]
    assert (len(sizes), sum(sizes)) == TOTALS[stage]
    stages = yaml.safe_load((CONFIGS / f"{stage}.yaml").read_text(encoding="utf-8"))
    assert all(set(entry) == {"json_path", "sampling_strategy"} for entry in stages["datasets"])


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("all", range(7)),
        ("first:3", range(3)),
        ("end:2", range(5, 7)),
        ("first:50%", range(4)),  # rounded up
        ("end:1%", range(6, 7)),
        ("first:14.3%", range(2)),  # 1.001
        ("first:100%", range(7)),
        ("end:7", range(7)),
        ("random:7", range(7)),
    ],
)
def test_strategies(tmp_path: Path, strategy: str, expected: range):
    make_file(tmp_path / "a.json", 7)
    taken = ids(tmp_path, {"json_path": "a.json", "sampling_strategy": strategy})
    assert taken == [f"a{number}" for number in expected]


def test_random_records_are_different_ones_and_seeded(tmp_path: Path):
    make_file(tmp_path / "a.json", 100)
    entry = {"json_path": "a.json", "sampling_strategy": "random:30%"}
    one, again, other = (ids(tmp_path, entry, seed=seed) for seed in (1, 1, 2))
    assert one == again != other
    assert len(set(one)) == len(one) == 30
    assert one == sorted(one, key=lambda name: int(name[1:]))
    twice = ids(tmp_path, entry, entry, seed=1)
    assert twice[:30] == one != twice[30:]  # each entry draws its own


def test_random_numbers_take_four_bytes_each():
    rows = Strategy.from_yaml("random:50%").rows(1_000_001, (0, 0), "here")
    assert isinstance(rows, np.ndarray) and rows.dtype == np.uint32
    assert len(rows) == 500_001 and np.all(np.diff(rows.astype(np.int64)) > 0)


def test_files_are_taken_in_their_order(tmp_path: Path):
    make_file(tmp_path / "b.json", 3)
    make_file(tmp_path / "a.json", 2)
    entries = {"json_path": "b.json", "sampling_strategy": "first:2"}, {"json_path": "a.json"}, {"json_path": "b.json"}
    assert ids(tmp_path, *entries) == ["b0", "b1", "a0", "a1", "b0", "b1", "b2"]


def test_a_strategy_goes_over_all_shards(tmp_path: Path):
    (tmp_path / "shards").mkdir()
    for shard, numbers in enumerate((range(2), range(2, 5), range(5, 7))):
        write_tar(tmp_path / "shards" / f"{shard}.tar", numbers)
    take = [
        ids(tmp_path, {"json_path": "shards", "sampling_strategy": text}) for text in ("end:3", "first:3", "random:5")
    ]
    assert take[0] == ["id4", "id5", "id6"]
    assert take[1] == ["id0", "id1", "id2"]
    assert take[2] == sorted(take[2]) and len(set(take[2])) == 5


def test_images_of_an_entry_have_their_root(tmp_path: Path):
    (tmp_path / "other").mkdir()
    make_image(2).save(tmp_path / "other" / "x.png")
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    (tmp_path / "lists").mkdir()
    write_json(tmp_path / "lists" / "a.json", [{"id": "a", "image": "x.png", "conversations": turns}])
    mixture = write_mixture(tmp_path / "lists", {"json_path": "lists/a.json", "image_root": "other"})
    records = load_records(mixture, root=tmp_path, cache=tmp_path / "cache")
    assert records[0]["image"].size == make_image(2).size


@pytest.mark.parametrize(
    "strategy",
    [
        "",
        "half",
        "first",
        "first:",
        "first:0",
        "first:-1",
        "first:1.5",
        "end:0%",
        "end:101%",
        "random:5k",
        "last:3",
        5,
        None,
    ],
)
def test_no_strategy(tmp_path: Path, strategy):
    make_file(tmp_path / "a.json", 2)
    with pytest.raises(
        InputError, match=r"mixture.yaml, entry 1: .*sampling_strategy.*all, first:N, end:N or random:N"
    ):
        ids(tmp_path, {"json_path": "a.json", "sampling_strategy": strategy})


def test_more_records_than_there_are(tmp_path: Path):
    make_file(tmp_path / "a.json", 2)
    with pytest.raises(InputError, match=r"entry 1: `sampling_strategy` must take at most 2 records.*got 'first:3'"):
        ids(tmp_path, {"json_path": "a.json", "sampling_strategy": "first:3"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must contain `datasets"),
        ("- a.json", "must contain `datasets"),
        ("datasets: []", "must contain `datasets"),
        ("datasets: [{json_path: a.json}]\nmore: 1", "and nothing else"),
        ("datasets: [{sampling_strategy: all}]", "entry 1 has no json_path"),
        ("datasets: [{json_path: 5}]", "entry 1: .json_path.*text, got 5"),
        (
            "datasets: [{json_path: a.json, sampling_stategy: all}]",
            "entry 1 has the unknown key 'sampling_stategy'.*Allowed: json_path",
        ),
        ("datasets: [{json_path: a.json, image_root: 5}]", "image_root.*text, got 5"),
        ("datasets: [{json_path: none.json}]", "entry 1: .*does not exist"),
        ("datasets: [", "is not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_no_mixture(tmp_path: Path, content: str, message: str):
    file = tmp_path / "mixture.yaml"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_records(file, cache=tmp_path / "cache")


def test_a_missing_mixture(tmp_path: Path):
    with pytest.raises(InputError, match=r"none.yaml cannot be read: No such file"):
        load_records(tmp_path / "none.yaml")
