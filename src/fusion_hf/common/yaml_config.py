"""Conversion of YAML files to dataclasses. Errors name the key, its value and the allowed values."""

import difflib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import yaml

from fusion_hf.common.errors import InputError, short_name

T = TypeVar("T")
MAX_YAML_BYTES = 2**20
MOST_LISTED = 30  # maximum number of keys that an error lists
NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    tuple: "a list",
    dict: "a mapping of keys to values",
    Path: "a path",
}


@runtime_checkable
class FromYaml(Protocol):
    """A class whose YAML form is not a mapping of its fields."""

    @classmethod
    def from_yaml(cls, value: Any) -> Any:
        """
        Create an instance from its YAML value.

        Args:
            value: Value as YAML reads it.

        Raises:
            ValueError: If the value is invalid. The message describes the allowed values and completes "must be".
        """


def allow(allowed: str, holds: Callable[[Any], bool]) -> Callable[[Any], Any]:
    """
    Create a check for the `Annotated` hints of [`make_dataclass`].

    Args:
        allowed: Description of the allowed values, which completes the phrase "must be".
        holds: Function that returns whether a value is allowed.

    Returns:
        A function that returns its argument, or raises `ValueError`.
    """

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(allowed)
        return value

    return check


PositiveInt: TypeAlias = Annotated[int, allow("more than 0", lambda value: value > 0)]
PositiveFloat: TypeAlias = Annotated[float, allow("more than 0", lambda value: value > 0)]


def read_yaml(path: Path, what: str, max_bytes: int = MAX_YAML_BYTES) -> Any:
    """
    Read the content of a YAML file.

    Args:
        path: Path of the file.
        what: Name of its kind for errors, such as "The recipe".
        max_bytes: Maximum size of the file in bytes.

    Returns:
        The content.

    Raises:
        InputError: If the file cannot be read, is too large, or is not valid YAML.
    """
    try:
        if path.stat().st_size > max_bytes:
            raise InputError(f"{what} {path} must be a YAML file of at most {max_bytes} bytes, but it is larger.")
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{what} {path} is not valid YAML: {error}") from error


def read_yaml_keys(path: Path, what: str) -> dict[str, Any]:
    """
    Read a YAML file that holds a mapping of keys to values.

    Args:
        path, what: See [`read_yaml`].

    Returns:
        The mapping.

    Raises:
        InputError: If the file cannot be read, or if it holds something else.
    """
    values = read_yaml(path, what)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"{what} {path} must be a mapping of keys to values, got a {type(values).__name__}.")
    return values


def parse_override(text: str, example: str) -> tuple[str, Any]:
    """
    Parse an override `key=value` of the command line, whose value is YAML.

    Args:
        text: The override.
        example: A valid override, for errors.

    Returns:
        The key and its value.

    Raises:
        InputError: If `text` is not an override.
    """
    key, separator, written = text.partition("=")
    if not separator:
        raise InputError(f"An override must be key=value, such as {example}, got {text!r}.")
    try:
        return key, yaml.safe_load(written)
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{short_name(key)} must be a YAML value, got {short_name(repr(written))}.") from error


def check_keys(keys: Iterable[Any], known: Iterable[str], where: str) -> None:
    """
    Check that all keys are known.

    Args:
        keys: Keys that were given.
        known: All allowed keys.
        where: Place of the keys, which begins the error.

    Raises:
        InputError: If a key is unknown. The message names the first such key and the closest known one.
    """
    allowed = list(known)
    for key in keys:
        if not allowed:
            raise InputError(f"{where} must have no keys, got {short_name(repr(key))}.")
        if key not in allowed:
            nearest = difflib.get_close_matches(str(key), allowed, n=1, cutoff=0.0)[0]
            listed = f" Allowed: {', '.join(allowed)}." if len(allowed) <= MOST_LISTED else ""
            raise InputError(f"{where} has the unknown key {short_name(repr(key))}. Did you mean {nearest!r}?{listed}")


