"""The code of docs/trl.md, section by section, as a reader would run it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.trl
ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "trl.md").read_text(encoding="utf-8")
SECTIONS = [section for section in re.split(r"^## ", GUIDE, flags=re.MULTILINE)[1:] if "```python" in section]


@pytest.mark.parametrize("section", SECTIONS, ids=[section.splitlines()[0] for section in SECTIONS])
def test_the_code_of_a_section_runs(section, tmp_path) -> None:
    script = tmp_path / "guide.py"
    script.write_text("\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL)), encoding="utf-8")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CI": "1"}
    result = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert list((tmp_path / "runs").glob("*"))
