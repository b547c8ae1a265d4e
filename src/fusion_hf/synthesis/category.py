"""The categories of synthesized data. Each one is a file in `synthesis/categories`."""

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
MOST_SCORE = 5  # the best score of a judge
QA_NAMES = {1: frozenset({"description", "style"}), 2: frozenset({"first", "second", "style"})}  # by number of images


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
    """Make a check for a text that must have exactly these placeholders."""

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
    from fusion_hf.synthesis.schemas import SCHEMAS  # pydantic belongs to an extra

    if value not in SCHEMAS:
        raise ValueError(", ".join(map(repr, SCHEMAS)))
    return value


@dataclass(frozen=True)
class Style:
    """One style of question, and the share of records that get it."""

    text: Text
    share: Share


@dataclass(frozen=True)
class ModelCheck:
    """
    A check of finished records by a model.

    Attributes:
        prompt: the prompt, with the placeholders `$description` and `$conversation`.
        least_score: the minimum score from 1 to 5. Records with a lower one are rejected.
    """

    prompt: Annotated[str, _prompt(CHECK_NAMES)]
    least_score: Score


@dataclass(frozen=True)
class Category:
    """
    One kind of training data.

    Attributes:
        name: the name of the category.
        stage: the training stage, "1" or "1.5".
        pictures: the number of images of a record: 1, or 2 for a pair that is composed into one image.
        share: the share of this category in the mix of all categories, above 0 and up to 1.
        schema: the name of the writer's answer format in `synthesis.schemas`.
        turns: the minimum and maximum number of turns of a record.
        describe_prompt: the prompt for the scene description, with the placeholder `$caption`.
        qa_prompt: the prompt for questions and answers, with the placeholders `$description` (or `$first` and
            `$second`) and `$style`.
        styles: the styles, of which one is drawn for each record.
        rules: the settings of filters, by filter name.
        judge: the check by a language model.
        image_check: the check by a vision-language model that sees the image.
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
    rules: dict[str, dict[str, Any]]  # checked by `build_filters`
    judge: ModelCheck
    image_check: ModelCheck

    def __post_init__(self) -> None:
        if (found := _placeholders(self.qa_prompt)) != (names := QA_NAMES[self.pictures]):
            raise ValueError(f"`qa_prompt` must have the placeholders {_written(names)}, got {_written(found)}.")

    def describe(self, caption: str) -> str:
        """
        Return the prompt for a description.

        Args:
            caption: the caption to describe.
        """
        return Template(self.describe_prompt).substitute(caption=caption)

    def ask(self, descriptions: tuple[str, ...], seed: int) -> str:
        """
        Return the prompt for questions and answers, in a style that the seed selects.

        Args:
            descriptions: one description per image.
            seed: the seed of the record.

        Raises:
            ValueError: if the number of descriptions differs from the number of images.
        """
        if len(descriptions) != self.pictures:
            raise ValueError(f"{self.name} must have {self.pictures} descriptions, got {len(descriptions)}.")
        names = ("description",) if self.pictures == 1 else ("first", "second")
        values = dict(zip(names, descriptions, strict=True))
        return Template(self.qa_prompt).substitute(values, style=self.style(seed).text)

    def style(self, seed: int) -> Style:
        """
        Select a style.

        Args:
            seed: the seed of the record.
        """
        shares = [style.share for style in self.styles]
        return random.Random(f"{self.name}/style/{seed}").choices(self.styles, shares)[0]

    @property
    def prompts_hash(self) -> str:
        """SHA-256 of all prompts as hexadecimal digits."""
        texts = [self.describe_prompt, self.qa_prompt, *(style.text for style in self.styles)]
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()


@cache
def load_categories(folder: Path = FOLDER) -> dict[str, Category]:
    """
    Load all categories of a folder by name, sorted by file name.

    Args:
        folder: the folder. Defaults to the categories of this package.

    Raises:
        InputError: if a file is not a category, or the folder has none.
    """
    categories = [read_category(path) for path in sorted(folder.glob("*.yaml"))]
    if not categories:
        raise InputError(f"`categories` must be a folder with .yaml files, got {folder}.")
    return {category.name: category for category in categories}


def read_category(path: Path) -> Category:
    """
    Read a category.

    Args:
        path: the YAML file.

    Raises:
        InputError: if a key is invalid. The message names the key, its value and the allowed values.
    """
    values = read_yaml_keys(path, "The category")
    return make_dataclass(Category, values, path.name, name=path.stem)
