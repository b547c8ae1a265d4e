"""Images of every kind that users and strangers bring."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from tests.helpers.http_server import HttpServer, Request, Response
from tests.helpers.image_files import encoded, png_claiming

from fusion_hf import FusionImageProcessor
from fusion_hf.model import image_sources_fusion


@pytest.fixture(scope="module")
def processor() -> FusionImageProcessor:
    return FusionImageProcessor(size={"height": 32, "width": 32})


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(skimage.data.astronaut())


def pixels(processor: FusionImageProcessor, image: object, **kwargs: object) -> torch.Tensor:
    return processor(image, return_tensors="pt", **kwargs).pixel_values


def test_tiles_and_overview(processor: FusionImageProcessor, photo: Image.Image) -> None:
    """Row-major quarters of the double size, then the image at single size."""
    result = pixels(processor, photo)
    assert result.shape == (1, 5, 3, 32, 32)
    large, small = photo.resize((64, 64), Image.Resampling.BICUBIC), photo.resize((32, 32), Image.Resampling.BICUBIC)
    boxes = [(0, 0, 32, 32), (32, 0, 64, 32), (0, 32, 32, 64), (32, 32, 64, 64)]
    expected = [*(large.crop(box) for box in boxes), small]
    for tile, image in zip(result[0], expected, strict=True):
        array = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
        torch.testing.assert_close(tile, (array - 0.5) / 0.5, rtol=0, atol=1e-6)


def test_every_source_gives_the_same(processor: FusionImageProcessor, photo: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    photo.save(path)
    text = base64.b64encode(path.read_bytes()).decode()
    array = np.asarray(photo)
    expected = pixels(processor, photo)
    sources = [str(path), path, text, f"data:image/png;base64,{text}", array, array.transpose(2, 0, 1)]
    sources += [torch.from_numpy(array.copy()), torch.from_numpy(array.copy()).permute(2, 0, 1)]
    for source in sources:
        torch.testing.assert_close(pixels(processor, source), expected)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "YCbCr", "HSV"])
def test_modes(processor: FusionImageProcessor, photo: Image.Image, mode: str) -> None:
    converted = photo.convert(mode)
    torch.testing.assert_close(pixels(processor, converted), pixels(processor, converted.convert("RGB")))


def test_sixteen_bit_grey_is_scaled(processor: FusionImageProcessor) -> None:
    gray = np.asarray(Image.fromarray(skimage.data.camera()))
    deep = Image.open(io.BytesIO(encoded(Image.fromarray(gray.astype(np.uint16) * 257), "PNG")))
    assert deep.mode.startswith("I")
    torch.testing.assert_close(pixels(processor, deep), pixels(processor, Image.fromarray(gray)))


def test_animations_give_their_first_frame(processor: FusionImageProcessor, photo: Image.Image) -> None:
    frames = [photo.convert("P"), Image.new("P", photo.size)]
    animated = Image.open(io.BytesIO(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    assert animated.n_frames == 2
    torch.testing.assert_close(pixels(processor, animated), pixels(processor, photo.convert("P")), rtol=0, atol=0.1)


def test_exif_orientation(processor: FusionImageProcessor, photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 270 degrees
    turned = Image.open(io.BytesIO(encoded(photo, "PNG", exif=exif)))
    upright = photo.transpose(Image.Transpose.ROTATE_270)
    torch.testing.assert_close(pixels(processor, turned), pixels(processor, upright))
    torch.testing.assert_close(pixels(processor, turned, exif_transpose=False), pixels(processor, photo))


@pytest.mark.parametrize("size", [(1, 1), (30_000, 10), (10, 30_000)])
def test_extreme_sizes(processor: FusionImageProcessor, size: tuple[int, int]) -> None:
    result = pixels(processor, Image.new("RGB", size, (255, 0, 0)))
    torch.testing.assert_close(result[0, :, 0], torch.ones(5, 32, 32))


def test_a_decompression_bomb_is_refused_before_decoding(processor: FusionImageProcessor, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png_claiming(12_000))
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(ValueError, match=r"144000000 pixels, more than max"),
    ):
        pixels(processor, str(bomb))
    bomb.write_bytes(png_claiming(50_000))
    with pytest.raises(ValueError, match=r"cannot be opened.*exceeds limit"):
        pixels(processor, str(bomb))


def test_the_limit_is_a_setting(processor: FusionImageProcessor, photo: Image.Image) -> None:
    with pytest.raises(ValueError, match=r"512 x 512 = 262144 pixels, more than max_image_pixels = 1000"):
        pixels(processor, photo, max_image_pixels=1000)


@pytest.mark.parametrize(
    "content",
    [b"", b"just text", png_claiming(20, pixels=bytes(1000))[:60]],
    ids=["empty", "text", "truncated"],
)
def test_files_that_are_no_images(processor: FusionImageProcessor, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be (opened|decoded)"):
        pixels(processor, str(path))


def test_formats_whose_reader_starts_a_program(
    processor: FusionImageProcessor, photo: Image.Image, tmp_path: Path
) -> None:
    """PIL reads PostScript with Ghostscript."""
    path = tmp_path / "photo.eps"
    photo.convert("RGB").save(path)
    assert Image.open(path).format == "EPS"
    with pytest.raises(ValueError, match=r"photo\.eps' cannot be opened"):
        processor(str(path))
    path.rename(path.with_suffix(".png"))
    with pytest.raises(ValueError, match=r"photo\.png' cannot be opened"):
        processor(str(path.with_suffix(".png")))


@pytest.mark.parametrize("address", ["https://\0", "http://host:port/a.png", "http://[::1/a.png"])
def test_addresses_that_are_none(processor: FusionImageProcessor, address: str) -> None:
    with pytest.raises(ValueError, match="cannot be opened"):
        processor(address)


def test_a_truncated_photo(processor: FusionImageProcessor, photo: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "half.jpg"
    path.write_bytes(encoded(photo, "JPEG")[:20_000])
    with pytest.raises(ValueError, match="cannot be decoded"):
        pixels(processor, str(path))


def test_a_missing_file(processor: FusionImageProcessor) -> None:
    with pytest.raises(ValueError, match=r"must be a file, an http.*no/such/file\.png'"):
        pixels(processor, "no/such/file.png")


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Where the files of `tmp_path` are served."""

    def respond(request: Request) -> Response:
        path = tmp_path / request.path[1:]
        return Response(path.read_bytes()) if path.is_file() else Response(status=404)

    with HttpServer(respond) as server:
        yield server.url


