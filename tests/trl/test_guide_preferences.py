"""The guide's code for preferences and reinforcement learning runs as it is printed."""

from pathlib import Path
from typing import Any

import pytest
from tests.docs.markdown import ROOT, fenced_blocks

pytest.importorskip("trl", reason="TRL is installed in an environment of its own: make test-trl")

pytestmark = pytest.mark.trl
GUIDE = "docs/trl_preferences_part.md"


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "docs").symlink_to(ROOT / "docs", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    trained = []
    for block in fenced_blocks(GUIDE, "python"):
        exec(compile(block, GUIDE, "exec"), names)
        trainer = names["trainer"]
        trained.append(type(trainer).__name__)
        assert trainer.state.global_step == trainer.args.max_steps
    assert trained == ["DPOTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer"]
    assert (tmp_path / "runs" / "dpo" / "model" / "config.json").exists()
