"""Files that hold no image, half of one, or one that is too expensive; and odd files that hold a whole one."""

import struct
import zlib

from PIL import Image
from tests.helpers.hostile_images import FILES, ODD_TAGS, PHOTOGRAPHS, directory, orientation_tag, with_exif
from tests.helpers.image_files import PNG_HEAD, chunk, encoded, insert_chunks, jpeg_of_many_scans


def offsets_as_text(content: bytes) -> bytes:
    (begin,) = struct.unpack_from("<I", content, 4)
    (entries,) = struct.unpack_from("<H", content, begin)
    changed = bytearray(content)
    for place in range(begin + 2, begin + 2 + 12 * entries, 12):
        if struct.unpack_from("<H", content, place)[0] == 273:
            struct.pack_into("<H", changed, place + 2, 2)
    return bytes(changed)


BROKEN = {
    "nothing": b"",
    "text": b"just text",
    "half a PNG": FILES["rgb.png"][: len(FILES["rgb.png"]) // 2],
    "half a JPEG": FILES["rgb.jpg"][: len(FILES["rgb.jpg"]) // 2],
    "half a JPEG2000": FILES["rgb.jp2"][: len(FILES["rgb.jp2"]) // 2],
    "half a WebP": FILES["rgb.webp"][: len(FILES["rgb.webp"]) // 2],
    "half a GIF": FILES["p.gif"][: len(FILES["p.gif"]) // 2],
    "half a BMP": FILES["rgb.bmp"][: len(FILES["rgb.bmp"]) // 2],
    "half a PPM": FILES["rgb.ppm"][: len(FILES["rgb.ppm"]) // 2],
    "half a TIFF": FILES["rgb.tif"][: len(FILES["rgb.tif"]) // 2],
    "half of BigTIFF": FILES["big.tif"][: len(FILES["big.tif"]) // 2],
    "half of a packed TIFF": FILES["lzw.tif"][: len(FILES["lzw.tif"]) // 2],
    "BigTIFF without a directory": b"II\x2b\0\x08\0\0\0" + struct.pack("<Q", 2**63) + bytes(8),
    "BigTIFF of a huge directory": b"II\x2b\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**63) + bytes(40),
    "offsets as text": offsets_as_text(FILES["rgb.tif"]),
    "offsets as text of a packed TIFF": offsets_as_text(FILES["lzw.tif"]),
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "a JPEG of many scans": jpeg_of_many_scans(64, 1000),
    "a PNG of 10^8 pixels": PNG_HEAD
    + chunk(b"IHDR", struct.pack(">IIBBBBB", 10**4, 10**4, 8, 2, 0, 0, 0))
    + chunk(b"IDAT", zlib.compress(b""))
    + chunk(b"IEND", b""),
    "a JPEG2000 that is slow": encoded(Image.new("RGB", (5000, 5000)), "JPEG2000"),
}

# by name of a file; each has pixels that nothing is wrong with
ODD = {
    f"{odd.replace(' ', '-')}.jpg": with_exif(PHOTOGRAPHS[0], "JPEG", directory([orientation_tag(6), tag]))
    for odd, tag in ODD_TAGS.items()
} | {
    "raw-profile.png": insert_chunks(
        FILES["rgb.png"], [(b"tEXt", b"Raw profile type exif\0\nexif\n       4\n61626364\n")]
    ),
    "transparency.png": insert_chunks(encoded(PHOTOGRAPHS[0].convert("L"), "PNG"), [(b"tEXt", b"transparency\0red")]),
}
