"""Images from strangers: odd ones give the pixels that they hold, broken ones the same words at every place."""

import base64
import copy
import io
import pickle
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from tests.helpers.broken_images import BROKEN
from tests.helpers.hostile_images import (
    FILES,
    LONG,
    ODD_TAGS,
    ORIENTATION,
    PHOTOGRAPHS,
    SHORT,
    VALUE_SIZES,
    costly_files,
    directory,
    orientation_tag,
    with_exif,
)
from tests.helpers.image_files import encoded, insert_chunks, jpeg_of_many_scans

from fusion_hf import FusionImageProcessor
from fusion_hf.common.errors import InputError
from fusion_hf.data.image_files import open_record_image
from fusion_hf.data.record_parsing import RecordProblem
from fusion_hf.demo.demo_model import open_upload
from fusion_hf.inference import ChatModel
from fusion_hf.model.image_limits_fusion import (
    MAX_JPEG_SCANS,
    MIN_JPEG_SCANS,
    BoundedStream,
    ImageError,
    OversizedImage,
    max_jpeg_scans,
)
from fusion_hf.model.image_opening_fusion import (
    MAX_SIDE,
    decode_image,
    identify_image,
    open_image,
    read_file,
    read_orientation,
)
from fusion_hf.serving.api_errors import ApiError
from fusion_hf.serving.client_images import decode_client_image

PHOTO = PHOTOGRAPHS[0]


