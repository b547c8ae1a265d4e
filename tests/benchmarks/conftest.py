"""The benchmarks are scripts: their modules import each other from their own folder."""

import sys
from pathlib import Path

import pytest
import transformers

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

# Its SmolVLM takes the side of a patch for a number of tokens. 5.17 to 5.19 and 5.21 to 5.24 do not.
RELEASE_WITH_BROKEN_PEER = "5.20.2"


@pytest.fixture(scope="session")
def working_peers() -> None:
    """Skip a test that runs SmolVLM where the installed transformers cannot."""
    if transformers.__version__ == RELEASE_WITH_BROKEN_PEER:
        pytest.skip(f"SmolVLM of transformers {RELEASE_WITH_BROKEN_PEER} is broken")
