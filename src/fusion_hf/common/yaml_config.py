"""YAML files to dataclasses; what is wrong in one is an error that names the key, its value and what is allowed."""

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
MOST_LISTED = 30  # keys in an error
NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    tuple: "a list",
    dict: "keys with values",
    Path: "a path",
}


@runtime_checkable
class FromYaml(Protocol):
    """A class that is written in YAML otherwise than as keys with values."""

    @classmethod
    def from_yaml(cls, value: Any) -> Any:
        """
        Make one of the YAML value.

        Raises:
            ValueError: with what is allowed.
        """


def allow(allowed: str, holds: Callable[[Any], bool]) -> Callable[[Any], Any]:
    """
    Make a check for `Annotated` hints of [`make_dataclass`].

    Args:
        allowed: values, in words, for the error.
        holds: whether a value is one of them.
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
        path: of the file.
        what: it is, which errors name before its path: "The recipe".
        max_bytes: of the file; larger ones are refused.

    Raises:
        InputError: if it cannot be read, is too large, or is no YAML.
    """
    try:
        if path.stat().st_size > max_bytes:
            raise InputError(f"{what} {path} has more than {max_bytes} bytes; allowed: a short YAML file.")
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{what} {path} is no YAML: {error}") from error


def read_yaml_keys(path: Path, what: str) -> dict[str, Any]:
    """
    Read a YAML file that holds keys with values.

    Args:
        path, what: as of [`read_yaml`].

    Raises:
        InputError: if it cannot be read, or holds something else.
    """
    values = read_yaml(path, what)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"{what} {path} holds a {type(values).__name__}; allowed: keys with values.")
    return values


def parse_override(text: str, example: str) -> tuple[str, Any]:
    """
    Read `key=value` of a command line, whose value is YAML.

    Args:
        text: as it was given.
        example: of a valid one, for errors.

    Returns:
        The key and its value.

    Raises:
        InputError: if it is none.
    """
    key, separator, written = text.partition("=")
    if not separator:
        raise InputError(f"{text!r} is no override; allowed: key=value, such as {example}.")
    try:
        return key, yaml.safe_load(written)
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{short_name(key)} is {short_name(repr(written))}, which is no YAML value.") from error


def check_keys(keys: Iterable[Any], known: Iterable[str], where: str) -> None:
    """
    Refuse unknown keys.

    Args:
        keys: that were given.
        known: all that there are.
        where: the keys stand, which errors name.

    Raises:
        InputError: names the first unknown key and the nearest known one.
    """
    allowed = list(known)
    for key in keys:
        if not allowed:
            raise InputError(f"{where} has the key {short_name(repr(key))}; allowed: none.")
        if key not in allowed:
            nearest = difflib.get_close_matches(str(key), allowed, n=1, cutoff=0.0)[0]
            listed = f" Allowed: {', '.join(allowed)}." if len(allowed) <= MOST_LISTED else ""
            raise InputError(f"{where} has the key {short_name(repr(key))}; did you mean {nearest!r}?{listed}")


def make_dataclass(kind: type[T], values: Any, where: str, **given: Any) -> T:
    """
    Make an instance of a dataclass; fields that are dataclasses are made in the same way.

    Args:
        kind: the dataclass. Its hints say what a value may be: plain types, `Literal`, `dict`, `tuple`, dataclasses,
            classes with `from_yaml`, or one of these and a check, as [`PositiveInt`]. A check returns the value, or a
            changed one, and raises ValueError with what is allowed. So does `__post_init__`, with a sentence.
        values: keys and values; None: all defaults.
        where: the keys stand, as a file's name; errors begin with it.
        given: fields that the caller sets, and the file may not.

    Raises:
        InputError: for a key that is unknown or missing, and for a value that is not allowed.

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
    fusion_hf.common.errors.InputError: crop.yaml: side is 'large'; allowed: a whole number.

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
            raise InputError(f"{where} has no {name}; allowed keys: {', '.join(known)}.")
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
    Convert a YAML value to one of some plain types: YAML reads `1e-5` as text, and `1` where 1.0 is meant.

    Args:
        kinds: the types.
        value: as YAML reads it. A single one will do for a list.
        where: the value stands, which errors name.

    Raises:
        InputError: if it cannot be one; names the types.
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
    """Say in words what some plain types are."""
    return " or ".join(sorted(NAMES.get(kind, kind.__name__) for kind in kinds))


def wrong_value(where: str, value: Any, allowed: str) -> InputError:
    """Make the error of a value that is not allowed."""
    return InputError(f"{where} is {short_name(repr(value))}; allowed: {allowed}.")


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
            raise wrong_value(where, value, ", ".join(map(repr, inside)))
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
