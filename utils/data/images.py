"""Image files of any kind as upright 8-bit RGB; pixels without a known range are refused, not clipped."""

import contextlib
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image

from utils.cli import UserError, first_line

STEP = 257  # 16-bit steps in an 8-bit step: 65535 = 255 * 257
ORIENTATION = 0x0112  # the EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
SIXTEEN_BITS_AS_I = ("PNG", "PPM")  # formats that Pillow may open in mode I although they hold 0 to 65535


class UnknownRangeError(ValueError):
    """Pixels without a known largest value; the message names their mode."""


def read_image(path: str) -> Image.Image:
    """The image at `path` in mode RGB, turned as its EXIF orientation says, without transparency.

    16 bits are scaled to 8. Raises UserError, which names the file, if it cannot be read, and for 32-bit and
    floating-point pixels, with their mode.
    """
    with opened(path) as image:
        image.load()  # this turns a TIFF upright, and reads what a PNG holds after its pixels
        rgb, method = as_rgb(image), turn(image)
        return rgb if method is None else rgb.transpose(method)


def check_header(path: str) -> None:
    """Raises the UserErrors of `read_image` that can be told without decoding pixels."""
    with opened(path) as image:
        check_range(image)


@contextlib.contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """The image at `path`, its pixels not yet read; errors in the block become a UserError that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # damaged EXIF data are common, and the pixels are good anyway
            with Image.open(path) as image:
                yield image
    except Exception as error:  # the bytes of a foreign file can raise anything
        raise UserError(f"{path} {trouble(error)}") from None


def trouble(error: Exception) -> str:
    """What is wrong with a file at which `error` was raised."""
    if isinstance(error, UnknownRangeError):
        return str(error)
    reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
    if isinstance(error, Image.UnidentifiedImageError):
        reason = "it is not an image file"
    return f"cannot be read as an image ({reason}): replace it, or leave it out"


def check_range(image: Image.Image) -> None:
    """Raises UnknownRangeError for an image whose pixels have no known largest value."""
    if image.mode == "F" or (image.mode == "I" and image.format not in SIXTEEN_BITS_AS_I):
        kind = "floating-point numbers" if image.mode == "F" else "32-bit integers"
        raise UnknownRangeError(
            f"has mode {image.mode}, {kind} without a known range: save it as an image of 8 or 16 bits"
        )


def as_rgb(image: Image.Image) -> Image.Image:
    """`image` in mode RGB. Transparency is dropped: a pixel has the color that lies under it."""
    check_range(image)
    if image.mode.startswith("I"):
        # Not by convert, which clips at 255.
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((values + STEP // 2) // STEP).astype(np.uint8))
    elif image.mode in ("P", "PA") and "transparency" in image.info:
        image = image.convert("RGBA")  # otherwise Pillow would warn
    return image.convert("RGB")


def turn(image: Image.Image) -> Image.Transpose | None:
    """The transposition that turns a loaded image upright by its EXIF orientation; None if there is nothing to do."""
    try:
        return TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF data can raise anything
        return None
