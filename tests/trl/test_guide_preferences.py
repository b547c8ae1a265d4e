"""The code of docs/trl_preferences_part.md, section by section, as a reader would run it."""

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="TRL is installed in an environment of its own: make test-trl")

pytestmark = pytest.mark.trl
ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "trl_preferences_part.md").read_text(encoding="utf-8")
SECTIONS = re.split(r"^## ", GUIDE, flags=re.MULTILINE)[1:]


@pytest.mark.parametrize("section", SECTIONS, ids=[section.splitlines()[0] for section in SECTIONS])
def test_the_code_of_a_section_runs(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "docs").symlink_to(ROOT / "docs", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(compile(block, "guide.py", "exec"), names)
        trainer = names["trainer"]
        assert trainer.state.global_step == trainer.args.max_steps
    assert list((tmp_path / "runs").glob("*"))
