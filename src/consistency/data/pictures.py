"""Decoding of one image with Pillow and conversion to the study's size, as in EDM's dataset tool; CelebA as in GC."""

import re
from contextlib import suppress
from io import BytesIO
from typing import Any

from PIL import Image, ImageOps

from consistency.base.errors import UserError
from consistency.config.dataset import Dataset

# Pillow ignores the file's name and would start external programs for some other formats.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_BIT_DEPTH = 24  # its offset in a PNG
_BITS_PER_SAMPLE = 258  # a TIFF's tag
_ALIGNED_CELEBA = (178, 218)


def decode(content: bytes, where: str, *, as_stored: bool = False) -> Image.Image:
    """Decode one opaque picture of at most 8 bits per channel, upright by its EXIF. as_stored: as EDM's tool, which
    ignores EXIF and transparency. Raises UserError, which names the file by `where`."""
    try:
        picture = Image.open(BytesIO(content), formats=_FORMATS)
        deep, frames, kind = _is_deep(picture, content), getattr(picture, "n_frames", 1), picture.format
        picture.load()
        if picture.mode == "LAB":
            raise ValueError("its colours are L*a*b*")
        checked = picture.has_transparency_data and not (as_stored or deep)
        opaque = not checked or picture.convert("RGBA").getchannel("A").getextrema() == (255, 255)
    except Exception as error:
        # On arbitrary bytes the decoders may raise anything.
        reason = " ".join(re.sub(r" <_io\.BytesIO object at \w+>", "", str(error)).split())
        raise UserError(f"{where} is not a readable image ({reason}): repair or remove it") from None
    if deep:
        raise UserError(f"{where} has more than 8 bits per channel: convert it to 8 bits")
    if frames > 1 and kind != "MPO":  # a camera's JPEG, whose further pictures are previews
        raise UserError(f"{where} holds {frames} pictures: save the one that is meant as a file of its own")
    if not opaque:
        raise UserError(f"{where} has transparent pixels: put it on a background and save it without transparency")
    return picture if as_stored else _upright(picture)


def _is_deep(picture: Any, content: bytes) -> bool:
    """Tell whether a picture has more than 8 bits per channel: Pillow would silently clip grey levels at 255, or drop a
    colour's lower byte."""
    if picture.mode.startswith(("I", "F")):
        return True
    if picture.format == "PPM":
        arguments = picture.tile[0].args
        return isinstance(arguments, tuple) and int(arguments[1]) > 255
    if picture.format == "TIFF":
        return max(picture.tag_v2.get(_BITS_PER_SAMPLE, (1,))) > 8
    return picture.format == "PNG" and content[_BIT_DEPTH] == 16


def _upright(picture: Image.Image) -> Image.Image:
    """Turn a picture as its EXIF says. A broken EXIF says nothing."""
    with suppress(Exception):  # on arbitrary bytes it may be anything
        ImageOps.exif_transpose(picture, in_place=True)
    return picture


def crop_and_resize(picture: Image.Image, where: str, settings: Dataset) -> Image.Image:
    """Crop the centred square and resize it by Lanczos on uint8 (EDM's center-crop)."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = coloured(picture, settings).crop((left, top, left + side, top + side))
    return square.resize((settings.resolution, settings.resolution), Image.Resampling.LANCZOS)


def resize(picture: Image.Image, where: str, settings: Dataset) -> Image.Image:
    """Resize a square picture by Lanczos on uint8. Raises UserError if it is not square."""
    if picture.width != picture.height:
        raise UserError(
            f"{where} has {picture.width}x{picture.height} pixels, but FFHQ's aligned images are square: "
            "set dataset.path to images1024x1024, or dataset.kind to image_folder to crop it"
        )
    return crop_and_resize(picture, where, settings)


def shrink_and_crop(picture: Image.Image, where: str, settings: Dataset) -> Image.Image:
    """Resize an aligned CelebA image by Lanczos on uint8 until its shorter side has the study's size, then crop the
    centred square, as in GC. Unlike `crop_and_resize` it first rounds the longer side down to whole pixels.
    Raises UserError for other sizes."""
    if picture.size != _ALIGNED_CELEBA:
        raise UserError(
            f"{where} has {picture.width}x{picture.height} pixels, but CelebA's aligned images have 178x218: set "
            "dataset.path to img_align_celeba, or dataset.kind to image_folder to crop any images"
        )
    size, width, height = settings.resolution, *picture.size
    picture = coloured(picture, settings).resize((size, size * height // width), Image.Resampling.LANCZOS)
    top = round((picture.height - size) / 2)
    return picture.crop((0, top, size, top + size))


def keep(picture: Image.Image, where: str, settings: Dataset) -> Image.Image:
    """Return a picture that already has the study's size and channels. Raises UserError otherwise."""
    found, size = (picture.mode, *picture.size), settings.resolution
    mode = "RGB" if settings.channels == 3 else "L"
    if found != (mode, size, size):
        raise UserError(
            f"{where} has {picture.width}x{picture.height} pixels of mode {picture.mode}, the study has {size}x{size} "
            f"of {mode}: set dataset.resolution and dataset.channels to those of the zip"
        )
    return picture


def coloured(picture: Image.Image, settings: Dataset) -> Image.Image:
    """Convert a picture to the study's channels, RGB or grey."""
    return picture.convert("RGB" if settings.channels == 3 else "L")
