"""`fusion-hf train`: wrong recipes end in one line and status 2, before a model is loaded or a folder is made."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        (None, [], "cannot be read: No such file or directory."),
        ("- a list", [], "must be a mapping of keys to values, got a list."),
        ("model: [", [], "is not valid YAML"),
        (
            "model: m\ndata: d\nlerning_rate: 1",
            [],
            "recipe.yaml has the unknown key 'lerning_rate'. Did you mean 'learning_rate'?",
        ),
        ("model: m\ndata: d\noutput_dir: out", ["seed=many"], "`seed` must be a whole number, got 'many'."),
        ("model: m\ndata: d", [], "must set `output_dir`"),
    ],
)
def test_errors_in_one_line(tmp_path, content, overrides, message):
    recipe = tmp_path / "recipe.yaml"
    if content is not None:
        recipe.write_text(content)
    command = [sys.executable, "-m", "fusion_hf", "train", str(recipe), *overrides]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2
    assert last.startswith("error: ") and message in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
