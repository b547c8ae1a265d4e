"""Image files as strangers make them: valid ones, odd ones, broken ones, and small ones that cost much to decode."""

import random
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import skimage.data
from PIL import Image
from tests.helpers.image_files import (
    PNG_HEAD,
    SOI,
    encoded,
    insert_chunks,
    jpeg_of,
    jpeg_of_many_scans,
    jpeg_segments,
    png_chunks,
    png_of,
)

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
SIDE = 40  # pixels
ORIENTATION = 0x0112


def photographs() -> list[Image.Image]:
    """Small RGB photographs, no two of one shape."""
    sources = (skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea())
    return [
        Image.fromarray(source).resize((SIDE - 7 * number, 24 + 5 * number)) for number, source in enumerate(sources)
    ]


def valid_files() -> dict[str, bytes]:
    """Files of every format, in every mode that it can be read in."""
    photo, other, third = photographs()
    gray = np.asarray(other.convert("L"))
    deep = {
        "i16": Image.fromarray(gray.astype(np.uint16) * 257),
        "i16b": Image.fromarray((gray.astype(np.uint16) * 257).astype(">u2")),
        "i32": Image.fromarray(gray.astype(np.int32) * 257),
        "i32-of-bytes": Image.fromarray(gray.astype(np.int32)),
        "f32": Image.fromarray(gray.astype(np.float32)),
    }
    palette = photo.quantize(64)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif[0x010F] = "Maker"
    files = {
        "rgb.bmp": encoded(photo, "BMP"),
        "p.bmp": encoded(palette, "BMP"),
        "1.bmp": encoded(photo.convert("1"), "BMP"),
        "rle.bmp": rle_bmp(24, 16, b"\x05\x01\x00\x03abc\x00\x10\x02\x00\x00" * 16),
        "p.gif": encoded(palette, "GIF"),
        "l.gif": encoded(photo.convert("L"), "GIF", interlace=0),
        "animated.gif": encoded(palette, "GIF", save_all=True, append_images=[Image.new("P", photo.size)]),
        "rgb.jpg": encoded(photo, "JPEG"),
        "l.jpg": encoded(photo.convert("L"), "JPEG"),
        "cmyk.jpg": encoded(photo.convert("CMYK"), "JPEG"),
        "progressive.jpg": encoded(third, "JPEG", progressive=True, subsampling=0),
        "turned.jpg": encoded(third, "JPEG", exif=exif),
        "mpo.jpg": encoded(photo, "MPO", save_all=True, append_images=[other]),
        "rgb.jp2": encoded(photo, "JPEG2000"),
        "rgba.jp2": encoded(photo.convert("RGBA"), "JPEG2000", tile_size=(16, 16)),
        "l.j2k": encoded(photo.convert("L"), "JPEG2000", no_jp2=True, irreversible=True, quality_layers=[20]),
        "i16.jp2": encoded(deep["i16"], "JPEG2000"),
        "rgb.png": encoded(photo, "PNG"),
        "rgba.png": encoded(photo.convert("RGBA"), "PNG"),
        "la.png": encoded(photo.convert("LA"), "PNG"),
        "1.png": encoded(photo.convert("1"), "PNG"),
        "p.png": encoded(palette, "PNG", transparency=bytes(range(64))),
        "p4.png": encoded(photo.quantize(9), "PNG", transparency=3),
        "i16.png": encoded(deep["i16"], "PNG"),
        "turned.png": encoded(photo, "PNG", exif=exif),
        "animated.png": encoded(photo, "PNG", save_all=True, append_images=[Image.new("RGB", photo.size)]),
        "rgb.ppm": encoded(photo, "PPM"),
        "l.pgm": encoded(photo.convert("L"), "PPM"),
        "1.pbm": encoded(photo.convert("1"), "PPM"),
        "i32.pgm": encoded(deep["i32"], "PPM"),
        "plain.ppm": b"P3\n# a comment\n8 8 15\n" + b"1 2 15\n" * 64,
        "plain.pbm": b"P1\n8 8\n" + b"0110\n" * 16,
        "odd.pgm": b"P5 8 8 99\n" + bytes(range(64)),
        "rgb.tif": encoded(photo, "TIFF"),
        "lzw.tif": encoded(photo, "TIFF", compression="tiff_lzw"),
        "jpeg.tif": encoded(photo, "TIFF", compression="jpeg"),
        "deflate.tif": encoded(photo.convert("RGBA"), "TIFF", compression="tiff_adobe_deflate"),
        "g4.tif": encoded(photo.convert("1"), "TIFF", compression="group4"),
        "lzma.tif": encoded(photo, "TIFF", compression="lzma"),
        "packbits.tif": encoded(palette, "TIFF", compression="packbits"),
        "big.tif": encoded(photo, "TIFF", big_tiff=True),
        "cmyk.tif": encoded(photo.convert("CMYK"), "TIFF"),
        "lab.tif": encoded(photo.convert("LAB"), "TIFF"),
        "ycbcr.tif": encoded(photo.convert("YCbCr"), "TIFF"),
        "turned.tif": encoded(photo, "TIFF", tiffinfo={ORIENTATION: 6}),
        "turned-lzw.tif": encoded(photo, "TIFF", tiffinfo={ORIENTATION: 8}, compression="tiff_lzw"),
        "rgb.webp": encoded(photo, "WEBP"),
        "rgba.webp": encoded(photo.convert("RGBA"), "WEBP", lossless=True),
        "turned.webp": encoded(photo, "WEBP", exif=exif),
        "animated.webp": encoded(photo, "WEBP", save_all=True, append_images=[Image.new("RGB", photo.size)]),
    }
    return files | {f"{name}.tif": encoded(image, "TIFF") for name, image in deep.items()}


