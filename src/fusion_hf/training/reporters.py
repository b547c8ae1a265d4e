"""Check that the services in `report_to` are known and installed, before a model is loaded."""

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from fusion_hf.common.errors import InputError

NOWHERE, EVERYWHERE = "none", "all"
# transformers' names and the modules of which one must be installed
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
    "azure_ml": (),  # transformers checks these two itself
    "dagshub": ("dagshub",),
    "flyte": ("flytekit",),
    "kubeflow": (),
}


def check_reporters(report_to: Any) -> None:
    """
    Raise an error if a service in `report_to` is unknown or not installed.

    Args:
        report_to: a name, several names, or None, as in a recipe.

    Raises:
        InputError: for the first such service. The message says what to install.
    """
    names: Iterable[Any] = report_to if isinstance(report_to, list) else [NOWHERE if report_to is None else report_to]
    for name in names:
        if name in (NOWHERE, EVERYWHERE):  # `all` means all that are installed
            continue
        if name not in MODULES:
            raise InputError(
                f"`report_to` must be one of {NOWHERE}, {EVERYWHERE}, {', '.join(MODULES)}, got {name!r}."
            )
        if MODULES[name] and not any(map(is_installed, MODULES[name])):
            raise InputError(
                f"`report_to` is {name!r}, which is not installed. Run `pip install {MODULES[name][0]}`, or set "
                f"report_to={NOWHERE}."
            )


def is_installed(module: str) -> bool:
    """
    Return whether a package is installed. A plain folder of the same name, such as the `wandb` folder of a run, is
    not one.

    Args:
        module: the name of the package.
    """
    spec = find_spec(module)
    return spec is not None and spec.origin is not None
