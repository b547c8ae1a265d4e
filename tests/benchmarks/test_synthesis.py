"""`benchmarks/synthesis.py`: what it measures is in the document."""

import json

import pytest
import synthesis
import synthesis_report
from blocks import RESULTS, replace_block
from filter_accuracy import FILTERS as FILTER_NAMES

FILTERS = json.loads((RESULTS / "synthesis_cpu.json").read_text())["filters"]["filters"]


def test_document_is_up_to_date():
    text = synthesis_report.DOCUMENT.read_text()
    assert synthesis_report.update(text, RESULTS) == text, "run: python benchmarks/report.py"


def test_without_results_the_tables_say_so(tmp_path):
    text = synthesis_report.update(synthesis_report.DOCUMENT.read_text(), tmp_path)
    for table in (synthesis_report.FILTERS, synthesis_report.RUN):
        assert f"{table.begin}\n\nnot measured.\n\n{table.end}" in text
        with pytest.raises(ValueError, match=f"{table.name}: begin"):
            replace_block("", table, "text")


def test_every_filter_is_in_the_committed_result():
    assert {found["name"] for found in FILTERS} == set(FILTER_NAMES)
    assert min(found["precision"] for found in FILTERS) >= 0.95
    assert min(found["recall"] for found in FILTERS) >= 0.95


@pytest.mark.slow
def test_run(tmp_path):
    output = tmp_path / "result.json"
    synthesis.main(["--cases", "1", "--records", "40", "--rounds", "1", "--output", str(output)])
    result = json.loads(output.read_text())
    assert result["run"]["long"]["peak_bytes"] > 2**20
    assert set(result["run"]["short"]["seconds"]) == {"1", "2"}
    table = synthesis_report.render_run(result)
    assert "| two workers, times as fast as one |" in table and "not measured" not in table
    assert len(result["filters"]["filters"]) == len(FILTERS)


def test_a_failed_command_is_an_error():
    with pytest.raises(RuntimeError, match=r"`executor.tasks` must be more than 0, got 0"):
        synthesis.run_command(1, 1, 0)
