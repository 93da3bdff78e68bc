"""Decoding of one image by Pillow and conversion to the study's size, as in EDM's dataset tool; CelebA's as in GC."""

from io import BytesIO

import numpy as np
from PIL import Image

from consistency.base.errors import UserError
from consistency.config.dataset import Dataset

Array = np.ndarray

# Pillow detects the format whatever the file's name; for some other formats it starts a program.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_BIT_DEPTH = 24  # where a PNG has it
_ALIGNED_CELEBA = (178, 218)


def decode(content: bytes, where: str) -> Image.Image:
    """Decode a picture of at most 8 bits per channel. Raises UserError, which names the file by `where`."""
    try:
        picture = Image.open(BytesIO(content), formats=_FORMATS)
        picture.load()
    except Exception as error:
        # The decoders meet arbitrary bytes here and may raise anything.
        reason = " ".join(str(error).split())
        raise UserError(f"{where} is not a readable image ({reason}): mend or remove it") from None
    if picture.mode.startswith(("I", "F")) or (picture.format == "PNG" and content[_BIT_DEPTH] == 16):
        # Pillow would clip the grey levels at 255, or drop the lower half of a colour, silently.
        raise UserError(f"{where} has more than 8 bits a channel: convert it to 8 bits")
    return picture


def crop_and_resize(picture: Image.Image, where: str, settings: Dataset) -> Array:
    """Crop the centred square and resize it by Lanczos on uint8 (EDM's center-crop). Returns [R, R, C]."""
    picture = _coloured(picture, settings)
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return _resized(picture.crop((left, top, left + side, top + side)), settings)


def resize(picture: Image.Image, where: str, settings: Dataset) -> Array:
    """Resize a square picture by Lanczos on uint8. Returns [R, R, C]. Raises UserError if it is not square."""
    if picture.width != picture.height:
        raise UserError(
            f"{where} has {picture.width}x{picture.height} pixels, and FFHQ's aligned images are square: "
            "set dataset.path to images1024x1024, or dataset.kind to image_folder to have it cropped"
        )
    return _resized(_coloured(picture, settings), settings)


def shrink_and_crop(picture: Image.Image, where: str, settings: Dataset) -> Array:
    """Resize an aligned image of CelebA by Lanczos on uint8 until its shorter side has the study's size, then crop the
    centred square. This is GC's procedure; unlike `crop_and_resize` it rounds the longer side down to whole pixels
    first. Returns [R, R, C]. Raises UserError for an image of another size."""
    if picture.size != _ALIGNED_CELEBA:
        raise UserError(
            f"{where} has {picture.width}x{picture.height} pixels, and CelebA's aligned images 178x218: set "
            "dataset.path to img_align_celeba, or dataset.kind to image_folder to have any images cropped"
        )
    size, width, height = settings.resolution, *picture.size
    picture = _coloured(picture, settings).resize((size, size * height // width), Image.Resampling.LANCZOS)
    top = round((picture.height - size) / 2)
    return np.asarray(picture.crop((0, top, size, top + size))).reshape(size, size, settings.channels)


def keep(picture: Image.Image, where: str, settings: Dataset) -> Array:
    """Return a picture that already has the study's size and channels, [R, R, C]. Raises UserError otherwise."""
    found, size = (picture.mode, *picture.size), settings.resolution
    mode = "RGB" if settings.channels == 3 else "L"
    if found != (mode, size, size):
        raise UserError(
            f"{where} has {picture.width}x{picture.height} pixels of mode {picture.mode}, the study {size}x{size} of "
            f"{mode}: set dataset.resolution and dataset.channels to what the zip holds"
        )
    return np.asarray(picture).reshape(size, size, settings.channels)


def _coloured(picture: Image.Image, settings: Dataset) -> Image.Image:
    return picture.convert("RGB" if settings.channels == 3 else "L")


def _resized(square: Image.Image, settings: Dataset) -> Array:
    size = (settings.resolution, settings.resolution)
    if square.size != size:
        square = square.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(square).reshape(*size, settings.channels)
