"""Checks of optional dependencies. This module imports none of them."""

from importlib.util import find_spec

from fusion_hf.common.errors import InputError


def require(packages: tuple[str, ...], what: str, extra: str) -> None:
    """
    Check that the packages of an extra are installed, before the work that needs them.

    Args:
        packages: Top-level modules of the packages.
        what: What needs the packages, as the beginning of a sentence.
        extra: Extra that installs them.

    Raises:
        InputError: If a package is not installed. The message names the extra.
    """
    for name in packages:
        if find_spec(name) is None:
            raise InputError(f"{what} needs {name}, which is not installed: pip install 'fusion_hf[{extra}]'.")
