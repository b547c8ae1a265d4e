"""Local data: what is there, what is wrong with it, and what it must not do. Without lmms-eval."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from tests.evaluation.rows import RED, ROWS, png, write_rows

from fusion_hf.common.errors import InputError
from fusion_hf.evaluation.benchmark_data import check_data, fits, prepare_tasks
from fusion_hf.evaluation.benchmarks import BENCHMARKS, JUDGE_VARIABLES, VARIANTS
from fusion_hf.evaluation.tasks.local_rows import IMAGE_TYPE, local_images

PUBLISHED = [name for name, benchmark in BENCHMARKS.items() if benchmark.columns]
COLUMNS = (
    "MMB_EN MMB_CN VizWiz POPE MM-Vet MME^P MME^C Seed-Image HallB LLaVA_W MMStar MME-RW RWQA CV-Bench MMVP AI2D "
    "MathVista MMMU SQA TextVQA OCRBench ChartQA DocVQA"
)


def test_table_has_its_columns_in_order():
    assert [column for name in PUBLISHED for column in BENCHMARKS[name].columns] == COLUMNS.split()
    assert len(PUBLISHED) == 22
    assert set(BENCHMARKS) - set(PUBLISHED) == {"easy_vqa"}


@pytest.mark.parametrize("name", [*BENCHMARKS, *VARIANTS])
def test_benchmark_is_consistent(name: str):
    benchmark = {**BENCHMARKS, **VARIANTS}[name]
    assert benchmark.name == name
    assert len(benchmark.metrics) == len(benchmark.columns) or not benchmark.columns
    assert (benchmark.source is None) == (benchmark.lmms_task is None) == (benchmark.dataset is None)


def test_judge_is_the_environments_unless_it_is_fixed():
    environment = {"MODEL_VERSION": "mine"}
    assert [BENCHMARKS["mmvet"].judge.asked(given) for given in ({}, environment)] == ["gpt-4o-2024-11-20", "mine"]
    assert BENCHMARKS["hallusion_bench_image"].judge.asked(environment) == "gpt-4"


def test_judge_says_what_it_lacks():
    judge = BENCHMARKS["hallusion_bench_image"].judge
    assert judge.lacks({}) == ["OPENAI_API_KEY is not set"]
    assert judge.lacks({"OPENAI_API_KEY": "key"}) == []
    assert judge.lacks({"API_TYPE": "azure", "AZURE_API_KEY": "key"}) == ["AZURE_ENDPOINT is not set"]
    assert judge.lacks({"API_TYPE": "local"}) == ["API_TYPE must be one of openai, azure, got 'local'"]
    for name in PUBLISHED:
        if BENCHMARKS[name].judge is not None:
            assert set(BENCHMARKS[name].judge.api_types) <= set(JUDGE_VARIABLES)


@pytest.fixture
def root(tmp_path) -> Path:
    """All benchmarks' made-up rows."""
    for name in PUBLISHED:
        write_rows(BENCHMARKS[name], tmp_path)
    return tmp_path


def test_complete_data_have_no_problem(root):
    assert check_data(list(BENCHMARKS), root) == []


def test_nothing_is_checked_without_a_data_root():
    assert check_data(PUBLISHED, None) == []


def problems(name: str, root: Path) -> list[tuple[str, str | None, str | None]]:
    found = check_data([name], root)
    assert {problem.benchmark for problem in found} <= {name}
    return [(problem.message, problem.file, problem.column) for problem in found]


def test_missing_folder_and_missing_file_are_named(tmp_path):
    assert problems("pope", tmp_path) == [(f"the folder {tmp_path / 'pope'} does not exist", None, None)]
    (tmp_path / "pope").mkdir()
    assert problems("pope", tmp_path) == [
        (f"{tmp_path / 'pope'} must contain files test-*.parquet, got none", None, None)
    ]


def rewrite(file: Path, change) -> None:
    pyarrow.parquet.write_table(change(pyarrow.parquet.read_table(file)), file)


def test_missing_column_and_other_kind_are_named_with_their_file(tmp_path):
    file = write_rows(BENCHMARKS["chartqa"], tmp_path)
    rewrite(file, lambda table: table.drop_columns(["type"]).set_column(1, "question", pa.array([1] * 4)))
    assert problems("chartqa", tmp_path) == [
        (f"{file}: column 'type' is missing", str(file), "type"),
        (f"{file}: column 'question' must be text, got int64", str(file), "question"),
    ]


def test_every_file_of_a_split_is_checked(tmp_path):
    file = write_rows(BENCHMARKS["pope"], tmp_path)
    second = file.with_name("test-00001-of-00002.parquet")
    second.write_bytes(file.read_bytes())
    rewrite(second, lambda table: table.drop_columns(["answer"]))
    assert [(file, column) for _, file, column in problems("pope", tmp_path)] == [(str(second), "answer")]


def test_no_rows_and_no_parquet_are_named(tmp_path):
    file = write_rows(BENCHMARKS["pope"], tmp_path)
    rewrite(file, lambda table: table.slice(0, 0))
    assert problems("pope", tmp_path) == [(f"{file} has no rows", str(file), None)]
    file.write_bytes(b"not Parquet at all")
    ((message, where, _),) = problems("pope", tmp_path)
    assert message.startswith(f"{file} cannot be read as Parquet") and where == str(file)


