"""The categories of synthesized data: each is one file in `synthesis/categories`."""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from fusion_hf.common.errors import InputError, short_name

if TYPE_CHECKING:
    from pydantic import BaseModel

FOLDER = Path(__file__).parent / "categories"
STAGES = ("1", "1.5")  # of training: alignment, instruction
PICTURES = (1, 2)
DESCRIBE_NAMES = frozenset({"caption"})
CHECK_NAMES = frozenset({"description", "conversation"})
MOST_SCORE = 5  # of a judge
QA_NAMES = {1: frozenset({"description", "style"}), 2: frozenset({"first", "second", "style"})}  # by pictures


@dataclass(frozen=True)
class Style:
    """One way of asking, and the share of records that get it."""

    text: str
    share: float


@dataclass(frozen=True)
class Turns:
    """Least and most turns of a record."""

    least: int
    most: int


@dataclass(frozen=True)
class Check:
    """
    What a model is asked about a finished record.

    Attributes:
        prompt: has `$description` and `$conversation`.
        least_score: of 1 to 5; a record with a lower one is rejected.
    """

    prompt: str
    least_score: int


@dataclass(frozen=True)
class Category:
    """
    One kind of training data.

    Attributes:
        stage: of training, "1" or "1.5".
        pictures: 1, or 2 for a pair that is composed into one.
        share: of the records of the mix of all categories.
        schema: name of the writer's answer in `synthesis.schemas`.
        describe_prompt: of the scene description; has `$caption`.
        qa_prompt: of questions and answers; has `$description` (or `$first` and `$second`) and `$style`.
        styles: one of them is drawn for each record.
        rules: settings of filters by their name.
        judge: what a language model scores.
        image_check: what a vision-language model scores, with the picture before it.
    """

    name: str
    stage: str
    pictures: int
    share: float
    schema: str
    turns: Turns
    describe_prompt: str
    qa_prompt: str
    styles: tuple[Style, ...]
    rules: Mapping[str, Mapping[str, Any]]
    judge: Check
    image_check: Check

    def describe(self, caption: str) -> str:
        """The prompt that asks for a description."""
        return Template(self.describe_prompt).substitute(caption=caption)

    def ask(self, descriptions: tuple[str, ...], seed: int) -> str:
        """
        The prompt that asks for questions and answers, in a style drawn by the seed.

        Raises:
            ValueError: if there is not one description for each picture.
        """
        if len(descriptions) != self.pictures:
            raise ValueError(f"{self.name} has {len(descriptions)} descriptions; allowed: {self.pictures}")
        names = ("description",) if self.pictures == 1 else ("first", "second")
        values = dict(zip(names, descriptions, strict=True))
        return Template(self.qa_prompt).substitute(values, style=self.style(seed).text)

    def style(self, seed: int) -> Style:
        """The one of this seed."""
        shares = [style.share for style in self.styles]
        return random.Random(f"{self.name}/style/{seed}").choices(self.styles, shares)[0]

    def describe_model(self) -> "type[BaseModel]":
        """The pydantic model of a description, or of a pair of them."""
        from fusion_hf.synthesis.schemas import DESCRIBE_SCHEMAS  # pydantic is of an extra

        return DESCRIBE_SCHEMAS[self.pictures]

    def answer_model(self) -> "type[BaseModel]":
        """The pydantic model of questions and answers, with as many turns as the category has."""
        from fusion_hf.synthesis.schemas import answer_model

        return answer_model(self.schema, self.turns.least, self.turns.most)

    @property
    def prompts_hash(self) -> str:
        """SHA-256 of all prompts, in hexadecimal digits."""
        texts = [self.describe_prompt, self.qa_prompt, *(style.text for style in self.styles)]
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()


@cache
def load_categories(folder: Path = FOLDER) -> dict[str, Category]:
    """
    All categories of a folder by name, in the order of their files' names.

    Raises:
        InputError: for a file that is no category, or if there is none.
    """
    categories = [read_category(path) for path in sorted(folder.glob("*.yaml"))]
    if not categories:
        raise InputError(f"categories: there is no .yaml file in {folder}.")
    return {category.name: category for category in categories}


def read_category(path: Path) -> Category:
    """
    Raises:
        InputError: naming the key, its value and what is allowed.
    """
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ImportError("the data engine needs pyyaml: pip install fusion_hf[synth]") from error
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as YAML ({error}).") from error
    return _Reader(path).category(values)


