"""The tables in the documentation are those of the committed results."""

import json

import pytest
from report import (
    INFERENCE,
    NOT_MEASURED,
    PLOTS,
    RESULTS,
    TABLES,
    TRAINING,
    documents,
    load_results,
    render,
    replace_block,
)
from report import update as update_document


@pytest.fixture(scope="module")
def cpu():
    return json.loads((RESULTS / INFERENCE.columns["CPU"]).read_text())


@pytest.mark.parametrize("document", documents(), ids=lambda document: document.name)
def test_documents_are_up_to_date(document):
    assert update_document(document, RESULTS) == document.read_text(), "run: python benchmarks/report.py"


def test_every_table_has_a_name_of_its_own():
    assert len({block.name for block in [*TABLES, *PLOTS]}) == len([*TABLES, *PLOTS])


def rows_of(table, folder):
    lines = render(table, load_results(table, folder)).splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]


def test_a_column_without_a_result_says_so(tmp_path, cpu):
    (tmp_path / INFERENCE.columns["CPU"]).write_text(json.dumps(cpu))
    rows = rows_of(INFERENCE, tmp_path)
    assert rows[0] == ["figure", "target", "CPU", "GPU"]
    assert all(row[-1] == NOT_MEASURED for row in rows[1:])
    assert all(row[-2] != NOT_MEASURED for row in rows[1:])


def test_parts_that_were_not_measured_and_variants_that_did_not_fit_say_so(tmp_path, cpu):
    settings = {"threads": 2, "dtype": "bfloat16", "autocast": False, "rounds": 1}
    spread = {"median": 0.5, "min": 0.4, "max": 0.6}
    step = {
        "out_of_memory": ["ours"],
        "ratios": {"step_seconds": {"ours_checkpointed": {"reference_checkpointed": spread}}},
        "machine_fractions": {"ours_checkpointed": spread},
        "medians": {"allocated_bytes": {"ours_checkpointed": 3 * 2**20}},
    }
    result = {"settings": settings, "machine": cpu["machine"], "versions": cpu["versions"], "step": step}
    (tmp_path / TRAINING.columns["GPU, 8B"]).write_text(json.dumps(result))
    cells = {row[0]: row[-1] for row in rows_of(TRAINING, tmp_path)[1:]}
    assert cells["training step / reference; checkpointing in both"] == "0.50 (0.40-0.60)"
    assert cells["forward and backward, of the matrix-product rate: ours, checkpointing"] == "50% (40%-60%)"
    assert cells["peak memory above the weights: ours, checkpointing"] == "3 MiB"
    assert cells["peak memory above the weights: ours"] == "out of memory"
    measured = {name for name, cell in cells.items() if cell != NOT_MEASURED}
    assert len(measured) == 4


@pytest.mark.parametrize("table", [*TABLES, *PLOTS], ids=lambda table: table.name)
def test_a_document_without_markers_is_refused(table):
    with pytest.raises(ValueError, match=f"{table.name}: begin"):
        replace_block(f"{table.end} before {table.begin}", table, "text")


def test_the_committed_results_are_of_the_real_size(cpu):
    assert cpu["settings"]["size"] == "middle"
    assert cpu["settings"]["repeats"] >= 5
    assert max(cpu["relative_errors"].values()) < 1e-4


def test_what_the_committed_results_show(cpu):
    """The aims for memory and preprocessing are reached; the one for the first token, half the time, is not."""
    assert cpu["ratios"]["first_token_seconds"]["reference"]["median"] < 1
    assert cpu["ratios"]["first_token_allocated_bytes"]["reference"]["median"] <= 0.4
    assert cpu["ratios"]["preprocessing_seconds"]["pil_resizes"]["median"] < 1.2
