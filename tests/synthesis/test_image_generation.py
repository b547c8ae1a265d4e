"""Images: what makes them, what is in their files, and what is refused."""

import base64
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.helpers.image_files import encoded
from tests.helpers.openai_server import Scripted

from fusion_hf.common.errors import InputError
from fusion_hf.synthesis import image_generation
from fusion_hf.synthesis.image_generation import (
    DiffusersGenerator,
    EndpointGenerator,
    ImageRequest,
    MakeImages,
    compose_pair,
    file_names,
)
from fusion_hf.synthesis.progress import Progress
from fusion_hf.synthesis.record_documents import record_of, to_document
from fusion_hf.synthesis.run_config import ImageSettings
from fusion_hf.synthesis.synth_record import SynthRecord

SETTINGS = {"width": 32, "height": 24, "steps": 1, "device": "cpu", "arguments": {"max_sequence_length": 32}}
ORDERS = [
    ImageRequest("a", "a red ball", 1),
    ImageRequest("b", "a red ball", 2),
    ImageRequest("c", "two green dogs", 1),
]


@pytest.fixture
def settings(flux: Path) -> ImageSettings:
    return ImageSettings("diffusers", str(flux), batch_size=2, **SETTINGS)


def make_records(count: int, images: int = 1) -> list[SynthRecord]:
    texts = [tuple(f"thing {number} {side}" for side in range(images)) for number in range(count)]
    return [SynthRecord(f"r-{number:04d}", "SynthColor", "c", number, texts[number]) for number in range(count)]


def run_step(settings: ImageSettings, folder: Path, records: list[SynthRecord]) -> list[SynthRecord]:
    documents = [to_document(record, number, 0) for number, record in enumerate(records)]
    step = MakeImages(settings, folder / "pictures", Progress(folder / "progress", "images"))
    return [record_of(document) for document in step.run(documents)]


def test_an_image_follows_from_its_prompt_and_seed(settings: ImageSettings):
    generator = DiffusersGenerator(settings)
    first, again = generator.generate(ORDERS), generator.generate(ORDERS)
    assert [image.tobytes() for image in first] == [image.tobytes() for image in again]
    assert len({image.tobytes() for image in first}) == len(ORDERS)
    assert {image.size for image in first} == {(32, 24)}
    assert not generator.pipeline.transformer.training and not generator.pipeline.text_encoder.training


def test_what_is_there_is_not_made_again(settings: ImageSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    records = make_records(5)
    made = run_step(settings, tmp_path, records)
    files = [tmp_path / "pictures" / record.images[0] for record in made]
    times = [path.stat().st_mtime_ns for path in files]
    contents = [path.read_bytes() for path in files]
    files[1].unlink()
    counted: list[int] = []
    real = DiffusersGenerator.generate

    def generate(self: DiffusersGenerator, orders: list[ImageRequest]) -> Any:
        counted.append(len(orders))
        return real(self, orders)

    monkeypatch.setattr(DiffusersGenerator, "generate", generate)
    assert run_step(settings, tmp_path, records) == made
    assert counted == [2]  # its batch, as a whole
    assert [path.read_bytes() for path in files] == contents
    assert [path.stat().st_mtime_ns == time for path, time in zip(files, times, strict=True)] == [
        True,
        False,
        *[True] * 3,
    ]
    monkeypatch.setattr(
        image_generation, "make_generator", lambda *given: pytest.fail("a model was loaded for nothing")
    )
    run_step(settings, tmp_path, records)


def test_rejected_records_get_no_image(settings: ImageSettings, tmp_path: Path):
    records = [record.rejected("length", "too long") for record in make_records(2)]
    assert run_step(settings, tmp_path, records) == records
    assert not (tmp_path / "pictures").exists()


def test_a_missing_model_and_another_kind_of_file_are_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"`images.model` must be a pipeline of diffusers, got .*nothing"):
        DiffusersGenerator(ImageSettings("diffusers", str(tmp_path / "nothing"), device="cpu"))


def test_the_gpu_holds_only_what_works_if_asked(settings: ImageSettings, monkeypatch: pytest.MonkeyPatch):
    from diffusers import FluxPipeline

    asked = []
    monkeypatch.setattr(FluxPipeline, "enable_model_cpu_offload", lambda self, device: asked.append(device.type))
    DiffusersGenerator(ImageSettings("diffusers", settings.model, offload=True, **SETTINGS))
    assert asked == ["cpu"]


class Answering(EndpointGenerator):
    """An endpoint that gives what a test says."""

    answer: Any

    async def _generate(self, orders: Any) -> Any:
        async def ask(url: str, payload: Any) -> Any:
            return self.answer

        self.client.ask_async = ask  # type: ignore[method-assign]
        return await super()._generate(orders)


def as_base64(image: Image.Image, kind: str = "PNG") -> str:
    return base64.b64encode(encoded(image, kind)).decode()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"data": [{"url": "http://elsewhere/picture.png"}]}, "no picture as b64_json"),
        ({"data": []}, "no picture as b64_json"),
        ({"data": [{"b64_json": "%%%"}]}, "no picture as b64_json"),
        ({"data": [{"b64_json": base64.b64encode(b"GIF89a").decode()}]}, "cannot be decoded"),
        (
            {"data": [{"b64_json": as_base64(Image.new("1", (5000, 5000)))}]},
            "5000 x 5000 = 25000000 pixels, more",
        ),
        ({"data": [{"b64_json": as_base64(Image.new("RGB", (9, 9)))}]}, "one colour alone"),
    ],
)
def test_what_is_no_image_is_rejected(answer: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = ImageSettings("openai", "painter", "http://localhost:1", width=9, height=9)
    generator = Answering(settings)
    generator.answer = answer
    monkeypatch.setattr(image_generation, "make_generator", lambda *given: generator)
    (record,) = run_step(settings, tmp_path, make_records(1))
    assert record.rejection.step == "make_image" and reason in record.rejection.reason
    assert run_step(settings, tmp_path, make_records(1)) == [record]


def test_a_refused_prompt_is_rejected(server: Scripted, tmp_path: Path):
    server.faults = lambda payload, repeat: "400" if "thing 1" in payload["prompt"] else None
    settings = ImageSettings("openai", "painter", server.url, width=16, height=16)
    records = run_step(settings, tmp_path, make_records(3))
    assert [record.rejection is None for record in records] == [True, False, True]
    assert records[1].rejection.reason.startswith("refused: HTTP 400")
    with Image.open(tmp_path / "pictures" / records[0].images[0]) as image:
        assert image.text["prompt"] == "thing 0 0" and image.text["seed"] == "0"


@pytest.mark.parametrize("identity", ["../../etc/passwd", "a/b", "", ".hidden", "x" * 200, "a\x00b"])
def test_no_id_leads_out_of_the_folder(identity: str):
    with pytest.raises(ValueError, match="`id` must consist of letters, digits"):
        file_names(SynthRecord(identity, "SynthColor", "c", 0, ("d",)))


def test_a_pair_stands_side_by_side():
    left, right = Image.new("RGB", (64, 32), "red"), Image.new("RGB", (128, 64), "blue")
    whole = compose_pair(left, right)
    assert whole.size == (64 + 1 + 64, 32)
    assert [whole.getpixel((x, 16)) for x in (0, 63, 64, 65, 128)] == [
        *[(255, 0, 0)] * 2,
        (255, 255, 255),
        *[(0, 0, 255)] * 2,
    ]