@pytest.mark.parametrize("kind", ["text", "image", "texts", "text|integer"])
def test_column_of_nulls_fits_only_what_is_optional(kind: str):
    assert not fits(pa.null(), kind)
    assert fits(pa.null(), f"{kind}?")


def test_kinds():
    assert fits(pa.large_string(), "text") and not fits(pa.binary(), "text")
    assert fits(pa.list_(pa.string()), "texts") and not fits(pa.string(), "texts")
    assert fits(pa.int32(), "text|integer") and fits(pa.string(), "text|integer")
    assert not fits(pa.float64(), "text|integer")
    assert fits(IMAGE_TYPE, "image") and not fits(IMAGE_TYPE, "record")
    assert fits(pa.list_(IMAGE_TYPE), "images") and not fits(IMAGE_TYPE, "images")


def test_file_that_leads_out_of_the_data_root_is_refused(tmp_path):
    outside = write_rows(BENCHMARKS["pope"], tmp_path / "elsewhere")
    link = tmp_path / "root/pope/test-0.parquet"
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    assert problems("pope", tmp_path / "root") == [(f"{link} points outside the data root", str(link), None)]
    with pytest.raises(InputError, match=r"pope: .+points outside the data root"):
        prepare_tasks(["pope"], "authors", tmp_path / "root", tmp_path)


def test_folder_that_leads_out_of_the_data_root_is_refused(tmp_path):
    write_rows(BENCHMARKS["pope"], tmp_path / "elsewhere")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/pope").symlink_to(tmp_path / "elsewhere/pope")
    assert "points outside the data root" in problems("pope", tmp_path / "root")[0][0]


@pytest.mark.parametrize("name", ["test-[0].parquet", "test-zip::x.parquet", "test-*.parquet"])
def test_file_name_that_is_more_than_a_name_is_refused(tmp_path, name: str):
    file = write_rows(BENCHMARKS["pope"], tmp_path)
    file.rename(file.with_name(name))
    assert "file names may have letters" in problems("pope", tmp_path)[0][0]


def test_data_root_that_is_a_pattern_is_refused(tmp_path):
    write_rows(BENCHMARKS["pope"], tmp_path / "a[b]")
    assert "must not contain * ? [ ] or ::" in problems("pope", tmp_path / "a[b]")[0][0]


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"`tasks` must contain only names from mmbench_en, .*got 'nothing'"):
        check_data(["nothing"], tmp_path)
    with pytest.raises(InputError, match="`prompts` must be authors or lmms-eval, got 'mine'"):
        prepare_tasks(["pope"], "mine", None, tmp_path)


def read_images(tmp_path: Path, images: list, kind: pa.DataType) -> datasets.Dataset:
    """A column of images from a Parquet file, as a task gets it."""
    file = tmp_path / "test-0.parquet"
    pyarrow.parquet.write_table(pa.table({"image": pa.array(images, kind), "question": ["what?"] * len(images)}), file)
    cache = str(tmp_path / "cache")
    return local_images(datasets.load_dataset("parquet", data_files=[str(file)], split="train", cache_dir=cache))


def test_images_inside_are_decoded(tmp_path):
    square = {"bytes": png(RED), "path": "any.png"}
    dataset = read_images(tmp_path, [square, None, square], IMAGE_TYPE)
    assert [image and image.size for image in dataset["image"]] == [(48, 48), None, (48, 48)]
    assert list(dataset["question"]) == ["what?"] * 3


def test_lists_of_images_are_decoded(tmp_path):
    square = {"bytes": png(RED), "path": None}
    dataset = read_images(tmp_path, [[square], [], None, [square, square]], pa.list_(IMAGE_TYPE))
    assert [None if row is None else len(row) for row in dataset["image"]] == [1, 0, None, 2]
    assert dataset[3]["image"][1].size == (48, 48)


@pytest.mark.parametrize("listed", [False, True])
def test_image_named_elsewhere_is_not_opened(tmp_path, listed: bool):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(RED))
    named = {"bytes": None, "path": str(secret)}
    images, kind = ([[named]], pa.list_(IMAGE_TYPE)) if listed else ([named], IMAGE_TYPE)
    dataset = read_images(tmp_path, images, kind)
    with pytest.raises(ValueError, match="both are None"):
        dataset[0]


def test_column_that_a_file_declares_images_opens_no_file(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(RED))
    declared = json.dumps({"info": {"features": {"question": {"_type": "Image"}}}})
    table = pa.table({"question": pa.array([{"bytes": None, "path": str(secret)}], IMAGE_TYPE)})
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": declared}), tmp_path / "test-0.parquet")
    files, cache = [str(tmp_path / "test-0.parquet")], str(tmp_path / "cache")
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
    assert loaded[0]["question"].size == (48, 48)  # as `datasets` would have it
    with pytest.raises(ValueError, match="both are None"):
        local_images(loaded)[0]


def test_made_up_rows_are_of_the_published_table():
    assert list(ROWS) == PUBLISHED


def test_documents_have_the_table():
    text = (Path(__file__).parents[2] / "docs/evaluation_tasks.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("| `")]
    figures = {name: [metric.partition(",")[0] for metric in BENCHMARKS[name].metrics] for name in PUBLISHED}
    expected = [
        [f"`{name}`", ", ".join(one.columns), f"`{one.lmms_task}`", ", ".join(f"`{key}`" for key in figures[name])]
        for name, one in BENCHMARKS.items()
        if one.columns
    ]
    assert [row[1:5] for row in rows[: len(PUBLISHED)]] == expected
