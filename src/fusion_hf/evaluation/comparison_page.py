"""Write the answers that changed between two runs as one HTML file with their images."""

import html
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from fusion_hf.common.endpoints import data_uri
from fusion_hf.evaluation.run_answers import RunAnswers
from fusion_hf.evaluation.run_comparison import BETTER, SAME, SIDES, UNKNOWN, WORSE, Pair, TaskComparison
from fusion_hf.evaluation.task_images import TaskImages
from fusion_hf.model.image_opening_fusion import ImageError, open_image

MOST = 100  # maximum number of examples per task and direction, which keeps a page below 10 MB
SIDE = 320  # size of an image on the page in pixels
DIRECTIONS = (WORSE, BETTER, SAME, UNKNOWN)
JPEG = "image/jpeg"
STYLE = (
    "body{font-family:sans-serif;max-width:70em;margin:auto;padding:1em}"
    "article{display:flex;gap:1em;border-top:1px solid #ccc;padding:1em 0}"
    "figure{margin:0;flex:0 0 320px}img{max-width:320px}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0}td{vertical-align:top;padding:0 .5em .3em 0}"
)


def write_page(first: RunAnswers, second: RunAnswers, tasks: Sequence[TaskComparison]) -> str:
    """
    Write the page of a comparison.

    Args:
        first: the first run.
        second: the second run.
        tasks: the comparison of `compare_runs`.

    Returns:
        The HTML.
    """
    data = [TaskImages(run.record) for run in (first, second)]
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Changed answers</title>',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">",
        f"<style>{STYLE}</style><h1>Changed answers</h1>",
        *(f"<p>{side}: {_text(str(run.path))}</p>" for side, run in zip(SIDES, (first, second), strict=True)),
    ]
    for task in tasks:
        parts.append(f"<h2>{_text(task.task)}: {len(task.changed)} of {len(task.pairs)} answers changed</h2>")
        parts += [f"<p>{_text(note)}</p>" for note in task.notes]
        parts += _examples(task, data)
    return "\n".join([*parts, "</html>"]) + "\n"


def _examples(task: TaskComparison, data: Sequence[TaskImages]) -> Iterator[str]:
    for direction in DIRECTIONS:
        pairs = [pair for pair in task.changed if task.direction(pair) == direction]
        if not pairs:
            continue
        shown = f", the first {MOST}" if len(pairs) > MOST else ""
        yield f"<h3>{_text(direction)} in {SIDES[1]}: {len(pairs)}{shown}</h3>"
        yield from (_example(pair, _image(task.task, pair, data)) for pair in pairs[:MOST])


def _example(pair: Pair, image: str) -> str:
    target = pair.first.target if pair.first.target is not None else pair.second.target
    rows = {
        "question": pair.question,
        "right answer": target,
        SIDES[0]: f"{pair.first.answer}{_scores(pair.first.scores)}",
        SIDES[1]: f"{pair.second.answer}{_scores(pair.second.scores)}",
    }
    cells = "".join(
        f"<tr><td>{name}</td><td><pre>{_text(value)}</pre></td></tr>"
        for name, value in rows.items()
        if value is not None
    )
    return (
        f"<article><figure>{image}<figcaption>question {pair.first.doc_id}</figcaption></figure>"
        f"<table>{cells}</table></article>"
    )


def _scores(scores: dict[str, float]) -> str:
    return f"\n[{', '.join(f'{name} {value:g}' for name, value in scores.items())}]" if scores else ""


def _image(task: str, pair: Pair, data: Sequence[TaskImages]) -> str:
    """Return an image from its file or, if no run names one, from the data of the task."""
    path = pair.first.image or pair.second.image
    if path is None:
        found = (images.find(task, pair.first.doc_id) for images in data)
        image = next((each for each in found if each is not None), None)
        return "<p>Neither run names the file of this image.</p>" if image is None else _shown(image.convert("RGB"))
    try:
        return _shown(open_image(Path(path)))
    except ImageError as error:
        return f"<p>{_text(path)} cannot be shown: {_text(str(error))}</p>"


def _shown(image: Image.Image) -> str:
    image.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    image.save(stream, "JPEG")
    return f'<img alt="" src="{data_uri(stream.getvalue(), JPEG)}">'


def _text(text: str) -> str:
    return html.escape(text.encode("utf-8", "backslashreplace").decode())