def rle_bmp(width: int, height: int, content: bytes) -> bytes:
    """A BMP whose pixels are run lengths."""
    palette = b"".join(bytes((i, i, i, 0)) for i in range(256))
    begin = 14 + 40 + len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(content), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", begin + len(content), 0, 0, begin) + header + palette + content


# EXIF and TIFF

VALUE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
SHORT, LONG, BYTE, ASCII, RATIONAL = 3, 4, 1, 2, 5
Tag = tuple[int, int, int, bytes]  # number, type, values, and their bytes


def directory(tags: list[Tag], order: str = "<", offset: int = 8) -> bytes:
    """A TIFF of one directory: what EXIF is."""
    content = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", offset)
    entries, values = b"", b""
    end = offset + 2 + 12 * len(tags) + 4
    for number, kind, count, value in tags:
        place = value.ljust(4, b"\0")[:4]
        if len(value) > 4:
            place = struct.pack(f"{order}I", end + len(values))
            values += value
        entries += struct.pack(f"{order}HHI", number & 0xFFFF, kind & 0xFFFF, count & 0xFFFFFFFF) + place
    return content + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + values


def orientation_tag(orientation: int, order: str = "<") -> Tag:
    """As cameras write it."""
    return (ORIENTATION, SHORT, 1, struct.pack(f"{order}H", orientation))


def with_exif(image: Image.Image, kind: str, exif: bytes) -> bytes:
    """A JPEG, PNG or WebP with a block of EXIF that PIL has not looked into."""
    if kind == "JPEG":
        content = encoded(image, "JPEG", quality=90)
        block = b"Exif\0\0" + exif
        return SOI + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + content[2:]
    if kind == "PNG":
        return insert_chunks(encoded(image, "PNG"), [(b"eXIf", exif)])
    return encoded(image, "WEBP", lossless=True, exif=exif)


# the number of a tag that PIL writes again when it turns an image, and an odd type for it
ODD_TAGS: dict[str, Tag] = {
    "resolution unit as byte": (0x0128, BYTE, 1, b"\2"),
    "resolution unit as text": (0x0128, ASCII, 2, b"2\0"),
    "maker as number": (0x010F, RATIONAL, 1, struct.pack("<II", 1, 2)),
    "description as number": (0x010E, SHORT, 1, struct.pack("<H", 7)),
    "software as number": (0x0131, RATIONAL, 1, struct.pack("<II", 1, 0)),
    "time as number": (0x0132, RATIONAL, 2, struct.pack("<IIII", 1, 2, 3, 4)),
    "resolution as byte": (0x011A, BYTE, 1, b"\x48"),
    "resolution as text": (0x011B, ASCII, 3, b"72\0"),
    "resolution by zero": (0x011A, RATIONAL, 1, struct.pack("<II", 72, 0)),
    "directory of EXIF far away": (0x8769, LONG, 1, struct.pack("<I", 0xFFFFFFF0)),
    "directory of EXIF as text": (0x8769, ASCII, 5, b"none\0"),
    "directory of EXIF as long long": (0x8769, 16, 1, struct.pack("<Q", 2**63 + 5)),
    "directory of GPS as negative": (0x8825, 9, 1, struct.pack("<i", -5)),
    "directory of GPS as fraction": (0x8825, RATIONAL, 1, struct.pack("<II", 9, 4)),
    "rights as double": (0x8298, 12, 1, struct.pack("<d", float("nan"))),
    "unknown type": (0x010F, 99, 1, b"abcd"),
}


