"""One picture: upright, opaque, 8 bits per channel, and in any of the formats that are read."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from tests.conftest import mistake
from tests.image_sources import encoded, noise

from consistency.data.pictures import decode

COLOUR, GREY = noise(8, 5, 3), noise(8, 5)
SOLID = np.dstack([COLOUR, np.full((8, 5), 255, np.uint8)])


def with_alpha(mode: str, alpha: int) -> Image.Image:
    """A picture with one pixel of that alpha, the others opaque."""
    picture = Image.fromarray(SOLID)
    picture.putpixel((2, 3), (1, 2, 3, alpha))
    return picture.convert(mode)


def tiff(bits: int) -> bytes:
    """A black RGB TIFF of 2x2 pixels; Pillow writes none of 16 bits."""
    data, after = bytes(12 * bits // 8), 8 + 2 + 12 * 9 + 4
    tags = [(256, 1, 2), (257, 1, 2), (258, 3, after), (259, 1, 1), (262, 1, 2), (273, 1, after + 6), (277, 1, 3)]
    tags += [(278, 1, 2), (279, 1, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 3, count, value) for tag, count, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, 9) + entries + bytes(4) + struct.pack("<HHH", bits, bits, bits) + data


def with_chunk(png: bytes, kind: bytes, data: bytes) -> bytes:
    """A PNG with one more chunk before its pixels."""
    at = png.index(b"IDAT") - 4
    return png[:at] + struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) + png[at:]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_picture_is_upright_as_its_exif_says(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(COLOUR, kind, exif=exif)
    with Image.open(io.BytesIO(content)) as picture:
        upright, stored = ImageOps.exif_transpose(picture), np.asarray(picture)
    found = decode(content, "it")
    assert found.size == ((5, 8) if orientation < 5 else (8, 5))
    assert np.array_equal(found, upright)
    assert np.array_equal(decode(content, "it", as_stored=True), stored)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0XX", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\1"]
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_exif_says_nothing(exif: bytes) -> None:
    plain, broken = encoded(COLOUR, "JPEG"), encoded(COLOUR, "JPEG", exif=exif)
    assert np.array_equal(decode(broken, "it"), decode(plain, "it"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        *((encoded(with_alpha(mode, alpha)), "transparent") for mode in ("RGBA", "LA") for alpha in (0, 254)),
        (encoded(with_alpha("RGBA", 0), "WEBP", lossless=True), "transparent"),
        (encoded(with_alpha("RGBA", 0), "TIFF"), "transparent"),
        (encoded(with_alpha("RGBA", 0).quantize(9)), "transparent"),
        (encoded(Image.fromarray(GREY).quantize(9), transparency=0), "transparent"),
        (encoded(COLOUR, transparency=tuple(COLOUR[0, 0].tolist())), "transparent"),
        (encoded(GREY, transparency=int(GREY[0, 0])), "transparent"),
        *(
            (encoded(COLOUR, kind, save_all=True, append_images=[Image.fromarray(SOLID[..., 2::-1])]), "2 pictures")
            for kind in ("PNG", "WEBP", "GIF", "TIFF")
        ),
        (tiff(16), "more than 8 bits"),
        (encoded(GREY.astype(np.uint16), "TIFF"), "more than 8 bits"),
        (b"P6 2 1 65535 " + bytes(12), "more than 8 bits"),
        (b"P5 2 1 65535 " + bytes(4), "more than 8 bits"),
        (b"P3 1 1 1000 1 2 3\n", "more than 8 bits"),
        (encoded(Image.fromarray(COLOUR).convert("LAB"), "TIFF"), "not a readable image"),
    ],
)
def test_what_has_no_one_opaque_picture_of_8_bits_is_refused(content: bytes, words: str) -> None:
    assert words in mistake(decode, content, "it")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encoded(SOLID), COLOUR),
        (encoded(SOLID, "WEBP", lossless=True), COLOUR),
        (with_chunk(encoded(np.maximum(COLOUR, 1)), b"tRNS", bytes(6)), np.maximum(COLOUR, 1)),
        (encoded(with_alpha("RGBA", 255)), with_alpha("RGB", 255)),
        (encoded(COLOUR, "BMP"), COLOUR),
        (encoded(COLOUR, "PPM"), COLOUR),
        (encoded(COLOUR, "TIFF", compression="tiff_lzw"), COLOUR),
        (tiff(8), np.zeros((2, 2, 3), np.uint8)),
    ],
)
def test_an_opaque_picture_keeps_its_colours(content: bytes, expected: np.ndarray) -> None:
    assert np.array_equal(decode(content, "it").convert("RGB"), expected)


def test_the_first_picture_of_a_cameras_jpeg_is_the_one() -> None:
    content = encoded(COLOUR, "MPO", save_all=True, append_images=[Image.fromarray(SOLID[..., 2::-1])])
    assert np.array_equal(decode(content, "it"), decode(encoded(COLOUR, "JPEG"), "it"))
