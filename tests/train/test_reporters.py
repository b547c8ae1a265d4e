"""Where figures go is checked before a model is loaded: unknown names, and packages that are not there."""

from importlib.machinery import ModuleSpec
from typing import Any

import pytest
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from fusion_hf.common.errors import InputError
from fusion_hf.training import reporters
from fusion_hf.training.reporters import MODULES, check_reporters


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of what is installed, for a test to fill; of `wandb` there is only a folder of that name."""
    names: set[str] = set()

    def find(name: str) -> ModuleSpec | None:
        if name in names:
            return ModuleSpec(name, None, origin=f"/site-packages/{name}/__init__.py")
        return ModuleSpec(name, None, is_package=True) if name == "wandb" else None

    monkeypatch.setattr(reporters, "find_spec", find)
    return names


def test_the_names_are_those_of_transformers() -> None:
    assert set(INTEGRATION_TO_CALLBACK) <= set(MODULES)


@pytest.mark.parametrize("report_to", [None, "none", "all", ["none"], [], "kubeflow"])
def test_what_needs_nothing(installed: set[str], report_to: Any) -> None:
    check_reporters(report_to)


@pytest.mark.parametrize(
    ("report_to", "missing"), [("wandb", "wandb"), ("tensorboard", "tensorboard"), (["mlflow", "wandb"], "mlflow")]
)
def test_what_is_not_installed_is_named(installed: set[str], report_to: Any, missing: str) -> None:
    with pytest.raises(InputError, match=f"`report_to` is '{missing}'.*pip install {missing}"):
        check_reporters(report_to)
    installed |= {"wandb", "tensorboardX", "mlflow"}
    check_reporters(report_to)


def test_an_unknown_name() -> None:
    with pytest.raises(
        InputError, match=r"`report_to` must be one of none, all, tensorboard, wandb.*got 'tensorbord'"
    ):
        check_reporters(["tensorbord"])
