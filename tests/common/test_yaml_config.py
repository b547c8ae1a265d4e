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
            raise ValueError(f"count is {self.count}; allowed: up to 9.")


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
        ({}, "outer.yaml has no inner; allowed keys: inner, more"),
        ({"inner": {"count": 1}, "name": "x"}, "outer.yaml has the key 'name'"),  # the caller gives it
        ({"inner": 5}, "outer.yaml: inner is 5; allowed: keys with values"),
        ({"inner": {"count": 0}}, "outer.yaml: inner.count is 0; allowed: more than 0"),
        ({"inner": {"count": True}}, "inner.count is True; allowed: a whole number"),
        ({"inner": {"count": 10}}, "outer.yaml: inner: count is 10; allowed: up to 9"),
        ({"inner": {"count": 1, "mode": True}}, "inner.mode is True; allowed: 1, 'one'"),
        ({"inner": {"count": 1, "mod": 1}}, "outer.yaml: inner has the key 'mod'; did you mean 'mode'"),
        ({"inner": {"count": 1}, "more": [{"count": 1}, {}]}, r"more\[1\] has no count"),
        ({"inner": {"count": 1}, "more": {}}, "more is {}; allowed: a list"),
        ({"inner": {"count": 1}, "reach": 5}, "reach is 5; allowed: a list of two numbers"),
        ({"inner": {"count": 1}, "label": ""}, "label is ''; allowed: a text"),
        ({"inner": {"count": 1}, "shares": {"a": "b"}}, "shares.a is 'b'; allowed: a number"),
        ({"inner": {"count": 1}, "path": 1}, "path is 1; allowed: a path"),
    ],
)
def test_errors_name_key_value_and_what_is_allowed(values: dict, message: str):
    with pytest.raises(InputError, match=message):
        make_dataclass(Outer, values, "outer.yaml", name="given")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a: [", "is no YAML"), (b"\xff", "is no YAML"), (b"[1]", "holds a list"), (b"1: 2", "holds a dict")],
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
    with pytest.raises(InputError, match="more than 3 bytes"):
        read_yaml(path, "The recipe", max_bytes=3)


def test_overrides():
    assert parse_override("a=1e-1", "a=1") == ("a", "1e-1")
    assert parse_override("a=", "a=1") == ("a", None)
    for text, message in (
        ("a", "'a' is no override; allowed: key=value, such as a=1"),
        ("a=[", "a is .*no YAML value"),
    ):
        with pytest.raises(InputError, match=message):
            parse_override(text, "a=1")


def test_the_examples_are_true():
    assert doctest.testmod(yaml_config).failed == 0 < doctest.testmod(yaml_config).attempted
