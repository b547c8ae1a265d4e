"""Arrays, tensors and floats as images: their values, their shapes, and what a call may ask for."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from transformers.image_utils import ChannelDimension
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from fusion_hf import FusionImageProcessor, FusionProcessor
from fusion_hf.model.image_limits_fusion import ImageError
from fusion_hf.model.image_opening_fusion import decode_image
from fusion_hf.training.collator import FusionDataCollator

SIDE = 32
PHOTO = skimage.data.astronaut()[:300]  # (300, 512, 3)
SHARES = np.random.default_rng(0).random((60, 80, 3), dtype=np.float32)


@pytest.fixture(scope="module")
def image_processor() -> FusionImageProcessor:
    return FusionImageProcessor(size={"height": SIDE, "width": SIDE})


def pixels(processor: FusionImageProcessor, image: Any, **kwargs: Any) -> np.ndarray:
    return processor(image, return_tensors="np", **kwargs)["pixel_values"]


def of_siglip(image: Any, side: int = SIDE, **kwargs: Any) -> np.ndarray:
    siglip = SiglipImageProcessorPil(size={"height": side, "width": side})
    return siglip(image, do_rescale=False, return_tensors="np", **kwargs)["pixel_values"][0]


OTHER_VALUES = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


@pytest.mark.parametrize(
    "settings", [{}, {"do_normalize": False}, OTHER_VALUES, {"image_mean": 0.4, "image_std": 0.3}]
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_shares_without_rescaling_are_siglips(
    image_processor: FusionImageProcessor, dtype: str, settings: dict[str, Any]
) -> None:
    """To the bit: the overview at SigLIP's own size, the tiles at twice that."""
    shares = SHARES.astype(dtype)
    found = pixels(image_processor, shares, do_rescale=False, **settings)[0]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[4], of_siglip(shares, **settings))
    large = of_siglip(shares, 2 * SIDE, **settings)
    parts = large.reshape(3, 2, SIDE, 2, SIDE).transpose(1, 3, 0, 2, 4).reshape(4, 3, SIDE, SIDE)
    np.testing.assert_array_equal(found[:4], parts)


def test_bytes_without_rescaling_are_siglips(image_processor: FusionImageProcessor) -> None:
    for image in (PHOTO, Image.fromarray(PHOTO)):
        found = pixels(image_processor, image, do_rescale=False)[0, 4]
        np.testing.assert_array_equal(found, of_siglip(PHOTO))
        raw = pixels(image_processor, image, do_rescale=False, do_normalize=False)
        assert raw.dtype == np.uint8
        np.testing.assert_array_equal(raw[0, 4], of_siglip(PHOTO, do_normalize=False))


@pytest.mark.parametrize("do_normalize", [True, False])
def test_images_of_one_call_are_rescaled_each_as_it_was_given(
    image_processor: FusionImageProcessor, do_normalize: bool
) -> None:
    settings = {"do_rescale": False, "do_normalize": do_normalize}
    found = pixels(image_processor, [PHOTO, SHARES], **settings)
    for values, image in zip(found, (PHOTO, SHARES), strict=True):
        np.testing.assert_array_equal(values, pixels(image_processor, image, **settings)[0])


def test_black_and_white_shares_without_rescaling(image_processor: FusionImageProcessor) -> None:
    """SigLIP's own processor takes them for two shades of black."""
    drawing = np.where(PHOTO > 127, 255, 0).astype(np.uint8)
    expected = pixels(image_processor, drawing)
    for given in (drawing / np.float32(255), drawing > 0):
        np.testing.assert_allclose(pixels(image_processor, given, do_rescale=False), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "convert"),
    [
        ("float32", lambda a: (a / 255).astype(np.float32)),
        ("float64", lambda a: a / 255),
        ("float16", lambda a: (a / 255).astype(np.float16)),
        ("whole floats", lambda a: a.astype(np.float32)),
        ("int64", lambda a: a.astype(np.int64)),
        ("uint16", lambda a: a.astype(np.uint16)),
        ("tensor of bytes", torch.from_numpy),
        ("tensor of float16", lambda a: torch.from_numpy(a / 255).half()),
        ("tensor with a gradient", lambda a: torch.from_numpy(a / 255).requires_grad_()),
        ("tensor of whole bfloat16", lambda a: torch.from_numpy(a).bfloat16()),
    ],
)
def test_dtypes(image_processor: FusionImageProcessor, name: str, convert: Callable[[np.ndarray], Any]) -> None:
    np.testing.assert_array_equal(pixels(image_processor, convert(PHOTO.copy())), pixels(image_processor, PHOTO))


