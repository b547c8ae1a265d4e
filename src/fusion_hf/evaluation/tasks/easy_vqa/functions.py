"""What the task easy_vqa shows and counts."""

from typing import Any

from PIL import Image

YES_NO = ("yes", "no")


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    with Image.open(doc["image"]) as image:
        return [image.convert("RGB")]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Exact match: of all questions, and of those that are answered by yes or no, or of the others."""
    hit = float(results[0].strip() == doc["answer"])
    kind = "exact_match_yes_no" if doc["answer"] in YES_NO else "exact_match_not_yes_no"
    return {"exact_match": hit, kind: hit}
