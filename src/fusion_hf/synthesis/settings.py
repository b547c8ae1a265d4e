"""Settings of a run as dataclasses, made from what YAML holds: unknown keys and wrong types are named errors."""

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from fusion_hf.common.errors import InputError, short_name

T = TypeVar("T")
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "keys with values"}


def make_settings(kind: type[T], values: Any, where: str) -> T:
    """
    An instance of the dataclass `kind`; fields that are dataclasses are made in the same way.

    Args:
        values: keys and values; None: all defaults.
        where: the key that they are under, which errors name.

    Raises:
        InputError: for a key that is unknown or missing, and for a value of another type.
    """
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise InputError(f"{where} is {short_name(repr(values))}; allowed: keys with values.")
    hints = typing.get_type_hints(kind)
    known: dict[str, Field[Any]] = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    check_keys(values, known, where)
    for name, field in known.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise InputError(f"{where} has no {name}; allowed keys: {', '.join(known)}.")
    try:
        return kind(**{name: _convert(hints[name], value, f"{where}.{name}") for name, value in values.items()})
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: {error}") from error


def check_keys(values: Iterable[Any], known: Iterable[str], where: str) -> None:
    """
    Raises:
        InputError: for a key that is not known; names the nearest one.
    """
    allowed = list(known)
    for key in values:
        if key not in allowed:
            nearest = difflib.get_close_matches(str(key), allowed, n=1, cutoff=0.0)[0]
            meant = f"did you mean {nearest!r}? Allowed: {', '.join(allowed)}."
            raise InputError(f"{where} has the key {short_name(repr(key))}; {meant}")


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inside:
            return None
        return _convert(next(part for part in inside if part is not type(None)), value, where)
    if origin is typing.Literal:
        if value not in inside:
            raise InputError(f"{where} is {short_name(repr(value))}; allowed: {', '.join(map(str, inside))}.")
        return value
    if origin is dict and isinstance(value, dict):
        return {_convert(inside[0], key, where): _convert(inside[1], each, where) for key, each in value.items()}
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(inside[0], each, where) for each in value)
    if is_dataclass(hint):
        return make_settings(typing.cast(type, hint), value, where)
    return _plain(hint, value, where)


def _plain(hint: Any, value: Any, where: str) -> Any:
    kind = typing.get_origin(hint) or hint
    if kind is Any:
        return value
    if kind is Path and isinstance(value, str) and value:
        return Path(value)
    if kind is float and isinstance(value, str):  # as YAML reads 1e-5
        try:
            return float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    allowed = {Path: "a path", tuple: "a list"}.get(kind) or _NAMES.get(kind, str(kind))
    raise InputError(f"{where} is {short_name(repr(value))}; allowed: {allowed}.")
