"""YAML to dataclasses: what becomes of values, and which errors name what."""

import doctest
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from fusion_hf.common import yaml_config
from fusion_hf.common.errors import InputError
from fusion_hf.common.yaml_config import PositiveInt, make_dataclass, parse_override, read_yaml, read_yaml_keys


@dataclass
class Interval:
    least: int
    most: int

    @classmethod
    def from_yaml(cls, value: Any) -> "Interval":
        if not isinstance(value, list) or len(value) != 2:
            raise ValueError("a list of two numbers")
        return cls(*value)


def upper(text: str) -> str:
    if not text:
        raise ValueError("a text")
    return text.upper()


@dataclass
class Inner:
    count: PositiveInt
    mode: Literal[1, "one"] = 1

    def __post_init__(self) -> None:
        if self.count > 9:
            raise ValueError(f"`count` must be up to 9, got {self.count}.")


@dataclass
class Outer:
    name: str
    inner: Inner
    more: tuple[Inner, ...] = ()
    reach: Interval | None = None
    label: Annotated[str, upper] = "X"
    shares: dict[str, float] = field(default_factory=dict)
    path: Path = Path()
    rate: float = 1.0


def test_values_become_what_the_hints_say():
    values = {
        "inner": {"count": 3},
        "more": [{"count": 1, "mode": "one"}],
        "reach": [1, 2],
        "label": "low",
        "shares": {"a": 1},
        "path": "a/b",
        "rate": "1e-5",
    }
    made = make_dataclass(Outer, values, "outer.yaml", name="given")
    assert made == Outer("given", Inner(3), (Inner(1, "one"),), Interval(1, 2), "LOW", {"a": 1.0}, Path("a/b"), 1e-5)
    assert type(made.shares["a"]) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "outer.yaml has no inner.*Allowed: inner, more"),
        ({"inner": {"count": 1}, "name": "x"}, "outer.yaml has the unknown key 'name'"),  # the caller gives it
        ({"inner": 5}, "outer.yaml: .inner. must be a mapping of keys to values, got 5"),
        ({"inner": {"count": 0}}, "outer.yaml: .inner.count.*more than 0.*got 0"),
        ({"inner": {"count": True}}, "inner.count.*a whole number.*got True"),
        ({"inner": {"count": 10}}, "outer.yaml: inner: .count. must be up to 9, got 10"),
        ({"inner": {"count": 1, "mode": True}}, "inner.mode.*1, 'one'.*got True"),
        ({"inner": {"count": 1, "mod": 1}}, "outer.yaml: inner has the unknown key 'mod'. Did you mean 'mode'"),
        ({"inner": {"count": 1}, "more": [{"count": 1}, {}]}, r"more\[1\] has no count"),
        ({"inner": {"count": 1}, "more": {}}, "more.*a list.*got {}"),
        ({"inner": {"count": 1}, "reach": 5}, "reach.*a list of two numbers.*got 5"),
        ({"inner": {"count": 1}, "label": ""}, "label.*a text.*got ''"),
        ({"inner": {"count": 1}, "shares": {"a": "b"}}, "shares.a.*a number.*got 'b'"),
        ({"inner": {"count": 1}, "path": 1}, "path.*a path.*got 1"),
    ],
)
def test_errors_name_key_value_and_what_is_allowed(values: dict, message: str):
    with pytest.raises(InputError, match=message):
        make_dataclass(Outer, values, "outer.yaml", name="given")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "is not valid YAML"),
        (b"\xff", "is not valid YAML"),
        (b"[1]", ".*got a list"),
        (b"1: 2", ".*got a dict"),
    ],
)
def test_files_that_hold_no_keys(content: bytes, message: str, tmp_path: Path):
    path = tmp_path / "file.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"The recipe .*file.yaml {message}"):
        read_yaml_keys(path, "The recipe")


def test_files_are_bounded(tmp_path: Path):
    path = tmp_path / "file.yaml"
    path.write_text("a: 1")
    assert read_yaml(path, "The recipe", max_bytes=4) == {"a": 1}
    with pytest.raises(InputError, match="at most 3 bytes"):
        read_yaml(path, "The recipe", max_bytes=3)


def test_overrides():
    assert parse_override("a=1e-1", "a=1") == ("a", "1e-1")
    assert parse_override("a=", "a=1") == ("a", None)
    for text, message in (
        ("a", "key=value, such as a=1, got 'a'"),
        ("a=[", "a must be a YAML value"),
    ):
        with pytest.raises(InputError, match=message):
            parse_override(text, "a=1")


def test_the_examples_are_true():
    assert doctest.testmod(yaml_config).failed == 0 < doctest.testmod(yaml_config).attempted