def test_a_tensor_of_bfloat16(image_processor: FusionImageProcessor) -> None:
    """Its eight bits hold shares to half a byte, near white."""
    shares = torch.from_numpy(PHOTO / 255).bfloat16()
    np.testing.assert_allclose(pixels(image_processor, shares), pixels(image_processor, PHOTO), atol=2.01 / 255)
    expected = pixels(image_processor, np.rint(shares.float().numpy() * 255).astype(np.uint8))
    np.testing.assert_array_equal(pixels(image_processor, shares), expected)


@pytest.mark.parametrize(
    ("name", "array", "value"),
    [
        ("normalised", SHARES * 2 - 1, "-0.99"),
        ("beyond bytes", SHARES * 300, "299.9"),
        ("sixteen bits", PHOTO.astype(np.uint16) * 257, "65535"),
        ("negative", np.full((4, 4, 3), -1, np.int8), "-1"),
        ("no number", np.where(SHARES < 0.1, np.nan, SHARES), "nan"),
        ("infinite", np.where(SHARES < 0.1, np.inf, SHARES), "inf"),
        ("fractions of bytes", SHARES * 200, "199.9"),
        ("complex", SHARES + 1j, "complex64"),
        ("list of numbers", PHOTO[:2, :2].tolist(), "int"),
        ("one row", np.zeros(5), r"\(5,\)"),
        ("one number", np.array(3), r"\(\)"),
        ("two channels", PHOTO[..., :2], "2"),
        ("no pixels", PHOTO[:0], r"\(0, 512, 3\)"),
        ("nothing", None, "NoneType"),
        ("nothing in a list", [PHOTO, None], "NoneType"),
    ],
)
def test_arrays_that_are_no_images(image_processor: FusionImageProcessor, name: str, array: Any, value: str) -> None:
    with pytest.raises(ValueError, match=value) as caught:
        image_processor(array)
    assert "must" in str(caught.value) or "range [0, 1]" in str(caught.value)


def gray_image(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(np.float32))


@pytest.mark.parametrize("settings", [{}, {"do_rescale": False}, {"do_rescale": False, "do_normalize": False}])
@pytest.mark.parametrize("is_drawing", [True, False])
def test_float_images_of_pil_are_scaled(
    image_processor: FusionImageProcessor, is_drawing: bool, settings: dict[str, Any]
) -> None:
    """As an array of the same values is; a drawing is black and white."""
    values = (PHOTO[..., 0] > 127) if is_drawing else SHARES[..., 0]
    image = gray_image(values)
    assert image.mode == "F"
    expected = pixels(image_processor, values[..., None].astype(np.float32), **settings)
    np.testing.assert_array_equal(pixels(image_processor, image, **settings), expected)
    assert expected.max() - expected.min() > 0.5


def test_float_images_of_bytes_are_as_before() -> None:
    image = gray_image(PHOTO[..., 0])
    assert decode_image(image).tobytes() == image.convert("RGB").tobytes()


def test_float_images_of_several_blocks() -> None:
    values = np.random.default_rng(1).random((700, 900))
    expected = Image.fromarray((values.astype(np.float32) * 255).astype(np.uint8)).convert("RGB")
    assert decode_image(gray_image(values)).tobytes() == expected.tobytes()


@pytest.mark.parametrize("values", [SHARES[..., 0] * 300, SHARES[..., 0] - 0.5, np.full((4, 4), np.nan)])
def test_float_images_beyond_bytes_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ImageError, match=r"floats range from \S+ to \S+, but must be from 0 to 1 or from 0 to 255"):
        decode_image(gray_image(values))


@pytest.mark.parametrize("as_enumeration", [True, False])
@pytest.mark.parametrize("shape", [(4, 40, 3), (3, 40, 4), (3, 40, 3), (1, 40, 3), (40, 3, 3), (4, 40, 4), (4, 40, 1)])
@pytest.mark.parametrize("name", ["channels_first", "channels_last"])
def test_input_data_format_is_honoured(
    image_processor: FusionImageProcessor, name: str, shape: tuple[int, ...], as_enumeration: bool
) -> None:
    array = np.random.default_rng(2).integers(0, 256, shape, dtype=np.uint8)
    moved = np.moveaxis(array, 0, -1) if name == "channels_first" else array
    given = ChannelDimension(name) if as_enumeration else name
    if moved.shape[-1] not in (1, 3, 4):
        with pytest.raises(ValueError, match=rf"1, 3 or 4 channels.*shape \({shape[0]}, {shape[1]}, {shape[2]}\)"):
            pixels(image_processor, array, input_data_format=given)
        return
    plain = moved[..., :3] if moved.shape[-1] > 1 else moved[..., 0]
    expected = pixels(image_processor, Image.fromarray(plain))
    for images in (array, torch.from_numpy(array), array / np.float32(255), array[None], [array]):
        np.testing.assert_array_equal(pixels(image_processor, images, input_data_format=given), expected)