def as_before(content: bytes) -> Image.Image:
    """What every valid file has always become: PIL's own transposition, then whole conversions."""
    image = Image.open(io.BytesIO(content))
    image.load()
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I"):
        gray = np.asarray(image).astype(np.int64).clip(0, 65535)
        if image.mode != "I" or gray.max() > 255:
            gray = gray * 255 // 65535
        return Image.fromarray(gray.astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def same(image: Image.Image, expected: Image.Image) -> bool:
    return (image.mode, image.size, image.tobytes()) == ("RGB", expected.size, expected.tobytes())


@pytest.mark.parametrize("name", FILES)
def test_valid_files_give_the_same_pixels_as_ever(name: str, tmp_path: Path):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of palettes with transparency
        try:
            expected = as_before(FILES[name])
        except OSError:
            assert name == "ycbcr.tif"  # the one that Pillow 12 cannot read
            with pytest.raises(ImageError):
                open_image(FILES[name])
            return
    for source in (FILES[name], path, str(path)):
        assert same(open_image(source), expected)
    processor = FusionImageProcessor()
    for given in (processor.fetch_images(str(path)), Image.open(path), Image.open(io.BytesIO(FILES[name]))):
        assert same(processor.process_image(given), expected)


@pytest.mark.parametrize("size", [(700, 400), (3, 2**16 + 5), (2**16 + 5, 3)])
@pytest.mark.parametrize("mode", ["I;16", "RGBA", "P"])
def test_images_of_several_blocks(size: tuple[int, int], mode: str):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L"), dtype=np.uint16) * 250)
    else:
        image = image.quantize(16) if mode == "P" else image.convert(mode)
    expected = as_before(encoded(image, "PNG"))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        turned = open_image(encoded(image, "PNG", exif=exif))
        assert same(turned, as_before(encoded(expected, "PNG", exif=exif)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("odd", ODD_TAGS)
def test_odd_exif_beside_an_orientation(kind: str, odd: str):
    for orientation in range(1, 9):
        content = with_exif(PHOTO, kind, directory([orientation_tag(orientation), ODD_TAGS[odd]]))
        upright = with_exif(PHOTO, kind, directory([orientation_tag(orientation)]))
        assert same(open_image(content), as_before(upright))
        assert same(open_image(content, exif_transpose=False), as_before(encoded_without_exif(kind)))


def encoded_without_exif(kind: str) -> bytes:
    return with_exif(PHOTO, kind, directory([orientation_tag(1)]))


@pytest.mark.parametrize("odd", ODD_TAGS)
def test_odd_tags_of_a_tiff_with_an_orientation(odd: str):
    number, kind, count, value = ODD_TAGS[odd]
    for orientation in range(1, 9):
        plain = encoded(PHOTO, "TIFF", tiffinfo={ORIENTATION: orientation})
        assert same(open_image(with_tag(plain, number, kind, count, value)), as_before(plain))


def with_tag(content: bytes, number: int, kind: int, count: int, value: bytes) -> bytes:
    """A TIFF of PIL, which has its directory at its begin or end, with one tag more."""
    (begin,) = struct.unpack_from("<I", content, 4)
    (entries,) = struct.unpack_from("<H", content, begin)
    tags = [content[begin + 2 + 12 * i : begin + 14 + 12 * i] for i in range(entries)]
    tags = [tag for tag in tags if struct.unpack_from("<H", tag)[0] != number]
    end = len(content)
    place = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", end)
    tags = sorted(
        [*tags, struct.pack("<HHI", number, kind, count) + place], key=lambda tag: struct.unpack_from("<H", tag)
    )
    content += value if len(value) > 4 else b""
    moved = content[:4] + struct.pack("<I", len(content)) + content[8:]
    return moved + struct.pack("<H", len(tags)) + b"".join(tags) + bytes(4)


INTEGER_TYPES = {SHORT, LONG, 6, 8, 9, 13, 16}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("type_", sorted({*VALUE_SIZES, 0, 99} - INTEGER_TYPES))
def test_an_orientation_of_another_type_is_upright(kind: str, type_: int):
    size = VALUE_SIZES.get(type_, 4)
    for order in "<>":
        value = b"6\0" if type_ == 2 else struct.pack(f"{order}II", 6, 0)[:size] if size > 1 else b"\6"
        content = with_exif(PHOTO, kind, directory([(ORIENTATION, type_, 1, value)], order))
        assert same(open_image(content), as_before(encoded_without_exif(kind)))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_upright(orientation: int):
    assert same(open_image(with_exif(PHOTO, "PNG", directory([orientation_tag(orientation)]))), PHOTO)


def test_exif_that_cannot_be_read_is_upright():
    for exif in (b"", b"abcd", b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*" + bytes(4), directory([])[:9]):
        assert same(open_image(with_exif(PHOTO, "PNG", exif)), PHOTO)
        assert read_orientation(identify_image(with_exif(PHOTO, "JPEG", exif))) == 1
    raw = b"Raw profile type exif\0" + b"\nexif\n       4\n" + b"abcd".hex().encode() + b"\n"
    for profile in (raw, b"Raw profile type exif\0\nexif\n4\nxyz\n", b"Raw profile type exif\0"):
        assert same(open_image(insert_chunks(encoded(PHOTO, "PNG"), [(b"tEXt", profile)])), PHOTO)


def test_an_orientation_in_xmp_counts_as_ever():
    content = insert_chunks(encoded(PHOTO, "PNG"), [(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0tiff:Orientation="6"')])
    assert same(open_image(content), PHOTO.transpose(Image.Transpose.ROTATE_270))
    assert same(open_image(content), as_before(content))


@pytest.mark.parametrize("name", ["rgb.png", "1.png", "la.png", "p.png", "i16.png", "p4.png"])
def test_a_text_chunk_called_transparency(name: str):
    content = insert_chunks(FILES[name], [(b"tEXt", b"transparency\0red")])
    assert same(open_image(content), open_image(FILES[name]))
    gray = encoded(PHOTO.convert("L"), "PNG")
    assert same(open_image(insert_chunks(gray, [(b"tEXt", b"transparency\0red")])), PHOTO.convert("L").convert("RGB"))


@pytest.fixture(scope="module")
def chat_model() -> ChatModel:
    return ChatModel.load()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BROKEN)
def test_every_place_gives_the_same_words(name: str, chat_model: ChatModel, tmp_path: Path):
    content, path = BROKEN[name], tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(ImageError) as caught:
        open_image(content)
    reason = caught.value.reason
    assert str(caught.value) == f"The image cannot be used: {reason}."
    processor, pixels = chat_model.processor.image_processor, chat_model.processor.image_processor.max_image_pixels
    places: dict[type[Exception], list[Callable[[], object]]] = {
        ValueError: [
            lambda: processor(str(path)),
            lambda: processor(base64.b64encode(content).decode()),
            lambda: processor("data:image/png;base64," + base64.b64encode(content).decode()),
            lambda: chat_model.processor.apply_chat_template(asking(str(path)), tokenize=True, return_dict=True),
        ],
        InputError: [lambda: chat_model.open_image(str(path)), lambda: open_upload(chat_model, path)],
        RecordProblem: [
            lambda: open_record_image(path.name, tmp_path, pixels),
            lambda: open_record_image(content, tmp_path, pixels),
        ],
        ApiError: [lambda: decode_client_image(content, chat_model.processor.image_processor, pixels)],
    }
    for kind, openings in places.items():
        for opening in openings:
            if content or kind is not ValueError:  # no text is no base64
                with pytest.raises(kind) as caught_there:
                    opening()
                said = str(caught_there.value)
                limit = "more than max_image_pixels"  # a page has its own
                assert reason in said or (kind is InputError and limit in reason and limit in said)


def asking(image: str) -> list[dict[str, object]]:
    return [{"role": "user", "content": [{"type": "image", "path": image}, {"type": "text", "text": "what?"}]}]


def test_a_file_that_cannot_be_read(tmp_path: Path):
    for path in (tmp_path / "none.png", tmp_path, tmp_path / "a\0b", tmp_path / ("n" * 300)):
        with pytest.raises(ImageError, match="it cannot be read: "):
            open_image(path)
    (tmp_path / "a.png").write_bytes(bytes(1001))
    for reading in (lambda: read_file(tmp_path / "a.png", 1000), lambda: identify_image(bytes(1001), max_bytes=1000)):
        with pytest.raises(OversizedImage, match="it has 1001 bytes, more than the limit of 1000"):
            reading()


def test_formats_can_be_fewer():
    assert open_image(FILES["rgb.png"], formats=("PNG",)).size == PHOTO.size
    with pytest.raises(ImageError, match="it is none of PNG, JPEG"):
        open_image(FILES["rgb.webp"], formats=("PNG", "JPEG"))


@pytest.mark.parametrize("size", [(1, MAX_SIDE + 1), (MAX_SIDE + 1, 1)])
def test_sides_have_a_limit(size: tuple[int, int]):
    with pytest.raises(OversizedImage, match=f"{size[0]} x {size[1]} pixels, more than {MAX_SIDE}"):
        decode_image(Image.new("L", size))


# costs


def test_scans_of_real_encoders_are_few(tmp_path: Path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8))
    for options in ({}, {"subsampling": 0}, {"quality": 100}):
        content = encoded(image, "JPEG", progressive=True, **options)
        assert content.count(b"\xff\xda") <= MIN_JPEG_SCANS
        assert same(open_image(content), as_before(content))


@pytest.mark.parametrize(("side", "allowed"), [(64, MAX_JPEG_SCANS), (5792, 64), (9000, 26)])
def test_scans_are_bounded_by_pixels(side: int, allowed: int):
    assert max_jpeg_scans(side * side) == allowed
    with pytest.raises(OversizedImage, match=f"it has {allowed + 1} scans, more than the limit of {allowed}"):
        open_image(jpeg_of_many_scans(side, allowed + 1))
    if side == 64:
        assert open_image(jpeg_of_many_scans(side, allowed)).size == (side, side)


def test_scans_are_bounded_in_what_a_caller_has_opened(tmp_path: Path):
    path = tmp_path / "scans.jpg"
    path.write_bytes(jpeg_of_many_scans(64, 1000))
    for source in (path, io.BytesIO(path.read_bytes())):
        with pytest.raises(ValueError, match=f"it has 1000 scans, more than the limit of {MAX_JPEG_SCANS}"):
            FusionImageProcessor()(Image.open(source))


def test_the_second_image_of_a_multi_picture_file_does_not_count():
    many = jpeg_of_many_scans(64, 200)
    assert open_image(FILES["rgb.jpg"] + many).size == PHOTO.size


REFUSED = {
    "scans.jpg": "3000 scans, more than the limit of 64",
    "flat.jp2": "JPEG2000 image with 33547264 pixels",
    "flat.webp": "WEBP image with 33547264 pixels",
    "runs.bmp": "BMP image with 33547264 pixels",
    "odd.pgm": "PPM image with 33547264 pixels",
    "lab.tif": "TIFF image with 33547264 pixels",
    "padding.jpg": "too many parts",
    "chunks.png": "too many parts",
    "comments.ppm": "200000 comments, more than the limit of 1000",
    "tags.tif": "bytes in its tags, more than the limit of ",
    "tags.jpg": "bytes in its tags, more than the limit of ",
    "tile.tif": "1073741824 pixels in a tile, more than the limit of 4194304",
}


@pytest.fixture(scope="module")
def bombs() -> dict[str, bytes]:
    return costly_files(5792)


@pytest.mark.parametrize("name", REFUSED)
def test_costly_files_are_refused_with_value_and_limit(name: str, bombs: dict[str, bytes]):
    with pytest.raises(OversizedImage) as caught:
        open_image(bombs[name])
    assert REFUSED[name] in caught.value.reason and " than " in caught.value.reason


def test_parts_of_a_jpeg2000_are_bounded():
    content = encoded(Image.new("L", (600, 600)), "JPEG2000", no_jp2=True)
    size, coding = content.index(b"\xff\x51"), content.index(b"\xff\x52")

    def changed(place: int, value: bytes) -> bytes:
        return content[:place] + value + content[place + len(value) :]

    assert open_image(content).size == (600, 600)
    for broken, words in (
        (changed(size + 22, struct.pack(">II", 1, 1)), "360000 tiles, more than the limit of 4096"),
        (changed(coding + 10, b"\0\0"), "code blocks have 16 pixels, fewer than the minimum of 256"),
    ):
        with pytest.raises(OversizedImage, match=words):
            open_image(broken)


def test_a_bounded_stream_counts_reads():
    stream = BoundedStream(b"abc")
    stream.allow(2)
    assert stream.read(1) + stream.read() == b"abc"
    with pytest.raises(OversizedImage, match="more than 2 reads"):
        stream.read(1)


def test_an_image_that_its_owner_has_decoded_is_taken():
    image = Image.open(io.BytesIO(jpeg_of_many_scans(64, 1000)))
    image.load()
    assert decode_image(image).size == (64, 64)


def sent(image: Image.Image) -> Image.Image:
    """As it arrives in another process."""
    return pickle.loads(pickle.dumps(image))  # noqa: S301


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, sent])
@pytest.mark.parametrize("name", [name for name in FILES if name != "ycbcr.tif"])  # Pillow 12 cannot read that one
def test_a_copy_of_an_opened_image_gives_the_same_pixels(name: str, copied: Callable[[Image.Image], Image.Image]):
    """A trainer copies its rows, and a loader's process sends them to another."""
    expected = np.asarray(open_image(FILES[name]))
    assert np.array_equal(np.asarray(decode_image(copied(Image.open(io.BytesIO(FILES[name]))))), expected)
