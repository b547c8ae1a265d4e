"""`benchmarks/token_budget.py`: its settings are what they are called, and its results become tables and a plot."""

import json
import re

import budget_report
import pytest
import token_budget
import torch
from blocks import load_results, replace_block
from budget_report import ACCURACY, DOCUMENT, NOT_MEASURED, PLOT, RESULTS, TIMES, panels_of, render_accuracy, share
from budget_report import update as update_document
from plot import draw
from token_budget import PARTS, QUERY_LENS, Times, budgets_of, choose_records, grids_of, main
from workload import SIZES

ROUNDS, QUESTIONS, DRAWN = 2, 4, 1
LENGTHS = (4, 16)
FLAGS = ["--size", "tiny", "--query-lens", *LENGTHS, "--repeats", ROUNDS, "--questions", QUESTIONS, "--drawn", DRAWN]


def run(output, *flags):
    main([*map(str, [*FLAGS, *flags]), "--threads", str(torch.get_num_threads()), "--output", str(output)])
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """One part after the other, into the same file."""
    output = tmp_path_factory.mktemp("budget") / "results" / "tiny.json"
    times = run(output, "--only", "times")
    assert times.keys() == {"times"}
    both = run(output, "--only", "accuracy")
    assert both["times"] == times["times"]
    return both


def test_grids():
    assert grids_of(27) == [27, 16, 9, 4]  # the second is FUSION-L's
    assert grids_of(6) == [6, 4, 2, 1]
    assert grids_of(1) == [1]
    budgets = budgets_of(27, QUERY_LENS)
    assert len(budgets) == len(set(budgets.values())) == 4 * len(QUERY_LENS)


@torch.inference_mode()
def test_the_parts_of_the_first_token_are_the_prompt():
    """What is timed as image and language model is what `forward` does, with the setting's tokens."""
    times = Times(SIZES["tiny"], torch.float32, torch.device("cpu"), LENGTHS)
    for name, budget in times.budgets.items():
        prompt = times.embed(name)
        assert prompt.image_features.shape[1] == budget.num_image_tokens
        assert prompt.latent_updates.latent_positions.shape[-1] == budget.query_len
        output, cache = times.prefill(name), times.read(prompt)
        for ours, theirs in zip(cache.layers, output.past_key_values.layers, strict=True):
            torch.testing.assert_close(ours.keys, theirs.keys)
    assert times.budgets[times.default] == (SIZES["tiny"].query_len, 4)


def test_records_are_test_questions():
    records = choose_records(QUESTIONS, DRAWN)
    assert [record.category for record in records] == ["easy-vqa"] * QUESTIONS + ["count", "spatial", "text"]
    assert all("/test/" in record.key for record in records)
    assert [record.key for record in choose_records(QUESTIONS, DRAWN)] == [record.key for record in records]


def test_result(result):
    times, accuracy = result["times"], result["accuracy"]
    assert accuracy["asked"] == {"count": DRAWN, "easy-vqa": QUESTIONS, "spatial": DRAWN, "text": DRAWN}
    for part, side in ((times, 4), (accuracy, 6)):
        settings = {(row["query_len"], row["image_token_grid"]) for row in part["rows"]}
        assert settings == {(length, grid) for length in LENGTHS for grid in grids_of(side)}
    assert all(0 <= row["right"][name] <= accuracy["asked"][name] for row in accuracy["rows"] for name in row["right"])
    for row in times["rows"]:
        # two tensors of 4-byte numbers, 64 wide, in each of 3 layers
        assert row["cache_bytes"] == row["prompt_tokens"] * 2 * 4 * 64 * 3
        assert row["first_token_allocated_bytes"] > row["language_allocated_bytes"] > row["cache_bytes"]
    default = next(row for row in times["rows"] if (row["query_len"], row["image_token_grid"]) == (4, 4))
    assert default["ratios"]["first_token_seconds"] == {"median": 1, "min": 1, "max": 1}
    values = times["repeats"]["first_token_seconds"]
    assert all(len(rounds) == ROUNDS and min(rounds) > 0 for rounds in values.values())


def test_both_parts_are_measured_unless_one_is_named(tmp_path, monkeypatch):
    for part in PARTS:
        monkeypatch.setattr(token_budget, f"measure_{part}", lambda options, part=part: {"rows": [part]})
    expected = {part: {"rows": [part]} for part in PARTS}
    assert run(tmp_path / "both.json") == expected
    (tmp_path / "one.json").write_text('{"times": {"rows": []}, "accuracy": {"rows": []}}')
    assert run(tmp_path / "one.json", "--only", "times") == expected | {"accuracy": {"rows": []}}


def test_plot(result, tmp_path):
    panels = panels_of(result)
    assert panels_of({"accuracy": result["accuracy"]}) == panels[2:]
    assert [len(panel.lines) for panel in panels] == [len(LENGTHS)] * 3
    memory = panels[1].lines["4 latents"]
    assert [point.x for point in memory] == [1, 4, 16]
    assert memory[0].median < memory[1].median < memory[2].median
    draw(tmp_path / "plot.svg", panels)
    assert "Keys and values of the prompt" in (tmp_path / "plot.svg").read_text()


def test_what_the_committed_results_show():
    """With the numbers of latents of its training, fusion-nano knows less about drawn images, the fewer tokens."""
    part = load_results(ACCURACY, RESULTS)["CPU"]["accuracy"]
    drawn = [name for name in part["asked"] if name != "easy-vqa"]
    for length in part["trained_query_lens"]:
        rows = sorted((r for r in part["rows"] if r["query_len"] == length), key=lambda row: row["image_tokens"])
        shares = [share(row, part["asked"], drawn) for row in rows]
        assert shares == sorted(shares)


def test_what_was_not_measured_says_so(tmp_path):
    document = "\n".join(f"{table.begin}\n{table.end}" for table in (TIMES, ACCURACY))
    text = update_document(document, tmp_path)
    assert f"CPU: {NOT_MEASURED}" in text and f"GPU: {NOT_MEASURED}" in text and f"\n{NOT_MEASURED}." in text
    assert render_accuracy({}) == f"{NOT_MEASURED}."


def test_the_document_is_up_to_date(tmp_path, monkeypatch):
    document = DOCUMENT.read_text()
    assert update_document(document, RESULTS) == document, "run: python benchmarks/report.py"
    monkeypatch.setattr(budget_report, "DOCUMENT", tmp_path / "budget.md")
    monkeypatch.setattr(budget_report, "PLOT", tmp_path / "plot.svg")
    budget_report.DOCUMENT.write_text(replace_block(document, TIMES, "old"))
    budget_report.write()
    assert budget_report.DOCUMENT.read_text() == document
    assert numbers_of(budget_report.PLOT) == numbers_of(PLOT), "run: python benchmarks/report.py"


def numbers_of(svg):
    """What a plot says, without what another version of matplotlib writes in another way."""
    return re.findall(r">([^<]*)</text>", svg.read_text())