@pytest.mark.parametrize(
    ("shape", "is_first"), [((4, 40, 3), False), ((3, 40, 4), True), ((1, 40, 3), False), ((3, 40, 3), True)]
)
def test_without_it_three_channels_are_likeliest(
    image_processor: FusionImageProcessor, shape: tuple[int, ...], is_first: bool
) -> None:
    """An image of one row is no gray one, and no row of a small image is taken for alpha."""
    array = np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)
    expected = pixels(image_processor, Image.fromarray(np.moveaxis(array, 0, -1).copy() if is_first else array))
    np.testing.assert_array_equal(pixels(image_processor, array), expected)


@pytest.mark.parametrize("image", [PHOTO, Image.fromarray(PHOTO)])
def test_an_input_data_format_that_is_none(image_processor: FusionImageProcessor, image: Any) -> None:
    with pytest.raises(ValueError, match=r"middle.*channels_first.*channels_last"):
        pixels(image_processor, image, input_data_format="middle")


def test_gray_arrays(image_processor: FusionImageProcessor) -> None:
    gray = PHOTO[..., 0]
    expected = pixels(image_processor, Image.fromarray(gray))
    for given in (gray, gray[..., None], gray[None], [gray], torch.from_numpy(gray.copy())):
        np.testing.assert_array_equal(pixels(image_processor, given), expected)


BATCH = np.stack([PHOTO, PHOTO[::-1], PHOTO // 2])


@pytest.mark.parametrize(
    ("name", "images"),
    [
        ("array", BATCH),
        ("tensor", torch.from_numpy(BATCH)),
        ("channels first", BATCH.transpose(0, 3, 1, 2)),
        ("list of arrays", list(BATCH)),
        ("tuple", tuple(BATCH)),
        ("list of batches", [BATCH[:2], BATCH[2:]]),
        ("batch of batches", BATCH[:, None]),
        ("nested lists", [[BATCH[0]], [BATCH[1], BATCH[2]]]),
        ("nested batches", [[BATCH[:2]], [torch.from_numpy(BATCH[2:])]]),
        ("mixed", [Image.fromarray(BATCH[0]), torch.from_numpy(BATCH[1].copy()), BATCH[2:]]),
        ("array of objects", np.array([*map(Image.fromarray, BATCH), None], dtype=object)[:3]),
    ],
)
def test_batches(image_processor: FusionImageProcessor, name: str, images: Any) -> None:
    expected = np.concatenate(
        [pixels(image_processor, Image.fromarray(np.ascontiguousarray(image))) for image in BATCH]
    )
    np.testing.assert_array_equal(pixels(image_processor, images), expected)


def test_a_batch_of_arrays_goes_to_its_prompts(processor: FusionProcessor) -> None:
    prompts = ["<image><latent_image>a", "<image><latent_image>b", "<image><latent_image>c"]
    expected = pixels(processor.image_processor, list(BATCH))
    for images in (BATCH, torch.from_numpy(BATCH), list(BATCH), BATCH[:, None], [[image] for image in BATCH]):
        found = processor(images=images, text=prompts, return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("images", "error"),
    [
        ([[PHOTO, PHOTO], []], "Prompt 0 must have one <image> for each of the 2 images in `images[0]`"),
        ([BATCH[:2], BATCH[:0]], "Prompt 0 must have one <image> for each of the 2 images in `images[0]`"),
        ([[PHOTO], [[]]], "Prompt 1 must have one <image> for each of the 0 images in `images[1]`"),
        ([PHOTO, BATCH[:2]], "Prompt 1 must have one <image> for each of the 2 images in `images[1]`"),
        ([[PHOTO, PHOTO]], "one list for each of 2 prompts, got 1"),
        ([[PHOTO], [PHOTO], [PHOTO]], "found 2 <image> tokens and 3 images"),
        ([[PHOTO], [PHOTO], []], "one list for each of 2 prompts, got 3"),
        (BATCH, "found 2 <image> tokens and 3 images"),
        (PHOTO, "found 2 <image> tokens and 1 images"),
        ([PHOTO, None], "Prompt 1 must have one <image> for each of the 0 images in `images[1]`"),
    ],
)
def test_batches_that_do_not_fit_the_prompts(processor: FusionProcessor, images: Any, error: str) -> None:
    with pytest.raises(ValueError) as caught:
        processor(images=images, text=["<image><latent_image>a", "<image><latent_image>b"])
    assert error in str(caught.value)


def test_none_stands_for_a_prompt_without_image(processor: FusionProcessor) -> None:
    """Flattened, the image would go to the first prompt."""
    with pytest.raises(ValueError, match=r"Prompt 0 must have one <image> for each of the 0 images in `images\[0\]`"):
        processor(images=[None, PHOTO], text=["<image><latent_image>a", "<latent_image>b"])
    found = processor(images=[None, PHOTO], text=["<latent_image>a", "<image><latent_image>b"], return_tensors="np")
    np.testing.assert_array_equal(found["pixel_values"][1:], pixels(processor.image_processor, PHOTO))
    assert not found["pixel_values"][0].any()


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"do_resize": False}, "do_resize.*True.*got False"),
        ({"size": {"shortest_edge": 32}}, "size.*a height and a width.*shortest_edge"),
        ({"do_center_crop": True, "crop_size": 16}, "do_center_crop.*False.*got True"),
        ({"do_pad": True, "pad_size": 64}, "do_pad.*False.*got True"),
        ({"data_format": "channels_last"}, "data_format.*'channels_first'.*got 'channels_last'"),
        ({"image_mean": [0.5]}, "image_mean.*a number, or one number for each of the 3"),
        ({"image_std": [0.5, 0.5]}, "image_std.*a number, or one number for each of the 3"),
        ({"image_std": [0.5, 0.5, 0.0]}, "image_std.*greater than 0"),
        ({"image_mean": None}, "image_mean"),
        ({"rescale_factor": None}, "rescale_factor"),
    ],
)
@pytest.mark.parametrize("caller", ["image processor", "processor", "images_kwargs"])
def test_what_a_call_cannot_have(processor: FusionProcessor, caller: str, settings: dict, error: str) -> None:
    text = "<image><latent_image>a"
    with pytest.raises(ValueError, match=error):
        if caller == "image processor":
            processor.image_processor(PHOTO, **settings)
        elif caller == "processor":
            processor(images=PHOTO, text=text, **settings)
        else:
            processor(images=PHOTO, text=text, images_kwargs=settings)


