"""`benchmarks/cpu.py`: its variants are one function, and it writes what it measured."""

import json

import torch
from cpu import ALL, BASE, main
from cpu_report import FIGURES, ROWS, VARIANTS, cpu_conditions


def test_result_file(tmp_path):
    output = tmp_path / "tiny.json"
    threads = torch.get_num_threads()
    flags = ["--size", "tiny", "--repeats", 2, "--eight-repeats", 1, "--questions", 2, "--drawn", 1]
    for part in ("times", "eight", "accuracy"):
        main([*map(str, flags), "--threads", str(threads), "--only", part, "--output", str(output)])
    result = json.loads(output.read_text())
    for part, figure, _ in FIGURES:
        repeats = result[part]["repeats"][figure]
        assert set(repeats) == {BASE, *(name for name in VARIANTS if part == "times" or not name.endswith(ALL))}
        assert {len(rounds) for rounds in repeats.values()} == {2 if part == "times" else 1}
    errors = result["times"]["errors"]["logits"]
    assert all(error < (1e-5 if name.startswith(BASE) else 0.1) for name, error in errors.items())
    assert all(equal for name, equal in result["times"]["equal_answers"].items() if name.startswith(BASE))
    assert all(row.cell(result) for row in ROWS)
    assert "size `tiny`, 2 rounds, 1 of eight questions" in cpu_conditions(result)
    assert not any(row.cell({}) for row in ROWS)