def test_images_at_addresses(
    processor: FusionImageProcessor,
    photo: Image.Image,
    tmp_path: Path,
    address: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "photo.png").write_bytes(encoded(photo, "PNG"))
    (tmp_path / "text.png").write_bytes(b"just text")
    assert torch.equal(pixels(processor, f"{address}/photo.png"), pixels(processor, photo))
    with pytest.raises(ValueError, match=r"/none\.png' cannot be opened: .*404"):
        pixels(processor, f"{address}/none.png")
    with pytest.raises(ValueError, match=r"/text\.png' cannot be opened"):
        pixels(processor, f"{address}/text.png")
    monkeypatch.setattr(image_sources_fusion, "MAX_DOWNLOAD_BYTES", 1000)
    with pytest.raises(ValueError, match=r"/photo\.png' cannot be opened: it has more than 1000 bytes"):
        pixels(processor, f"{address}/photo.png")


def test_switches(processor: FusionImageProcessor, photo: Image.Image) -> None:
    raw = pixels(processor, photo, do_rescale=False, do_normalize=False)
    assert raw.min() >= 0 and raw.max() > 1
    torch.testing.assert_close((raw / 255 - 0.5) / 0.5, pixels(processor, photo), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"`do_resize` must be True.*got False"):
        pixels(processor, photo, do_resize=False)


@pytest.mark.parametrize("shape", ["last", "first"])
def test_floats_of_black_and_white_are_an_image(shape: str) -> None:
    """As `to_tensor` writes a drawing: all values are 0.0 or 1.0, which are no bytes."""
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[10:20, 10:20] = 255
    expected = FusionImageProcessor()(Image.fromarray(pixels), return_tensors="np")["pixel_values"]
    shares = pixels / np.float32(255)
    for given in (shares, pixels > 0):
        moved = given if shape == "last" else np.moveaxis(given, -1, 0)
        assert np.array_equal(FusionImageProcessor()(moved, return_tensors="np")["pixel_values"], expected)


def test_an_array_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="must have pixels"):
        FusionImageProcessor()(np.zeros((0, 4, 3), np.uint8))
