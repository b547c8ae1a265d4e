"""A pool, a scripted server and a tiny Flux, for whole runs."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.helpers.openai_server import Scripted, serve
from tests.synthesis.author import make_captions, write

from fusion_hf.synthesis.run_config import SynthesisConfig, load_config

RECORDS = 24  # each category has at least one of them

MakeConfig = Callable[..., Path]


@pytest.fixture(scope="session")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.synthesis.flux import save_flux  # diffusers takes seconds to import

    return save_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture
def server() -> Iterator[Scripted]:
    with serve(Scripted(write)) as script:
        yield script


@pytest.fixture
def make_config(tmp_path: Path, flux: Path) -> MakeConfig:
    """Writes a config and its pool; arguments are overrides by dotted key, with __ for a dot."""

    def make(server: Scripted, name: str = "run", records: int = RECORDS, **changes: Any) -> Path:
        pool = tmp_path / "pool.txt"
        pool.write_text("\n".join(make_captions(records)))
        values: dict[str, Any] = {
            "output": str(tmp_path / name),
            "records": records,
            "seed": 3,
            "chunk": 5,
            "pool": {"source": str(pool), "kind": "text", "near_duplicates": False},
            "writer": {"model": "scripted", "url": server.url, "concurrency": 4, "patience": 4, "timeout": 20},
            "images": {
                "kind": "diffusers",
                "model": str(flux),
                "width": 32,
                "height": 32,
                "steps": 1,
                "batch_size": 3,
            },
            "executor": {"tasks": 2},
        }
        values["images"] |= {"device": "cpu", "arguments": {"max_sequence_length": 32}}
        for key, value in changes.items():
            *sections, last = key.split("__")
            inner = values
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[last] = value
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return make


@pytest.fixture
def config_of(make_config: MakeConfig) -> Callable[..., SynthesisConfig]:
    return lambda *given, **changes: load_config(make_config(*given, **changes))
