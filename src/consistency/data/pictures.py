"""Decoding of one image with Pillow and conversion to the study's size, as in EDM's dataset tool; CelebA as in GC."""

from io import BytesIO

from PIL import Image

from consistency.base.errors import UserError
from consistency.config.dataset import Dataset

# Pillow ignores the file's name and would start external programs for some other formats.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_BIT_DEPTH = 24  # its offset in a PNG
_ALIGNED_CELEBA = (178, 218)


def decode(content: bytes, where: str) -> Image.Image:
    """Decode a picture of at most 8 bits per channel. Raises UserError, which names the file by `where`."""
    try:
        picture = Image.open(BytesIO(content), formats=_FORMATS)
        picture.load()
    except Exception as error:
        # On arbitrary bytes the decoders may raise anything.
        reason = " ".join(str(error).split())
        raise UserError(f"{where} is not a readable image ({reason}): repair or remove it") from None
    if picture.mode.startswith(("I", "F")) or (picture.format == "PNG" and content[_BIT_DEPTH] == 16):
        # Pillow would silently clip grey levels at 255, or drop a colour's lower byte.
        raise UserError(f"{where} has more than 8 bits per channel: convert it to 8 bits")
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
