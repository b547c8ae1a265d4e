"""What is installed beside the package's own requirements. Imports nothing."""

from importlib.util import find_spec

from fusion_hf.common.errors import InputError


def require(packages: tuple[str, ...], what: str, extra: str) -> None:
    """
    Ask for the packages of an extra before the work that needs them.

    Args:
        packages: their top-level modules.
        what: needs them, as the beginning of a sentence.
        extra: has them.

    Raises:
        InputError: for the first that is not installed; names the extra.
    """
    for name in packages:
        if find_spec(name) is None:
            raise InputError(f"{what} needs {name}, which is not installed: pip install 'fusion_hf[{extra}]'.")
