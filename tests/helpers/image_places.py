"""The places where an image is opened, each on its own way: what became of a file there."""

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from fusion_hf.common.errors import InputError
from fusion_hf.data.image_files import open_record_image
from fusion_hf.data.record_parsing import RecordProblem
from fusion_hf.inference import ChatModel
from fusion_hf.model.image_limits_fusion import ImageError
from fusion_hf.model.image_opening_fusion import BROKEN_IMAGE, FORMATS, open_image
from fusion_hf.model.image_processing_fusion import FusionImageProcessor
from fusion_hf.serving.api_errors import ApiError
from fusion_hf.serving.client_images import decode_client_image


@dataclass(frozen=True)
class Outcome:
    """Size and pixels of an image, or why there is none. Another error than the documented ones is raised."""

    pixels: tuple[tuple[int, int], bytes] | None = None
    words: str = ""


def of_opener(content: bytes, max_pixels: int) -> Outcome:
    """The function that all others call; its words are a reason, without what they put around it."""
    try:
        return _seen(open_image(content, max_pixels))
    except ImageError as error:
        return Outcome(words=error.reason)


def of_processor(path: Path, max_pixels: int) -> Outcome:
    """A path, as `ask` and the collator have it."""
    processor = FusionImageProcessor(size={"height": 8, "width": 8})
    try:
        image = processor.fetch_images(str(path))
        processor(image, max_image_pixels=max_pixels)
        return _seen(processor.process_image(image, max_image_pixels=max_pixels))
    except ValueError as error:
        return Outcome(words=str(error))


def of_opened(content: bytes, max_pixels: int) -> Outcome:
    """An image that the caller has opened with PIL, as a program may; opening it may fail in any way."""
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except (*BROKEN_IMAGE, UnidentifiedImageError) as error:
        return Outcome(words=str(error))
    try:
        return _seen(FusionImageProcessor().process_image(image, max_image_pixels=max_pixels))
    except ValueError as error:
        return Outcome(words=str(error))


def of_reader(path: Path, max_pixels: int) -> Outcome:
    """The image of a training record."""
    try:
        return _seen(open_record_image(path.name, path.parent, max_pixels))
    except RecordProblem as error:
        return Outcome(words=str(error))


def of_ask(path: Path, chat_model: ChatModel) -> Outcome:
    """What `fusion-hf ask` opens."""
    try:
        return _seen(chat_model.open_image(str(path)))
    except InputError as error:
        return Outcome(words=str(error))


def of_server(content: bytes, chat_model: ChatModel, max_pixels: int) -> Outcome:
    """What `fusion-hf serve` makes of a client's bytes."""
    try:
        return _seen(decode_client_image(content, chat_model.processor.image_processor, max_pixels))
    except ApiError as error:
        return Outcome(words=str(error))


def _seen(image: Image.Image) -> Outcome:
    assert image.mode == "RGB"
    return Outcome((image.size, image.tobytes()))
