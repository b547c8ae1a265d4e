"""Images that end too early, and large ones: broken, or trained on as the authors' code does."""

import json
import threading
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from fusion_hf import FusionProcessor, nano_path
from fusion_hf.common.errors import InputError
from fusion_hf.data.image_files import open_record_image
from fusion_hf.data.record_parsing import RecordProblem
from fusion_hf.training import FusionDataCollator, load_records
from fusion_hf.training import run as training
from fusion_hf.training.recipe import load_recipe

LIMIT = 89_478_485
# of what PIL finds a beginning in
TRUNCATED = {
    "JPEG": {},
    "progressive": {"format": "JPEG", "progressive": True},
    "PNG": {},
    "BMP": {},
    "GIF": {},
    "TIFF": {"compression": "tiff_lzw"},
    "PPM": {},
}


def noise(size=(96, 64)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def half_of(name: str) -> bytes:
    stream = BytesIO()
    noise().save(stream, **{"format": name, **TRUNCATED[name]})
    content = stream.getvalue()
    return content[: len(content) // 2]


def as_upstream(content: bytes, monkeypatch) -> np.ndarray:
    """What PIL gives with the setting that the authors' code has."""
    with monkeypatch.context() as patched:
        patched.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        return np.asarray(Image.open(BytesIO(content)).convert("RGB"))


@pytest.mark.parametrize("name", [name for name in TRUNCATED if name != "TIFF"])
@pytest.mark.parametrize("as_file", [False, True], ids=["bytes", "file"])
def test_what_there_is_of_an_image_is_taken(tmp_path: Path, monkeypatch, name: str, as_file: bool):
    content = half_of(name)
    (tmp_path / "image").write_bytes(content)
    source = "image" if as_file else content
    image = open_record_image(source, tmp_path, LIMIT, on_truncated="load").convert("RGB")
    np.testing.assert_array_equal(np.asarray(image), as_upstream(content, monkeypatch))
    assert np.asarray(image).std() > 0  # something is there
    with pytest.raises(RecordProblem, match="broken image"):
        open_record_image(source, tmp_path, LIMIT)


def test_an_image_without_a_beginning_is_broken(tmp_path: Path):
    for content in (b"", half_of("JPEG")[:20], half_of("TIFF")):
        with pytest.raises(RecordProblem, match="broken image"):
            open_record_image(content, tmp_path, LIMIT, on_truncated="load")


def test_pil_s_settings_are_as_they_were(tmp_path: Path):
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    open_record_image(half_of("JPEG"), tmp_path, 10**9, on_truncated="load")
    with pytest.raises(RecordProblem):
        open_record_image(b"", tmp_path, 10**9, on_truncated="load")
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES) == before == (LIMIT, False)


def test_threads_do_not_lend_each_other_their_settings(tmp_path: Path):
    content, strict = half_of("JPEG"), []

    def open_strictly():
        for _ in range(50):
            try:
                strict.append(open_record_image(content, tmp_path, LIMIT))
            except RecordProblem:
                strict.append(None)

    thread = threading.Thread(target=open_strictly)
    thread.start()
    lenient = [open_record_image(content, tmp_path, LIMIT, on_truncated="load") for _ in range(50)]
    thread.join()
    assert strict == [None] * 50 and len(lenient) == 50


def test_the_limit_may_be_above_pil_s(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # twice as many are PIL's end
    noise().save(tmp_path / "image.png")
    assert open_record_image("image.png", tmp_path, 96 * 64).size == (96, 64)
    with pytest.raises(RecordProblem, match=r"96 x 64 = 6144 pixels, more than max_image_pixels = 6143"):
        open_record_image("image.png", tmp_path, 96 * 64 - 1)


@pytest.mark.slow
def test_an_image_of_twice_pil_s_limit(tmp_path: Path):
    Image.new("1", (13_500, 13_500)).save(tmp_path / "image.png")
    with pytest.raises(RecordProblem, match="oversized image"):
        open_record_image("image.png", tmp_path, LIMIT)
    assert open_record_image("image.png", tmp_path, 933_120_000).size == (13_500, 13_500)


def test_data_sets_and_recipes_have_both_keys(recipe: Path, records):
    broken = Path(records[1]["image"])
    broken.write_bytes(half_of("JPEG"))
    data, cache = recipe.parent / "data" / "records.json", recipe.parent / "cache"
    with pytest.raises(InputError, match=r"record 1 .*broken image"):
        load_records(data, cache=cache)[1]
    assert load_records(data, cache=cache, on_truncated="load")[1]["image"].size == (96, 64)
    with pytest.raises(InputError, match="`on_truncated` must be one of error, load, got 'skip'"):
        load_records(data, cache=cache, on_truncated="skip")
    settings = ["global_batch_size=24", "max_steps=1"]
    with pytest.raises(InputError, match="broken image"):
        training.run(load_recipe(recipe, settings))
    assert training.run(load_recipe(recipe, [*settings, "on_truncated=load"]))
    output = recipe.parent / "other"
    few = [*settings, "on_truncated=load", "max_image_pixels=4000", f"output_dir={output}"]
    with pytest.raises(InputError, match=r"96 x 64 = 6144 pixels, more than max_image_pixels = 4000"):
        training.run(load_recipe(recipe, few))


def test_the_collator_takes_images_up_to_the_limit_that_it_is_given():
    processor = FusionProcessor.from_pretrained(nano_path())
    processor.image_processor.max_image_pixels = 1000
    turns = [{"from": "human", "value": "<image>what color ?"}, {"from": "gpt", "value": "red"}]
    record = {"image": noise(), "conversations": turns}
    with pytest.raises(ValueError, match="6144 pixels"):
        FusionDataCollator(processor)([record])
    assert "pixel_values" in FusionDataCollator(processor, max_image_pixels=6144)([record])


def test_held_out_records_are_asked_with_the_limit_of_the_recipe(recipe: Path, records, tmp_path):
    held_out = tmp_path / "data" / "held-out.json"
    Image.new("RGB", (200, 100), "red").save(tmp_path / "data" / "wide.png")
    record = {**records[1], "image": "wide.png"}
    held_out.write_text(json.dumps([record]))
    model = tmp_path / "model"
    processor = FusionProcessor.from_pretrained(nano_path())
    processor.image_processor.max_image_pixels = 10_000
    values = load_recipe(
        recipe,
        [
            *("max_steps=1", "train=projectors", "eval_strategy=steps", "eval_steps=1", "eval_samples=1"),
            *(f"eval_data={held_out}", "max_image_pixels=20000", "eval_max_new_tokens=2"),
        ],
    )
    arguments = training.make_arguments(values, 1)
    _, start = training.load_start(arguments)
    trainer = training.make_trainer(start, processor, arguments)
    assert trainer.evaluate()["eval_answers"] == 1
    assert not model.exists()
