"""The step from descriptions to images, with a diffusers pipeline or an images endpoint. Files are written
atomically.
"""

import asyncio
import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from PIL import Image, PngImagePlugin

from fusion_hf.common.endpoint_client import EndpointClient
from fusion_hf.common.endpoints import IMAGES, RequestRejected, endpoint_url
from fusion_hf.common.errors import InputError
from fusion_hf.common.outputs import write_atomically
from fusion_hf.model.image_limits_fusion import ImageError
from fusion_hf.model.image_opening_fusion import open_image
from fusion_hf.synthesis.progress import Progress
from fusion_hf.synthesis.record_documents import TASK, put_record, record_of
from fusion_hf.synthesis.run_config import ImageSettings
from fusion_hf.synthesis.structured_answers import hash_prompt
from fusion_hf.synthesis.synth_record import StepOrigin, SynthRecord

STEP = "make_image"
RECORD_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
SPREAD = 2  # last characters of an id, which name its subfolder, since folders of millions of files are slow
MODEL, PROMPT, SEED, SETTINGS = "model", "prompt", "seed", "settings"  # keys of the texts in a PNG
GAP = 16  # pixels between the images of a pair at a height of 512
GAP_HEIGHT = 512
WHITE = (255, 255, 255)
MAX_PIXELS = 4096 * 4096
MAX_RESPONSE_BYTES = 2**26
FORMATS = ("PNG", "JPEG", "WEBP")
INSTALL = "Install the extra `synth`"
MadeImage: TypeAlias = Image.Image | str  # an image, or the reason why there is none


@dataclass(frozen=True)
class ImageRequest:
    """
    A request for one image.

    Attributes:
        file: the path relative to the folder of images.
        prompt: the description.
        seed: the seed of the image.
    """

    file: str
    prompt: str
    seed: int

    def texts(self, settings: ImageSettings) -> dict[str, str]:
        """
        Return the texts that the PNG holds. A file with other texts is a different image.

        Args:
            settings: the settings of the generator.
        """
        size = f"{settings.width}x{settings.height}, {settings.steps} steps, guidance {settings.guidance:g}"
        extra = "".join(f", {name}={value!r}" for name, value in sorted(settings.arguments.items()))
        return {MODEL: settings.model, PROMPT: self.prompt, SEED: str(self.seed), SETTINGS: size + extra}


def file_names(record: SynthRecord) -> tuple[str, ...]:
    """
    Return the files of a record's images, relative to the folder of images.

    Args:
        record: the record.

    Raises:
        ValueError: if its id cannot be part of a file name.
    """
    if RECORD_ID.fullmatch(record.id) is None:
        raise ValueError(f"`id` must consist of letters, digits, - and _, got {record.id!r}.")
    folder = record.id[-SPREAD:]
    return tuple(f"{folder}/{record.id}-{number}.png" for number in range(len(record.descriptions)))


