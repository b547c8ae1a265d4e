"""Pairs of scenes that are alike but for one thing."""

import random
from dataclasses import dataclass, replace

from fusion_hf.drawing.drawn_images import COLORS, COUNT_GRID, MAX_COUNT, SHAPES, DrawnShape, place_word
from fusion_hf.synthesis.procedural.scenes import (
    CANVAS_SIDE,
    EVERYTHING,
    Scene,
    exact_scene,
    place_of,
    reshaped,
    shapes_scene,
    sign_scene,
    sign_text,
    writing_scene,
    written_text,
)

CELL = CANVAS_SIDE / COUNT_GRID


@dataclass(frozen=True)
class SceneDifference:
    """
    What differs between two scenes.

    Attributes:
        what: "color", "kind", "place", "count" or "text".
        subject: what is changed, named by what is the same in both.
        first, second: how it is in either.
    """

    what: str
    subject: str
    first: str
    second: str


@dataclass(frozen=True)
class ScenePair:
    """Two scenes and their one difference."""

    first: Scene
    second: Scene
    difference: SceneDifference

    def worded(self, wording: int) -> "ScenePair":
        """The same pair with both descriptions in this wording: they differ in nothing but the one thing."""
        first, second = (replace(scene, wording=wording, counted=(EVERYTHING,)) for scene in (self.first, self.second))
        return ScenePair(first, second, self.difference)


def draw_pair(rng: random.Random) -> ScenePair:
    """Draw a scene, and the same with one change."""
    change = rng.choice(CHANGES)
    if change is change_count:
        scene = _countable(rng)
    elif change is change_text:
        scene = writing_scene(rng)
    else:
        scene = shapes_scene(rng)
    pair = change(scene, rng)
    if rng.random() < 1 / 2:
        return pair
    swapped = replace(pair.difference, first=pair.difference.second, second=pair.difference.first)
    return ScenePair(pair.second, pair.first, swapped)


def _countable(rng: random.Random) -> Scene:
    """One to `MAX_COUNT` shapes, each number as likely; a text stands beside a single one, and stays without it."""
    total = rng.randint(1, MAX_COUNT)
    scene = exact_scene(rng, total) if total > 1 else sign_scene(rng)
    return replace(scene, spec=replace(scene.spec, shapes=scene.shapes[:total]))


def _with_shape(scene: Scene, index: int, shape: DrawnShape) -> Scene:
    shapes = (*scene.shapes[:index], shape, *scene.shapes[index + 1 :])
    return Scene(replace(scene.spec, shapes=shapes))


def change_color(scene: Scene, rng: random.Random) -> ScenePair:
    """One shape in another colour."""
    index = rng.randrange(len(scene.shapes))
    shape = scene.shapes[index]
    color = rng.choice([color for color in COLORS if color != shape.color])
    second = _with_shape(scene, index, replace(shape, color=color))
    difference = SceneDifference("color", f"the {shape.kind} {place_of(shape)}", shape.color, color)
    return ScenePair(scene, second, difference)


def change_kind(scene: Scene, rng: random.Random) -> ScenePair:
    """One shape of another kind in its place."""
    index = rng.randrange(len(scene.shapes))
    shape = scene.shapes[index]
    kind = rng.choice([kind for kind in SHAPES if kind != shape.kind])
    second = _with_shape(scene, index, reshaped(shape, kind, rng))
    difference = SceneDifference("kind", f"the {shape.color} shape {place_of(shape)}", f"a {shape.kind}", f"a {kind}")
    return ScenePair(scene, second, difference)


def change_place(scene: Scene, rng: random.Random) -> ScenePair:
    """One shape that is the only one of its name in a free place."""
    single = [index for index, shape in enumerate(scene.shapes) if scene.names[shape.name] == 1]
    if not single:
        return change_color(scene, rng)
    index = rng.choice(single)
    shape = scene.shapes[index]
    second = _with_shape(scene, index, _in_free_cell(scene, shape, rng))
    places = place_of(shape), place_of(second.shapes[index])
    return ScenePair(scene, second, SceneDifference("place", f"the {shape.name}", *places))


def change_count(scene: Scene, rng: random.Random) -> ScenePair:
    """One shape less."""
    index = rng.randrange(len(scene.shapes))
    name = scene.shapes[index].name
    shapes = (*scene.shapes[:index], *scene.shapes[index + 1 :])
    second = Scene(replace(scene.spec, shapes=shapes))
    counts = (str(scene.names[name]), str(second.names[name]))
    return ScenePair(scene, second, SceneDifference("count", name, *counts))


def change_text(scene: Scene, rng: random.Random) -> ScenePair:
    """Another word or number on the sign."""
    word = scene.spec.word
    assert word is not None, "a sign has one"
    text = written_text(rng)
    while text == word.text:
        text = written_text(rng)
    if scene.shapes:
        changed = sign_text(text, word.color, rng, scene.text_is_below)
    else:
        changed = place_word(text, word.color, rng)
    second = Scene(replace(scene.spec, word=changed))
    return ScenePair(scene, second, SceneDifference("text", "the writing", f'"{word.text}"', f'"{text}"'))


CHANGES = (change_color, change_kind, change_place, change_count, change_text)


def _in_free_cell(scene: Scene, shape: DrawnShape, rng: random.Random) -> DrawnShape:
    taken = {tuple(int(middle / CELL) for middle in other.center) for other in scene.shapes}
    cells = [(column, row) for column in range(COUNT_GRID) for row in range(COUNT_GRID)]
    column, row = rng.choice([cell for cell in cells if cell not in taken])
    left, top = column * CELL + (CELL - shape.width) / 2, row * CELL + (CELL - shape.height) / 2
    return replace(shape, left=round(left), top=round(top))
