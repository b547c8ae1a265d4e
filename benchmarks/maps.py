"""Whether attention maps of fusion-nano lie on the shape that a question of easy-vqa is about.

    python benchmarks/maps.py --threads 1 --output benchmarks/results/maps_cpu.json
    python benchmarks/report.py

Each image of easy-vqa shows one shape. For questions about its kind or colour, a map's maximum is on its pixels
or not; chance is the shape's share of the image. Shapes are never at the very edge, so the same maximum is also held
against the shape of another image. The mass is the map's share on the shape, by the shape's share of the image.
"""

import argparse
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from measure import add_machine_options, parse_on_machine, positive, surroundings, write_result
from PIL import Image
from tqdm import tqdm

from fusion_hf.data.easy_vqa import read_easy_vqa
from fusion_hf.drawing.drawn_questions import parse_easy_vqa
from fusion_hf.inference import ChatModel
from fusion_hf.maps import AttentionMaps, attention_maps

SEED = 11
LEAST_DIFFERENCE = (
    40  # minimum difference of a shape's pixels from the background in one channel, since edges are blended
)
ALL_LAYERS = "all"


class Asked(NamedTuple):
    """A question about the only shape of an image."""

    path: Path
    question: str
    answer: str
    attribute: str


class Found(NamedTuple):
    """One map of a question. `mass` is 1 if the map is uniform."""

    on_shape: bool
    on_other: bool
    mass: float


def questions_about_shapes() -> list[Asked]:
    """Return all questions of the test split that ask for the kind or colour of the shape."""
    asked = []
    for image in read_easy_vqa("test"):
        for question, answer in image.questions:
            parsed = parse_easy_vqa(question, answer)
            if parsed.candidate is None:
                asked.append(Asked(image.path, question, answer, parsed.asks))
    return asked


def shape_mask(image: Image.Image) -> np.ndarray:
    """Return where the shape is, booleans `(H, W)`: all pixels that differ from the most frequent colour."""
    pixels = np.asarray(image.convert("RGB")).astype(int)
    background = Counter(map(tuple, pixels.reshape(-1, 3).tolist())).most_common(1)[0][0]
    return np.abs(pixels - np.array(background)).max(-1) > LEAST_DIFFERENCE


def overlays(result: AttentionMaps) -> Iterator[tuple[str, str, np.ndarray]]:
    """
    Yield kind, layers and map `(H, W)` over all tokens of a question, turn or answer, by group of layers and for
    all layers.
    """
    for kind, maps in result.kinds().items():
        rows = [row for word in maps.words for row in range(word.first, word.end)]
        groups = maps.view.resize(maps.values[:, rows].mean(1))  # (G, H, W)
        for layers, overlay in zip(maps.layers, groups, strict=True):
            yield kind, ", ".join(map(str, layers)), overlay
        yield kind, ALL_LAYERS, groups.mean(0)


def find(overlay: np.ndarray, mask: np.ndarray, other: np.ndarray) -> Found:
    """Evaluate one map. `other` is the shape of another image."""
    place = np.unravel_index(overlay.argmax(), overlay.shape)
    return Found(bool(mask[place]), bool(other[place]), float(overlay[mask].sum() / overlay.sum() / mask.mean()))


def summarize_found(found: Sequence[Found]) -> dict[str, Any]:
    return {
        "on_shape": sum(one.on_shape for one in found),
        "on_other": sum(one.on_other for one in found),
        "mass": float(np.mean([one.mass for one in found])),
        "mass_above_one": sum(one.mass > 1 for one in found),
    }


def measure(chat_model: ChatModel, asked: Sequence[Asked]) -> dict[str, Any]:
    """Count the results over all questions, by kind of map and layers."""
    masks = {one.path: shape_mask(chat_model.open_image(str(one.path))) for one in asked}
    found: dict[str, dict[str, list[Found]]] = defaultdict(lambda: defaultdict(list))
    right = 0
    for index, one in enumerate(tqdm(asked, desc="maps", unit="question")):
        other = next(path for path in (asked[index - step].path for step in range(1, len(asked))) if path != one.path)
        result = attention_maps(str(one.path), one.question, chat_model)
        right += result.answer == one.answer
        for kind, layers, overlay in overlays(result):
            found[kind][layers].append(find(overlay, masks[one.path], masks[other]))
    return {
        "questions": len(asked),
        "attributes": dict(Counter(one.attribute for one in asked)),
        "right": right,
        "chance": float(np.mean([masks[one.path].mean() for one in asked])),
        "kinds": {
            kind: {layers: summarize_found(values) for layers, values in groups.items()}
            for kind, groups in found.items()
        },
    }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=positive, default=10_000, help="maximum number of test questions")
    add_machine_options(parser)
    return parser


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse_on_machine(make_parser(), arguments)
    asked = questions_about_shapes()
    chosen = random.Random(SEED).sample(asked, min(options.questions, len(asked)))
    chat_model = ChatModel.load(device=options.device, dtype=options.dtype)
    names = ("questions", "dtype", "device", "threads")
    result = {
        "settings": {name: getattr(options, name) for name in names},
        **surroundings(options.device),
        **measure(chat_model, chosen),
    }
    write_result(result, options.output)
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main()
