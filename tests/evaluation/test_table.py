"""The Markdown table of runs, without lmms-eval: cells, marks, several records, and the command."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fusion_hf.cli import main
from fusion_hf.cli.evaluate import _describe
from fusion_hf.common.errors import InputError
from fusion_hf.common.outputs import json_bytes
from fusion_hf.evaluation.benchmarks import BENCHMARKS
from fusion_hf.evaluation.results_table import make_table
from fusion_hf.evaluation.run_record import Metric, ModelRecord, RunRecord, TaskRecord
from fusion_hf.hub.family import published_rows

PUBLISHED = published_rows()["FUSION 3B"]
MODEL = ModelRecord("my|model", "my@1", "bfloat16", "cuda:0", 36, 27, "FUSION 3B")
N = 100


def scored(name: str, *values: float, **others) -> TaskRecord:
    metrics = zip(BENCHMARKS[name].metrics, values, strict=True)
    task = TaskRecord(name, name, "scored", N, N, metrics=tuple(Metric(key, value, None) for key, value in metrics))
    return replace(task, **others)


def failed(name: str) -> TaskRecord:
    return TaskRecord(name, name, "failed", reason="RequestsFailed: 1 requests failed: <image> | broken")


def make_run(*tasks: TaskRecord, model: ModelRecord = MODEL, prompts: str = "authors") -> RunRecord:
    return RunRecord(["fusion-hf"], model, prompts, None, 1, 1, None, list(tasks))


def rows_of(table: str) -> dict[str, dict[str, str]]:
    """First cell -> column -> cell; an escaped bar divides nothing."""
    lines = [line.replace(r"\|", "/") for line in table.splitlines() if line.startswith("|")]
    header, ruler, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(len(row) == len(header) for row in (ruler, *rows))
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


def test_columns_are_the_published_ones_in_their_order():
    header = make_table([make_run()]).splitlines()[0]
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["model", "vision tokens", *PUBLISHED.values]


def test_our_row_stands_between_the_published_one_and_the_difference():
    rows = rows_of(make_table([make_run(scored("pope", 0.8871), scored("mme", 1600.04, 416.5))]))
    assert list(rows) == ["FUSION 3B, published", "my/model, measured", "difference"]
    published, ours, difference = rows.values()
    assert published["vision tokens"] == "780"
    assert [published["POPE"], published["MME^P"], published["MME^C"]] == ["88.9", "1595.9", "416.5"]
    assert [ours["POPE"], ours["MME^P"], ours["MME^C"]] == ["88.7", "1600.0", "416.5"]
    assert [difference["POPE"], difference["MME^P"], difference["MME^C"]] == ["-0.2", "+4.1", "+0.0"]


@pytest.mark.parametrize("name", [name for name, one in BENCHMARKS.items() if one.columns])
def test_the_published_figures_measured_again_differ_by_nothing(name: str):
    benchmark = BENCHMARKS[name]
    figures = [PUBLISHED.values[column] / benchmark.scale for column in benchmark.columns]
    rows = rows_of(make_table([make_run(scored(name, *figures))]))
    for column in benchmark.columns:
        assert rows["my/model, measured"][column] == rows["FUSION 3B, published"][column]
        assert rows["difference"][column] == "+0.0"


def test_a_difference_too_small_to_print_has_no_minus():
    rows = rows_of(make_table([make_run(scored("docvqa", 0.939))], published="Qwen2.5VL 3B"))  # of two decimals
    assert [row["DocVQA"] for row in rows.values()] == ["93.93", "93.9", "+0.0"]


def test_what_was_not_run_has_no_figure():
    rows = rows_of(make_table([make_run(scored("pope", 0.5))]))
    for row in ("my/model, measured", "difference"):
        assert {cell for column, cell in rows[row].items() if column != "POPE"} == {"—"}


def test_what_failed_says_so_and_why():
    table = make_table([make_run(failed("mme"))])
    ours, difference = rows_of(table)["my/model, measured"], rows_of(table)["difference"]
    assert ours["MME^P"] == ours["MME^C"] == "failed [1]"
    assert difference["MME^P"] == difference["MME^C"] == "—"
    assert r"- [1] `mme`: failed: RequestsFailed: 1 requests failed: &lt;image> \| broken" in table


def test_marks_say_what_is_not_as_the_authors_did():
    tasks = [
        scored("mmbench_en", 79.0),
        scored("pope", 0.5, n=20),
        scored("mmvet", 57.0, n=30, judge="gpt-4o-2024-11-20"),
        scored("mmstar", 0.5),
    ]
    table = make_table([make_run(*tasks, prompts="lmms-eval")])
    ours = rows_of(table)["my/model, measured"]
    assert [ours[name] for name in ("MMB_EN", "POPE", "MM-Vet", "MMStar")] == [
        "79.0 [1]",
        "50.0 [2]",
        "57.0 [3]",
        "50.0",  # whose prompt is the same
    ]
    assert [line for line in table.splitlines() if line.startswith("- ")] == [
        "- [1] `mmbench_en`: prompt of lmms-eval, not the authors'",
        "- [2] `pope`: 20 of 100 questions",
        "- [3] `mmvet`: 30 of 100 questions; judged by gpt-4o-2024-11-20",
    ]
    assert rows_of(table)["difference"]["MMB_EN"] == "-0.5 [1]"


def test_tasks_without_a_column_stand_below():
    written = TaskRecord("docvqa_test", "t", "submission written", N, N, submission="submissions/docvqa_test.json")
    table = make_table([make_run(scored("easy_vqa", 0.9812, n=50), written)])
    assert "- `easy_vqa`: exact_match 98.1; 50 of 100 questions" in table
    assert "- `docvqa_test`: submission written, 100 answers in submissions/docvqa_test.json, no score" in table
    assert set(rows_of(table)["my/model, measured"].values()) == {"—"}


def test_a_model_of_other_sizes_has_a_row_alone_until_one_is_named():
    run = make_run(scored("pope", 0.5), model=replace(MODEL, published=None))
    table = make_table([run])
    assert list(rows_of(table)) == ["my/model, measured"]
    assert "No published model has these sizes" in table
    table = make_table([run], published="Qwen2VL 7B")
    assert rows_of(table)["difference"]["POPE"] == "-38.4"
    assert rows_of(table)["Qwen2VL 7B, published"]["VizWiz"] == "—"


def test_peers_are_those_of_its_size():
    named = list(rows_of(make_table([make_run()], peers=True)))
    assert named[-3:] == ["FUSION 3B, published", "my/model, measured", "difference"]
    assert named[:-3] == [row.name for row in published_rows().values() if row.group == "<=4B" and row != PUBLISHED]
    alone = make_run(model=replace(MODEL, published=None))
    assert list(rows_of(make_table([alone], peers=True)))[:-1] == list(published_rows())


def test_of_several_runs_the_last_counts():
    first = make_run(scored("pope", 0.5), scored("mmstar", 0.4))
    second = make_run(scored("pope", 0.6, n=3), model=replace(MODEL, device="cpu"))
    ours = rows_of(make_table([first, second]))["my/model, measured"]
    assert (ours["POPE"], ours["MMStar"]) == ("60.0 [1]", "40.0")


def test_a_model_that_a_server_has_is_named_with_its_place():
    url = "http://127.0.0.1:8000/v1"
    table = make_table([make_run(scored("pope", 0.8), model=replace(MODEL, url=url))])
    assert f"Measured: my\\|model (my@1) at {url}, bfloat16 on cuda:0, 729 image tokens, 36 latents." in table
    silent = ModelRecord("a", f"a at {url}", "unknown", "unknown", None, None, url=url)
    table = make_table([make_run(scored("pope", 0.8), model=silent)])
    assert "unknown on unknown, with the image tokens and latents of its server." in table


def test_runs_of_several_models_are_refused():
    other = replace(MODEL, revision="my@2")
    with pytest.raises(InputError, match="All records must have the same revision, got 'my@1' and 'my@2'"):
        make_table([make_run(), make_run(model=other)])


@pytest.fixture
def record(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(
        "fusion_hf.evaluation.run_record.PACKAGES", ("transformers",)
    )  # lmms-eval need not be installed
    return make_run(scored("pope", 0.5), failed("mme")).write(tmp_path)


def test_a_record_is_read_as_it_was_written(record):
    assert RunRecord.read(record) == make_run(scored("pope", 0.5), failed("mme"))


def test_command_makes_a_table_of_records(record, capsys):
    other = make_run(scored("mme", 1500.0, 400.0)).write(record.parent)
    assert main(["evaluate", "--table", str(record), str(other), "--published", "FUSION-X 3B", "--peers"]) == 0
    printed = capsys.readouterr().out
    records = [RunRecord.read(record), RunRecord.read(other)]
    assert printed == make_table(records, "FUSION-X 3B", peers=True)
    assert rows_of(printed)["difference"]["MME^C"] == "-40.0"


def test_a_run_as_json(record):
    content = json.loads(json_bytes(_describe(RunRecord.read(record), record, record.with_suffix(".md"))))
    assert (content["record"], content["table"]) == (str(record), str(record.with_suffix(".md")))
    stored = json.loads(record.read_text(encoding="utf-8"))["tasks"]
    assert [(task["task"], task["metrics"]) for task in content["tasks"]] == [
        (task["task"], task["metrics"]) for task in stored
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table", "RECORD", "--published", "FUSION 4B"], "--published must be one of Qwen2.5VL 3B, "),
        (["--tasks", "easy_vqa", "--published", "3B"], "--published must be one of "),
        (["--table", "RECORD", "--tasks", "pope"], "`--tasks` cannot be combined with `--table`, got 'pope'"),
        (["--table", "RECORD", "--json"], "`--json` cannot be combined with `--table`"),
        (["--table", "nothing.json"], "nothing.json is not a record of `fusion-hf evaluate`"),
        (["--table", "OLD"], "old.json must be 2, got 1."),
        (["--table", "TEXT"], "text.json is not a record"),
    ],
)
def test_wrong_arguments_of_tables(record, arguments, message, capsys):
    names = {
        "RECORD": str(record),
        "OLD": str(record.with_name("old.json")),
        "TEXT": str(record.with_name("text.json")),
    }
    Path(names["OLD"]).write_text('{"format": 1, "tasks": []}', encoding="utf-8")
    Path(names["TEXT"]).write_text("[1]", encoding="utf-8")
    assert main(["evaluate", *(names.get(word, word) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
