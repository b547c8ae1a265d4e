"""Imports transformers' common test suites, whose package is incomplete: what is missing has a stand-in here."""

import importlib
import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.transformers_suites.fetch import SuitesUnavailableError, fetch_suites

PACKAGE = "transformers_own_tests"
IMAGE = Path(__file__).parents[2] / "docs" / "assets" / "red_circle.png"


class Unavailable:
    """In place of a suite that cannot be fetched: one test that fails and says why."""

    reason: str

    def test_suite_is_available(self) -> None:
        raise SuitesUnavailableError(self.reason)


def mixin(module: str, name: str) -> Any:
    """The class `name` of the suites' `module`; where they cannot be fetched, a class whose one test fails."""
    try:
        return getattr(load(module), name)
    except SuitesUnavailableError as error:
        return type(name, (Unavailable,), {"reason": str(error)})


def load(module: str) -> ModuleType:
    """
    Import a module of the suites, e.g. `"test_modeling_common"`.

    Raises:
        SuitesUnavailableError: where they can neither be found nor downloaded.
    """
    if PACKAGE not in sys.modules:
        os.environ.setdefault("RUN_SLOW", "1")  # the suites' own switch; all of this is slow here
        folder = fetch_suites()
        _add_module(PACKAGE, [str(folder)])
        for name, attributes in STAND_INS.items():
            parent = name.rpartition(".")[0]
            if parent and parent not in sys.modules:
                _add_module(parent, [])
            vars(_add_module(name, None)).update(attributes)
    return importlib.import_module(f"{PACKAGE}.{module}")


def _add_module(name: str, path: list[str] | None) -> ModuleType:
    spec = ModuleSpec(name, None, is_package=path is not None)
    spec.submodule_search_locations = path
    sys.modules[name] = module_from_spec(spec)
    return sys.modules[name]


def _local_path(url: str, return_url_if_not_found: bool = True) -> str:
    """Every image of the suites is on the Hub; a local one stands for all of them."""
    return str(IMAGE)


class GenerationTesterMixin:
    """The source distribution lacks it; `test_generation_ground.py` covers its ground."""


class ExportTesterMixin:
    """The source distribution lacks it."""


# The distribution has the files `tests/test*.py` and no sub-folder. These modules are imported by them all the same.
STAND_INS: dict[str, dict[str, type | dict[str, Any] | Callable[..., Any]]] = {
    f"{PACKAGE}.generation.test_utils": {"GenerationTesterMixin": GenerationTesterMixin},
    f"{PACKAGE}.exporters.test_export": {"ExportTesterMixin": ExportTesterMixin},
    # used for configurations without sub-configurations only, which ours is not
    f"{PACKAGE}.utils.test_configuration_utils": {"config_common_kwargs": {}},
    "fetch_hub_objects_for_ci": {"url_to_local_path": _local_path},
}
