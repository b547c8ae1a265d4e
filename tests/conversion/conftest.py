"""What the conversion tests share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fusion_hf.cli.convert import main


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., Path]:
    """Runs `fusion-hf convert` on `tmp_path/checkpoint` with the sizes beside it; returns the output."""

    def run(*extra: str, output: str = "output", status: int = 0) -> Path:
        arguments = ["--model", str(tmp_path / "checkpoint"), "--output", str(tmp_path / output)]
        if "--vision-config" not in extra and (tmp_path / "vision_config.json").exists():
            arguments += ["--vision-config", str(tmp_path / "vision_config.json")]
        assert main([*arguments, *extra]) == status
        return tmp_path / output

    return run
