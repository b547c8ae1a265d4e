"""Where `report_to` sends a run's figures, and whether that is installed, before a model is loaded in vain."""

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from fusion_hf.common.errors import InputError

NOWHERE, EVERYWHERE = "none", "all"
# transformers' names -> modules; one of them must be installed
MODULES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "mlflow": ("mlflow",),
    "comet_ml": ("comet_ml",),
    "swanlab": ("swanlab",),
    "clearml": ("clearml",),
    "neptune": ("neptune",),
    "dvclive": ("dvclive",),
    "codecarbon": ("codecarbon",),
    "azure_ml": (),  # whether these two are there, transformers itself finds out
    "dagshub": ("dagshub",),
    "flyte": ("flytekit",),
    "kubeflow": (),
}


def check_reporters(report_to: Any) -> None:
    """
    Refuse a place for figures that is unknown or not installed.

    Args:
        report_to: a name, several, or None, as in a recipe.

    Raises:
        InputError: names the first one, and what to install.
    """
    names: Iterable[Any] = report_to if isinstance(report_to, list) else [NOWHERE if report_to is None else report_to]
    for name in names:
        if name in (NOWHERE, EVERYWHERE):  # `all` are those that are installed
            continue
        if name not in MODULES:
            raise InputError(f"report_to is {name!r}; allowed: {NOWHERE}, {EVERYWHERE}, {', '.join(MODULES)}.")
        if MODULES[name] and not any(map(is_installed, MODULES[name])):
            raise InputError(
                f"report_to is {name!r}, which is not installed: pip install {MODULES[name][0]}, or give "
                f"report_to={NOWHERE}."
            )


def is_installed(module: str) -> bool:
    """Whether there is such a package; a folder of the same name, as `wandb` leaves one in a run's, is none."""
    spec = find_spec(module)
    return spec is not None and spec.origin is not None
