"""The categories of synthesized data: each is one file in `synthesis/categories`."""

import hashlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Template
from typing import Annotated, Any, Literal, TypeAlias

from fusion_hf.common.errors import InputError
from fusion_hf.common.yaml_config import allow, make_dataclass, read_yaml_keys

FOLDER = Path(__file__).parent / "categories"
DESCRIBE_NAMES = frozenset({"caption"})
CHECK_NAMES = frozenset({"description", "conversation"})
MOST_SCORE = 5  # of a judge
QA_NAMES = {1: frozenset({"description", "style"}), 2: frozenset({"first", "second", "style"})}  # by images


def _text(value: str) -> str:
    if not value.strip():
        raise ValueError("a text that is not blank")
    return value.strip()


Text: TypeAlias = Annotated[str, _text]
Share: TypeAlias = Annotated[float, allow("a number above 0 and up to 1", lambda value: 0 < value <= 1)]
Turns: TypeAlias = Annotated[
    tuple[int, ...],
    allow(
        "a list of the least and the most turns, whole numbers from 1",
        lambda turns: len(turns) == 2 and 1 <= turns[0] <= turns[1],
    ),
]
Score: TypeAlias = Annotated[
    int, allow(f"a whole number from 1 to {MOST_SCORE}", range(1, MOST_SCORE + 1).__contains__)
]


def _prompt(names: frozenset[str]) -> Callable[[str], str]:
    """A check of a text that must have exactly these placeholders."""

    def check(value: str) -> str:
        text = _text(value)
        found = _placeholders(text)
        if found != names:
            raise ValueError(f"the placeholders {_written(names)}; it has {_written(found) or 'none'}")
        return text

    return check


def _placeholders(text: str) -> set[str]:
    matches = Template.pattern.finditer(text)
    return {match["named"] or match["braced"] or match[0] for match in matches if not match["escaped"]}


def _written(names: Iterable[str]) -> str:
    return ", ".join(f"${name}" for name in sorted(names))


def _schema(value: str) -> str:
    from fusion_hf.synthesis.schemas import SCHEMAS  # pydantic is of an extra

    if value not in SCHEMAS:
        raise ValueError(", ".join(map(repr, SCHEMAS)))
    return value


@dataclass(frozen=True)
class Style:
    """One way of asking, and the share of records that get it."""

    text: Text
    share: Share


@dataclass(frozen=True)
class ModelCheck:
    """
    What a model is asked about a finished record.

    Attributes:
        prompt: has `$description` and `$conversation`.
        least_score: of 1 to 5; a record with a lower one is rejected.
    """

    prompt: Annotated[str, _prompt(CHECK_NAMES)]
    least_score: Score


@dataclass(frozen=True)
class Category:
    """
    One kind of training data.

    Attributes:
        stage: of training, "1" or "1.5".
        pictures: images of a record: 1, or 2 for a pair that is composed into one.
        share: of the records of the mix of all categories.
        schema: name of the writer's answer in `synthesis.schemas`.
        describe_prompt: of the scene description; has `$caption`.
        turns: the least and the most of a record.
        qa_prompt: of questions and answers; has `$description` (or `$first` and `$second`) and `$style`.
        styles: one of them is drawn for each record.
        rules: settings of filters by their name.
        judge: what a language model scores.
        image_check: what a vision-language model scores, with the image before it.
    """

    name: str
    stage: Literal["1", "1.5"]
    pictures: Literal[1, 2]
    share: Share
    schema: Annotated[str, _schema]
    turns: Turns
    describe_prompt: Annotated[str, _prompt(DESCRIBE_NAMES)]
    qa_prompt: Text
    styles: Annotated[tuple[Style, ...], allow("a list of mappings with text and share", bool)]
    rules: dict[str, dict[str, Any]]  # `build_filters` checks them
    judge: ModelCheck
    image_check: ModelCheck

    def __post_init__(self) -> None:
        if (found := _placeholders(self.qa_prompt)) != (names := QA_NAMES[self.pictures]):
            raise ValueError(f"qa_prompt has the placeholders {_written(found)}; allowed: {_written(names)}.")

    def describe(self, caption: str) -> str:
        """Write the prompt that asks for a description."""
        return Template(self.describe_prompt).substitute(caption=caption)

    def ask(self, descriptions: tuple[str, ...], seed: int) -> str:
        """
        Write the prompt that asks for questions and answers, in a style drawn by the seed.

        Raises:
            ValueError: if there is not one description for each image.
        """
        if len(descriptions) != self.pictures:
            raise ValueError(f"{self.name} has {len(descriptions)} descriptions; allowed: {self.pictures}")
        names = ("description",) if self.pictures == 1 else ("first", "second")
        values = dict(zip(names, descriptions, strict=True))
        return Template(self.qa_prompt).substitute(values, style=self.style(seed).text)

    def style(self, seed: int) -> Style:
        """Choose the one of this seed."""
        shares = [style.share for style in self.styles]
        return random.Random(f"{self.name}/style/{seed}").choices(self.styles, shares)[0]

    @property
    def prompts_hash(self) -> str:
        """SHA-256 of all prompts, in hexadecimal digits."""
        texts = [self.describe_prompt, self.qa_prompt, *(style.text for style in self.styles)]
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()


@cache
def load_categories(folder: Path = FOLDER) -> dict[str, Category]:
    """
    Load all categories of a folder by name, in the order of their files' names.

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
    values = read_yaml_keys(path, "The category")
    return make_dataclass(Category, values, path.name, name=path.stem)