# JPEG, PNG


def gray_png_of_16_bits(side: int) -> bytes:
    """A black PNG of 16 bits, which is a thousandth of its pixels in size."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(side * 2 + 1)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 16, 0, 0, 0, 0)
    return png_of([(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")])


def costly_files(side: int) -> dict[str, bytes]:
    """Small files that are expensive, in time or in memory, for their sizes."""
    black = np.zeros((side, side))
    return {
        "scans.jpg": jpeg_of_many_scans(side, 3000),
        "gray16.png": gray_png_of_16_bits(side),
        "int32.tif": encoded(Image.fromarray(black.astype(np.int32)), "TIFF", compression="tiff_adobe_deflate"),
        "float32.tif": encoded(Image.fromarray(black.astype(np.float32)), "TIFF", compression="tiff_adobe_deflate"),
        "flat.jp2": encoded(Image.new("RGB", (side, side)), "JPEG2000"),
        "flat.webp": encoded(Image.new("RGB", (side, side)), "WEBP"),
        "lab.tif": encoded(Image.new("LAB", (side, side)), "TIFF", compression="tiff_adobe_deflate"),
        "flat.gif": encoded(Image.new("P", (side, side)), "GIF"),
        "runs.bmp": rle_bmp(side, side, b"\x01\x05\x00\x00" * side),
        "odd.pgm": b"P5 %d %d 254\n" % (side, side) + bytes(side * side),
        "padding.jpg": SOI + b"\xff" * 3_000_000 + encoded(Image.new("RGB", (8, 8)), "JPEG")[2:],
        "chunks.png": insert_chunks(encoded(Image.new("RGB", (8, 8)), "PNG"), [(b"abCd", b"")] * 700_000),
        "comments.ppm": b"P3 100 100 255\n" + b"#\n" * 200_000 + b"0 " * 30_000,
        "tags.tif": tiff_of_shared_values(3000, 2**20),
        "tags.jpg": with_exif(Image.new("RGB", (8, 8)), "JPEG", directory([(n, 7, 60_000, b"") for n in range(5000)])),
        "tile.tif": tiff_of_a_large_tile(2**15),
    }


def tiff_of_shared_values(tags: int, size: int) -> bytes:
    """Many tags whose values are the same bytes."""
    content = directory([(number + 1000, 7, size, b"") for number in range(tags)])
    return content + bytes(size)


def tiff_of_a_large_tile(side: int) -> bytes:
    """One pixel, in a tile of many."""
    tile = zlib.compress(bytes(side * side), 9)
    fields = {256: 1, 257: 1, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8 + 2 + 12 * 10 + 4}
    tags = [(number, LONG, 1, struct.pack("<I", value)) for number, value in fields.items()]
    return directory([*tags, (325, LONG, 1, struct.pack("<I", len(tile)))]) + tile


# random ones


def mutated_files(seed: int, count: int) -> Iterator[bytes]:
    """Valid files of which some bytes are changed, removed, doubled or exchanged with those of others."""
    chance = random.Random(seed)
    files = list(valid_files().values())
    for _ in range(count):
        content = bytearray(chance.choice(files))
        for _ in range(chance.choice((1, 1, 2, 4, 16))):
            _mutate(content, chance, files)
        whole = bytes(content)
        if whole.startswith(PNG_HEAD) and chance.random() < 0.7:
            whole = png_of(png_chunks(whole))  # with sums that are right, so that PIL looks further
        yield whole


EDGES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0xFE, 0xD9, 0xDA)


def _mutate(content: bytearray, chance: random.Random, files: list[bytes]) -> None:
    if not content:
        return
    # headers are where the surprises are
    place = chance.randrange(len(content) if chance.random() < 0.4 else min(len(content), 200))
    length = chance.choice((1, 2, 4, 8, 64))
    action = chance.randrange(8)
    if action == 0:
        content[place] ^= 1 << chance.randrange(8)
    elif action == 1:
        content[place] = chance.choice(EDGES)
    elif action == 2:
        content[place : place + length] = chance.randbytes(length)
    elif action == 3:
        content[place : place + length] = b""
    elif action == 4:
        content[place:place] = content[place : place + length] * chance.choice((1, 2, 50))
    elif action == 5:
        other = chance.choice(files)
        begin = chance.randrange(len(other))
        content[place : place + length] = other[begin : begin + length]
    elif action == 6:
        value = chance.choice((0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, chance.randrange(2**16)))
        size, order = chance.choice((2, 4)), chance.choice(("little", "big"))
        content[place : place + size] = (value % 2 ** (8 * size)).to_bytes(size, order)
    else:
        del content[place:]


def structured_files(seed: int, count: int) -> Iterator[bytes]:
    """Files whose parts are well formed but wrong, or at wrong places."""
    chance = random.Random(seed)
    makers: list[Callable[[random.Random], bytes]] = [
        _odd_exif,
        _odd_exif,
        _odd_tiff,
        _odd_tiff,
        _odd_tiff,
        _odd_png,
        _odd_png,
        _odd_jpeg,
        _odd_jpeg,
        _odd_jpeg2000,
        _odd_riff,
        _odd_gif,
        _odd_bmp,
        _odd_ppm,
        _cut,
    ]
    for _ in range(count):
        yield chance.choice(makers)(chance)


NUMBERS = (0, 1, 2, 3, 6, 8, 9, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1)


def _odd_tag(chance: random.Random, number: int, order: str) -> Tag:
    kind = chance.choice((*VALUE_SIZES, SHORT, LONG, RATIONAL, 0, 99))
    count = chance.choice((0, 1, 1, 1, 2, 3, 5, 100, 2**31, 2**32 - 1))
    value = chance.choice((chance.randbytes(min(count, 200) * 8), struct.pack(f"{order}I", chance.choice(NUMBERS))))
    return number, kind, count, value


EXIF_TAGS = (270, 271, 272, 282, 283, 296, 305, 306, 330, 700, 0x8298, 0x8769, 0x8825, 0xA005)


def _odd_exif(chance: random.Random) -> bytes:
    order = chance.choice("<>")
    tags = [_odd_tag(chance, number, order) for number in chance.sample(EXIF_TAGS, chance.randrange(4))]
    turned = orientation_tag(chance.randrange(10), order)
    tags.append(turned if chance.random() < 0.7 else _odd_tag(chance, ORIENTATION, order))
    exif = directory(tags, order)
    if chance.random() < 0.2:
        exif = exif[: chance.randrange(len(exif))]
    image = chance.choice(PHOTOGRAPHS)
    if chance.random() < 0.2:
        text = f"\nexif\n{len(exif):8}\n{exif.hex()}\n"
        profile = b"Raw profile type exif\0" + text.encode()
        return insert_chunks(encoded(image, "PNG"), [(b"tEXt", profile)])
    return with_exif(image, chance.choice(("JPEG", "PNG", "WEBP")), exif)


def _odd_tiff(chance: random.Random) -> bytes:
    """A TIFF with some of its tags made otherwise, and its pixels at the end."""
    order = chance.choice("<>")
    width, height = chance.choice(((8, 8), (16, 5), (1, 30)))
    samples = chance.choice((1, 1, 3, 4))
    pixels = chance.randbytes(width * height * samples)
    compression = chance.choice((1, 8, 5, 7, 32773))
    packed = zlib.compress(pixels) if compression == 8 else pixels
    fields = {
        256: width,
        257: height,
        258: 8,
        259: compression,
        262: {1: 1, 3: 2, 4: 5}[samples],
        273: 0,
        274: chance.randrange(10),
        277: samples,
        278: height,
        279: len(packed),
        284: 1,
        338: 0,
        339: 1,
        317: chance.choice((1, 2, 3)),
    }
    if samples == 1:
        del fields[338]
    if chance.random() < 0.3:
        fields |= {322: 16, 323: 16, 324: 0, 325: len(packed)}
    numbers = sorted(fields)
    end = 8 + 2 + 12 * len(numbers) + 4
    odd = chance.sample(numbers, chance.choice((0, 1, 1, 2, 4)))
    tags = []
    for number in numbers:
        value = end if number in (273, 324) else fields[number]
        # a value longer than its place comes before the pixels, which are then at the wrong place as well
        tag = (number, LONG, 1, struct.pack(f"{order}I", value))
        tags.append(_odd_tag(chance, number, order) if number in odd else tag)
    return directory(tags, order) + packed


ODD_CHUNKS = (b"tRNS", b"PLTE", b"gAMA", b"cHRM", b"iCCP", b"sRGB", b"pHYs", b"acTL", b"fcTL", b"fdAT", b"eXIf")
ODD_TEXTS = (b"transparency", b"exif", b"icc_profile", b"gamma", b"dpi", b"loop", b"XML:com.adobe.xmp")


def _odd_png(chance: random.Random) -> bytes:
    names = ("rgb.png", "rgba.png", "la.png", "1.png", "p.png", "p4.png", "i16.png", "animated.png")
    chunks = png_chunks(FILES[chance.choice(names)])
    for _ in range(chance.choice((1, 1, 2, 3))):
        place = chance.randrange(len(chunks) + 1)
        action = chance.randrange(5)
        if action == 0 and place < len(chunks):
            del chunks[place]
        elif action == 1:
            chunks.insert(place, chance.choice(chunks) if chunks else (b"IDAT", b""))
        elif action == 2:
            chunks.insert(
                place, (chance.choice(ODD_CHUNKS), chance.randbytes(chance.choice((0, 1, 2, 3, 6, 9, 26, 40))))
            )
        elif action == 3:
            name = chance.choice(ODD_TEXTS)
            value = chance.choice((b"", b"1", b'tiff:Orientation="6"', chance.randbytes(9)))
            kind, value = chance.choice(
                ((b"tEXt", value), (b"zTXt", b"\0" + zlib.compress(value)), (b"iTXt", b"\0\0\0\0" + value))
            )
            chunks.insert(place, (kind, name + b"\0" + value))
        elif place < len(chunks) and chunks[place][0] == b"IHDR":
            depth, color = chance.choice((1, 2, 4, 8, 16, 3)), chance.choice((0, 2, 3, 4, 6, 1))
            size = struct.pack(">II", chance.choice((0, 1, 40, 3000)), chance.choice((0, 1, 24, 3000)))
            chunks[place] = (b"IHDR", size + bytes((depth, color, 0, 0, chance.choice((0, 1, 2)))))
    return png_of(chunks)


SEGMENT_NAMES = (b"JFIF\0", b"Exif\0\0", b"MPF\0", b"Adobe\0", b"ICC_PROFILE\0", b"Photoshop 3.0\0", b"")


def _odd_jpeg(chance: random.Random) -> bytes:
    names = ("rgb.jpg", "l.jpg", "cmyk.jpg", "progressive.jpg", "turned.jpg", "mpo.jpg")
    segments = jpeg_segments(FILES[chance.choice(names)])
    for _ in range(chance.choice((1, 1, 2, 3))):
        place = chance.randrange(len(segments)) if segments else 0
        action = chance.randrange(6)
        if action == 0:
            del segments[place : place + 1]
        elif action == 1:
            segments[place:place] = segments[place : place + 1] * chance.choice((1, 2, 30, 150))
        elif action == 2:
            chance.shuffle(segments)
        elif action == 3:
            content = chance.randbytes(chance.choice((0, 1, 4, 5, 20)))
            beginning = chance.choice(SEGMENT_NAMES)
            marker = bytes((0xFF, chance.choice((0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE, 0xDB, 0xC4, 0xDD, 0xC8))))
            body = beginning + content
            segments.insert(place, marker + struct.pack(">H", len(body) + 2) + body)
        elif segments:
            segment = bytearray(segments[place])
            if segment[1] in (0xC0, 0xC2) and chance.random() < 0.7:
                segment[1] = chance.choice((0xC0, 0xC1, 0xC2, 0xC3, 0xC9, 0xCA, 0xC5))
                struct.pack_into(">HH", segment, 5, chance.choice((0, 1, 24, 2000)), chance.choice((0, 1, 40, 2000)))
            elif len(segment) > 4:
                segment[chance.randrange(4, len(segment))] = chance.choice(EDGES)
            segments[place] = bytes(segment)
    return jpeg_of(segments)


def _odd_jpeg2000(chance: random.Random) -> bytes:
    content = bytearray(FILES[chance.choice(("rgb.jp2", "rgba.jp2", "l.j2k", "i16.jp2"))])
    size, coding = content.find(b"\xff\x51"), content.find(b"\xff\x52")
    action = chance.randrange(4)
    if action == 0:
        place = size + chance.choice((6, 10, 14, 18, 22, 26, 30, 34))
        struct.pack_into(">I", content, place, chance.choice((0, 1, 2, 16, 40, 3000, 2**31)))
    elif action == 1:
        content[coding + chance.randrange(2, 14)] = chance.choice((0, 1, 2, 5, 10, 33, 255))
    elif action == 2:
        struct.pack_into(">H", content, size + 38, chance.choice((0, 1, 2, 3, 4, 5, 16384, 65535)))
    else:
        place = chance.randrange(max(coding, 60))
        content[place] = chance.choice(EDGES)
    return bytes(content)


def _odd_riff(chance: random.Random) -> bytes:
    """A WebP with chunks at wrong places."""
    content = FILES[chance.choice(("rgb.webp", "rgba.webp", "turned.webp", "animated.webp"))]
    chunks, index = [], 12
    while index + 8 <= len(content):
        (length,) = struct.unpack_from("<I", content, index + 4)
        chunks.append(content[index : index + 8 + length + length % 2])
        index += 8 + length + length % 2
    place = chance.randrange(len(chunks))
    action = chance.randrange(5)
    if action == 0:
        del chunks[place]
    elif action == 1:
        chunks.insert(place, chance.choice(chunks))
    elif action == 2:
        chance.shuffle(chunks)
    elif action == 3:
        name, body = chance.choice((b"EXIF", b"XMP ", b"ICCP", b"ANIM", b"ALPH")), chance.randbytes(8)
        chunks.insert(place, name + struct.pack("<I", chance.choice((8, 8, 0, 2**31))) + body)
    else:
        changed = bytearray(chunks[place])
        changed[chance.randrange(min(len(changed), 24))] = chance.choice(EDGES)
        chunks[place] = bytes(changed)
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _odd_gif(chance: random.Random) -> bytes:
    content = bytearray(FILES[chance.choice(("p.gif", "l.gif", "animated.gif"))])
    frame = content.find(b",")
    extension = (
        b"!"
        + bytes((chance.choice((0xF9, 0xFE, 0xFF, 0x01)),))
        + chance.choice(
            (b"\4" + chance.randbytes(4) + b"\0", b"\x0bNETSCAPE2.0\3\1\0\0\0", b"\1a" * 50 + b"\0", b"\0", b"\xff")
        )
    )
    if chance.random() < 0.5:
        content[frame:frame] = extension
    else:
        struct.pack_into("<H", content, frame + chance.choice((1, 3, 5, 7)), chance.choice((0, 1, 40, 3000, 65535)))
    if chance.random() < 0.3:
        content[chance.choice((6, 7, 8, 9, 10))] = chance.choice(EDGES)
    return bytes(content)


def _odd_bmp(chance: random.Random) -> bytes:
    content = bytearray(FILES[chance.choice(("rgb.bmp", "p.bmp", "1.bmp", "rle.bmp"))])
    place = chance.choice((10, 14, 18, 22, 26, 28, 30, 46))
    kind = {18: "<i", 22: "<i", 26: "<H", 28: "<H"}.get(place, "<I")
    value = chance.choice((0, 1, 2, 3, 4, 8, 12, 16, 24, 32, 40, 64, 108, 124, 3000, 32767))
    struct.pack_into(kind, content, place, -value if kind == "<i" and chance.random() < 0.5 else value)
    return bytes(content)


def _odd_ppm(chance: random.Random) -> bytes:
    magic = chance.choice((b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"P7", b"Pf", b"PF", b"Py", b"P0CMYK"))
    numbers = [b"%d" % chance.choice((0, 1, 7, 8, 255, 300, 65535, 70000, -3)) for _ in range(3)]
    separators = [chance.choice((b" ", b"\n", b"#c\n", b"\t ", b"")) for _ in range(3)]
    head = magic + b"\n" + b"".join(a + b for a, b in zip(numbers, separators, strict=True))
    body = chance.choice((bytes(300), b"1 0 2 255 " * 100, b"01" * 100, b"x 1", b"-1 5", b"9" * 50, b"#" * 10))
    return head + b"\n" + body * chance.choice((1, 20))


def _cut(chance: random.Random) -> bytes:
    content = chance.choice(list(FILES.values()))
    return content[: chance.randrange(len(content))]


PHOTOGRAPHS = photographs()
FILES = valid_files()