def make_dataclass(kind: type[T], values: Any, where: str, **given: Any) -> T:
    """
    Create an instance of a dataclass. Fields that are dataclasses are created in the same way.

    Args:
        kind: The dataclass. Its hints describe the allowed values: plain types, `Literal`, `dict`, `tuple`,
            dataclasses, classes with `from_yaml`, or one of these with a check, such as [`PositiveInt`]. A check
            returns the value, or a changed value, or raises a `ValueError` that completes the phrase "must be".
            `__post_init__` may raise a `ValueError` with a whole sentence.
        values: Mapping of keys to values. None stands for all defaults.
        where: Place of the keys, such as the name of a file, which begins errors.
        given: Fields that the caller sets and the file must not set.

    Returns:
        The instance.

    Raises:
        InputError: If a key is unknown or missing, or if a value is not allowed.

    Example:

    ```python
    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Crop:
    ...     side: int
    ...     scale: float = 1.0
    >>> make_dataclass(Crop, {"side": 48, "scale": "5e-1"}, "crop.yaml")
    Crop(side=48, scale=0.5)
    >>> make_dataclass(Crop, {"side": "large"}, "crop.yaml")
    Traceback (most recent call last):
    fusion_hf.common.errors.InputError: crop.yaml: `side` must be a whole number, got 'large'.

    ```
    """
    return _make(kind, values, where, ": ", given)


def _make(kind: type[T], values: Any, where: str, separator: str, given: Mapping[str, Any]) -> T:
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise wrong_value(where, values, NAMES[dict])
    hints = _hints(kind)  # type: ignore[arg-type]
    known = {each.name: each for each in fields(kind) if each.name not in given}  # type: ignore[arg-type]
    check_keys(values, known, where)
    for name, each in known.items():
        if name not in values and each.default is MISSING and each.default_factory is MISSING:
            raise InputError(f"{where} has no {name}, which is required. Allowed: {', '.join(known)}.")
    made = {name: _convert(hints[name], value, f"{where}{separator}{name}") for name, value in values.items()}
    try:
        return kind(**made, **given)
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"{where}: {error}") from error


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def convert_value(kinds: Iterable[type], value: Any, where: str) -> Any:
    """
    Convert a YAML value to one of several plain types. YAML reads `1e-5` as text, and `1` where 1.0 is meant.

    Args:
        kinds: Allowed types.
        value: Value as YAML reads it. A single value may stand for a list.
        where: Place of the value, which begins the error.

    Returns:
        The converted value.

    Raises:
        InputError: If the value cannot be converted. The message names the types.
    """
    kinds = frozenset(kinds)
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if type(value) in kinds:
        return value
    if is_number and float in kinds:
        return float(value)
    if isinstance(value, str) and float in kinds and str not in kinds:
        try:
            return float(value)
        except ValueError:
            pass
    elif isinstance(value, str) and value and Path in kinds:
        return Path(value)
    elif list in kinds and str not in kinds and (is_number or isinstance(value, str | float)):
        return [value]
    raise wrong_value(where, value, describe_kinds(kinds))


def describe_kinds(kinds: Iterable[type]) -> str:
    """Describe plain types in words."""
    return " or ".join(sorted(NAMES.get(kind, kind.__name__) for kind in kinds))


def wrong_value(where: str, value: Any, allowed: str) -> InputError:
    """
    Create the error for a value that is not allowed.

    Args:
        where: Place of the value, such as "recipe.yaml: model".
        value: The value.
        allowed: Description of the allowed values, which completes the phrase "must be".

    Returns:
        The error.
    """
    place, separator, name = where.rpartition(": ")
    return InputError(f"{place}{separator}`{name}` must be {allowed}, got {short_name(repr(value))}.")


def _passed(check: Callable[[Any], Any], value: Any, written: Any, where: str) -> Any:
    try:
        return check(value)
    except ValueError as error:
        raise wrong_value(where, written, str(error)) from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or type(value) is hint:
        return value
    if origin is Annotated:
        kind, check = inside
        return _passed(check, _convert(kind, value, where), value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inside:
            return None
        return _convert(next(part for part in inside if part is not type(None)), value, where)
    if origin is typing.Literal:
        if not any(type(value) is type(each) and value == each for each in inside):
            raise wrong_value(where, value, f"one of {', '.join(map(repr, inside))}")
        return value
    if origin is dict and isinstance(value, dict):
        return {
            _convert(inside[0], key, where): _convert(inside[1], each, f"{where}.{key}") for key, each in value.items()
        }
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(inside[0], each, f"{where}[{number}]") for number, each in enumerate(value))
    if isinstance(hint, FromYaml):
        return _passed(hint.from_yaml, value, value, where)
    if is_dataclass(hint):
        return _make(typing.cast(type, hint), value, where, ".", {})
    return convert_value({origin or hint}, value, where)