class _Reader:
    """Turns the values of one file into a category; errors begin with the file's name."""

    def __init__(self, path: Path):
        self.path = path

    def error(self, key: str, value: Any, allowed: str) -> InputError:
        return InputError(f"{self.path.name}: {key} is {short_name(repr(value))}; allowed: {allowed}.")

    def category(self, values: Any) -> Category:
        names = {entry.name for entry in fields(Category)} - {"name"}
        self.keys("the file", values, names)
        pictures = self.among("pictures", values["pictures"], PICTURES)
        prompts = {
            "describe_prompt": self.prompt("describe_prompt", values["describe_prompt"], DESCRIBE_NAMES),
            "qa_prompt": self.prompt("qa_prompt", values["qa_prompt"], QA_NAMES[pictures]),
        }
        return Category(
            name=self.path.stem,
            stage=self.among("stage", values["stage"], STAGES),
            pictures=pictures,
            share=self.share("share", values["share"]),
            schema=self.schema(values["schema"]),
            turns=self.turns(values["turns"]),
            styles=self.styles(values["styles"]),
            rules=self.rules(values["rules"]),
            judge=self.check("judge", values["judge"]),
            image_check=self.check("image_check", values["image_check"]),
            **prompts,
        )

    def keys(self, key: str, value: Any, names: set[str]) -> None:
        """A mapping with exactly these keys."""
        if not isinstance(value, dict):
            raise self.error(key, value, "a mapping")
        for name in value:
            if name not in names:
                raise self.error(f"a key of {key}", name, ", ".join(sorted(names)))
        for name in sorted(names - value.keys()):
            raise InputError(f"{self.path.name}: {key} has no key {name}; it needs one.")

    def among(self, key: str, value: Any, allowed: tuple[Any, ...]) -> Any:
        if type(value) is not type(allowed[0]) or value not in allowed:
            raise self.error(key, value, ", ".join(map(repr, allowed)))
        return value

    def text(self, key: str, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            raise self.error(key, value, "a text")
        return value.strip()

    def prompt(self, key: str, value: Any, names: frozenset[str]) -> str:
        """A text with exactly these placeholders."""
        text = self.text(key, value)
        matches = list(Template.pattern.finditer(text))
        found = {match["named"] or match["braced"] or match[0] for match in matches if not match["escaped"]}
        if found != names:
            raise self.error(f"{key}'s placeholders", sorted(found), ", ".join(f"${name}" for name in sorted(names)))
        return text

    def share(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
            raise self.error(key, value, "a number above 0 and up to 1")
        return float(value)

    def count(self, key: str, value: Any, least: int = 1, most: int | None = None) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least or (most and value > most):
            raise self.error(key, value, f"a whole number from {least}" + (f" to {most}" if most else ""))
        return value

    def schema(self, value: Any) -> str:
        from fusion_hf.synthesis.schemas import SCHEMAS

        return self.among("schema", value, tuple(SCHEMAS))

    def turns(self, value: Any) -> Turns:
        if not isinstance(value, list) or len(value) != len(fields(Turns)):
            raise self.error("turns", value, "a list of the least and the most turns")
        least = self.count("turns", value[0])
        return Turns(least, self.count("turns", value[1], least))

    def styles(self, value: Any) -> tuple[Style, ...]:
        if not isinstance(value, list) or not value:
            raise self.error("styles", value, "a list of mappings with text and share")
        found = []
        for item in value:
            self.keys("a style", item, {"text", "share"})
            found.append(Style(self.text("text of a style", item["text"]), self.share("share", item["share"])))
        return tuple(found)

    def rules(self, value: Any) -> dict[str, dict[str, Any]]:
        """Names and settings are checked by `synthesis.filters.build_filters`."""
        if not isinstance(value, dict):
            raise self.error("rules", value, "a mapping of filters to their settings")
        for name, settings in value.items():
            if not isinstance(settings, dict):
                raise self.error(f"rules.{name}", settings, "a mapping of settings, {} for none")
        return value

    def check(self, key: str, value: Any) -> Check:
        self.keys(key, value, {"prompt", "least_score"})
        prompt = self.prompt(f"{key}.prompt", value["prompt"], CHECK_NAMES)
        return Check(prompt, self.count(f"{key}.least_score", value["least_score"], 1, MOST_SCORE))