def test_what_a_call_can_have(processor: FusionProcessor) -> None:
    """Each override has its value, whoever hands it on."""
    images = processor.image_processor
    raw = pixels(images, PHOTO, as_bytes=True)
    assert raw.dtype == np.uint8
    mean, std = np.array([0.1, 0.2, 0.3])[:, None, None], np.array([0.4, 0.5, 0.6])[:, None, None]
    cases = [
        ({}, (raw / 255 - 0.5) / 0.5),
        ({"do_normalize": False}, raw / 255),
        ({"rescale_factor": 1 / 127.5}, (raw / 127.5 - 0.5) / 0.5),
        ({"rescale_factor": 1 / 127.5, "do_normalize": False}, raw / 127.5),
        (OTHER_VALUES, (raw / 255 - mean) / std),
        ({"image_mean": 0.4, "image_std": 0.3}, (raw / 255 - 0.4) / 0.3),
        ({"do_rescale": False}, (raw - 0.5) / 0.5),
        ({"do_convert_rgb": False}, (raw / 255 - 0.5) / 0.5),
    ]
    for settings, expected in cases:
        np.testing.assert_allclose(pixels(images, PHOTO, **settings), expected, rtol=1e-5, atol=1e-5)
        found = processor(images=PHOTO, text="<image><latent_image>a", return_tensors="np", **settings)
        np.testing.assert_allclose(found["pixel_values"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("image", [Image.fromarray(PHOTO).convert("L"), Image.fromarray(PHOTO).convert("RGBA")])
def test_images_of_other_modes_have_to_be_converted(image_processor: FusionImageProcessor, image: Image.Image) -> None:
    for given in (image, np.asarray(image)):
        with pytest.raises(ValueError, match=r"do_convert_rgb.*must be True for an image.*got False"):
            pixels(image_processor, given, do_convert_rgb=False)


@pytest.mark.parametrize("do_rescale", [True, False])
def test_shares_of_records_are_shares_in_compact_batches(processor: FusionProcessor, do_rescale: bool) -> None:
    """A compact batch has bytes, of which the device makes numbers: it must not forget what they stood for."""
    turns = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "red"}]
    images = (SHARES, gray_image(SHARES[..., 0]), Image.fromarray(PHOTO), PHOTO > 127)
    records = [{"messages": turns, "image": image} for image in images]
    before = processor.image_processor.do_rescale
    processor.image_processor.do_rescale = do_rescale
    try:
        plain = FusionDataCollator(processor)(records)
        collator = FusionDataCollator(processor, compact=True)
        compact = collator.unpack(collator(records))
    finally:
        processor.image_processor.do_rescale = before
    torch.testing.assert_close(compact["pixel_values"], plain["pixel_values"], rtol=0, atol=0)
    expected = pixels(processor.image_processor, list(images), do_rescale=do_rescale)
    np.testing.assert_array_equal(plain["pixel_values"].numpy(), expected)