class DiffusersGenerator:
    """
    A text-to-image pipeline of diffusers.

    Args:
        settings: the settings of the pipeline.
        task: the number of the task, which selects one of several GPUs.

    Raises:
        InputError: if the pipeline cannot be loaded.
    """

    def __init__(self, settings: ImageSettings, task: int = 0):
        try:
            import torch
            from diffusers import DiffusionPipeline
        except ImportError as error:
            raise InputError(
                f"Generating images with diffusers requires further packages ({error}). {INSTALL}."
            ) from error
        from fusion_hf.inference.devices import choose_device, choose_dtype

        device = choose_device(settings.device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", task % torch.cuda.device_count())
        try:
            pipeline = DiffusionPipeline.from_pretrained(
                settings.model, dtype=choose_dtype(settings.dtype, device), trust_remote_code=False
            )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
            raise InputError(
                f"`images.model` must be a pipeline of diffusers, got {settings.model}: {error}"
            ) from error
        for component in pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval()
        if settings.offload:
            pipeline.enable_model_cpu_offload(device=device)
        else:
            pipeline.to(device)
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline, self.settings, self.torch = pipeline, settings, torch

    def generate(self, requests: Sequence[ImageRequest]) -> list[MadeImage]:
        """
        Generate the images of a batch. Each image has a seed of its own.

        Args:
            requests: the requests.
        """
        generators = [self.torch.Generator("cpu").manual_seed(request.seed) for request in requests]
        made = self.pipeline(
            prompt=[request.prompt for request in requests],
            width=self.settings.width,
            height=self.settings.height,
            num_inference_steps=self.settings.steps,
            guidance_scale=self.settings.guidance,
            generator=generators,
            output_type="pil",
            **self.settings.arguments,
        )
        return [image.convert("RGB") for image in made.images]


class EndpointGenerator:
    """
    An endpoint with OpenAI's images API. Images must be in the response, since addresses in it are not followed.

    Args:
        settings: the settings of the endpoint.
    """

    def __init__(self, settings: ImageSettings):
        assert settings.url is not None, "checked by ImageSettings"
        self.settings = settings
        self.url = endpoint_url(settings.url, IMAGES)
        self.client = EndpointClient(
            settings.key_variable,
            settings.timeout,
            settings.patience,
            MAX_RESPONSE_BYTES,
            retries_timeouts=True,
            alive_since_begin=True,
        )

    def generate(self, requests: Sequence[ImageRequest]) -> list[MadeImage]:
        """
        Send one request per image, all concurrently.

        Args:
            requests: the requests.
        """
        return asyncio.run(self._generate(requests))

    async def _generate(self, requests: Sequence[ImageRequest]) -> list[MadeImage]:
        try:
            return list(await asyncio.gather(*map(self._one, requests)))
        finally:
            await self.client.close()

    async def _one(self, request: ImageRequest) -> MadeImage:
        payload = {
            "model": self.settings.model,
            "prompt": request.prompt,
            "size": f"{self.settings.width}x{self.settings.height}",
            "n": 1,
            "response_format": "b64_json",
            "seed": request.seed,
            **self.settings.arguments,
        }
        try:
            given = {name: value for name, value in payload.items() if value is not None}
            answer = await self.client.ask_async(self.url, given)
        except RequestRejected as error:
            return f"refused: {error}"
        try:
            content = base64.b64decode(answer["data"][0]["b64_json"], validate=True)
            return open_image(content, MAX_PIXELS, formats=FORMATS, exif_transpose=False)
        except ImageError as error:
            return f"the image cannot be used: {error.reason}"
        except (KeyError, IndexError, TypeError, binascii.Error) as error:
            return f"the response holds no picture as b64_json ({type(error).__name__})"


ImageGenerator: TypeAlias = DiffusersGenerator | EndpointGenerator


def make_generator(settings: ImageSettings, task: int = 0) -> ImageGenerator:
    """
    Make the generator that the settings name.

    Args:
        settings: the settings.
        task: the number of the task, which selects one of several GPUs.
    """
    return DiffusersGenerator(settings, task) if settings.kind == "diffusers" else EndpointGenerator(settings)


class MakeImages(PipelineStep):
    """
    Generate the images of records that are not rejected. Existing images with the same texts are kept.

    Batches always hold the same records, and are generated completely if one image is missing: rounding may depend on
    the other images of a batch, and a run that was killed must end with the same bytes.

    Args:
        settings: the settings of the generator.
        folder: the folder of images.
        progress: counts the records.
    """

    name = "Make image"
    type = "Pictures"

    def __init__(self, settings: ImageSettings, folder: Path, progress: Progress):
        super().__init__()
        self.settings = settings
        self.folder = folder
        self.progress = progress

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        generator: ImageGenerator | None = None
        documents = iter(data)
        while batch := list(islice(documents, self.settings.batch_size)):
            requests = [request for document in batch for request in self._requests(record_of(document))]
            if not all(self._is_there(request) for request in requests):
                generator = make_generator(self.settings, rank) if generator is None else generator
                with self.track_time(unit="batch"):
                    self._make(generator, requests)
            for document in batch:
                record = self._with_images(record_of(document))
                put_record(document, record)
                self.progress.count(document.metadata[TASK], record)
                yield document
        self.progress.flush()

    def _requests(self, record: SynthRecord) -> list[ImageRequest]:
        if record.rejection is not None:
            return []
        # a pair has one seed, so that equal parts of its descriptions look alike
        pairs = zip(file_names(record), record.descriptions, strict=True)
        return [ImageRequest(file, prompt, record.seed) for file, prompt in pairs]

    def _make(self, generator: ImageGenerator, requests: list[ImageRequest]) -> None:
        """Generate images. Pairs make a batch longer than its size, so it is split again."""
        for begin in range(0, len(requests), self.settings.batch_size):
            part = requests[begin : begin + self.settings.batch_size]
            for request, made in zip(part, generator.generate(part), strict=True):
                self._save(request, made)

    def _save(self, request: ImageRequest, made: MadeImage) -> None:
        path = self.folder / request.file
        # NaN values become black
        if not isinstance(made, str) and all(band.getextrema()[0] == band.getextrema()[1] for band in made.split()):
            made = "the picture has one colour alone"
        if isinstance(made, str):
            write_atomically(path.with_suffix(".txt"), made.encode())
        elif not self._is_there(request):
            write_atomically(path, encode_png(made, request.texts(self.settings)))

    def _is_there(self, request: ImageRequest) -> bool:
        path = self.folder / request.file
        return path.with_suffix(".txt").exists() or read_texts(path) == request.texts(self.settings)

    def _with_images(self, record: SynthRecord) -> SynthRecord:
        requests = self._requests(record)
        if not requests:
            return record
        for request in requests:
            note = (self.folder / request.file).with_suffix(".txt")
            if note.exists():
                return record.rejected(STEP, note.read_text())
        texts = "\0".join(request.prompt for request in requests)
        origin = StepOrigin(self.settings.model, hash_prompt(texts), record.seed)
        files = tuple(request.file for request in requests)
        if len(files) > 1:
            files = (self._compose(record, files),)
        return replace(record, images=files, origins={**record.origins, STEP: origin})

    def _compose(self, record: SynthRecord, files: tuple[str, ...]) -> str:
        """Save the pair as one image, next to its two images."""
        name = f"{record.id[-SPREAD:]}/{record.id}-pair.png"
        texts = {"left": files[0], "right": files[1]}
        if read_texts(self.folder / name) != texts:
            left, right = (Image.open(self.folder / file) for file in files)
            with left, right:
                write_atomically(self.folder / name, encode_png(compose_pair(left, right), texts))
        return name


def compose_pair(left: Image.Image, right: Image.Image) -> Image.Image:
    """
    Put two images side by side with a white gap. The right one is scaled to the height of the left one.

    Args:
        left: the left image.
        right: the right image.
    """
    left, right = left.convert("RGB"), right.convert("RGB")
    if right.height != left.height:
        width = max(round(right.width * left.height / right.height), 1)
        right = right.resize((width, left.height), Image.Resampling.BICUBIC)
    gap = max(round(GAP * left.height / GAP_HEIGHT), 1)
    whole = Image.new("RGB", (left.width + gap + right.width, left.height), WHITE)
    whole.paste(left, (0, 0))
    whole.paste(right, (left.width + gap, 0))
    return whole


def encode_png(image: Image.Image, texts: Mapping[str, str] | None = None) -> bytes:
    """
    Encode an image as PNG.

    Args:
        image: the image.
        texts: the texts to store in the file.
    """
    info = PngImagePlugin.PngInfo()
    for name, text in (texts or {}).items():
        info.add_itxt(name, text)
    stream = BytesIO()
    image.save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


def read_texts(path: Path) -> dict[str, str] | None:
    """
    Read the texts in a PNG.

    Args:
        path: the file.

    Returns:
        The texts, or None if there is no such file.
    """
    if not path.exists():
        return None
    with Image.open(path, formats=("PNG",)) as image:
        return {str(name): str(text) for name, text in image.info.items()}
