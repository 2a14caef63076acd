"""An image file of any kind as 8-bit RGB, upright; what has no known range is refused, not clipped."""

import contextlib
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image

from utils.cli import UserError, first_line

STEP = 257  # of 16 bits in one of 8: 65535 = 255 * 257
ORIENTATION = 0x0112  # EXIF's number of it
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
SIXTEEN_BITS_AS_I = ("PNG", "PPM")  # formats that Pillow may give mode I, but whose numbers are 0 to 65535 all the same


class UnknownRangeError(ValueError):
    """Pixels that are numbers without a largest one; the message names their mode."""


def read_image(path: str) -> Image.Image:
    """The image at `path` in mode RGB, turned as its EXIF orientation says, without transparency.

    16 bits are scaled to 8. Raises UserError, naming the file, for one that cannot be read, and, naming its mode too,
    for 32-bit and floating-point pixels.
    """
    with opened(path) as image:
        image.load()  # which sets a TIFF upright, and finds what a PNG says after its pixels
        rgb, method = as_rgb(image), turn(image)
        return rgb if method is None else rgb.transpose(method)


def check_header(path: str) -> None:
    """Raises UserError as `read_image` does, as far as a file shows it without its pixels being decoded."""
    with opened(path) as image:
        check_range(image)


@contextlib.contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """The image at `path`, its pixels not yet read; what is raised at it becomes a UserError that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # damaged EXIF data are common, and the pixels are good
            with Image.open(path) as image:
                yield image
    except Exception as error:  # the bytes of a foreign file can raise anything
        raise UserError(f"{path} {trouble(error)}") from None


def trouble(error: Exception) -> str:
    """What is wrong with a file at which `error` was raised."""
    if isinstance(error, UnknownRangeError):
        return str(error)
    reason = "it is not an image file" if isinstance(error, Image.UnidentifiedImageError) else first_line(error)
    return f"cannot be read as an image ({reason})"


def check_range(image: Image.Image) -> None:
    """Raises UnknownRangeError for an image whose pixels have no known largest value."""
    if image.mode == "F" or (image.mode == "I" and image.format not in SIXTEEN_BITS_AS_I):
        kind = "floating-point numbers" if image.mode == "F" else "32-bit integers"
        raise UnknownRangeError(
            f"has mode {image.mode}, {kind} without a known range: save it as an image of 8 or 16 bits"
        )


def as_rgb(image: Image.Image) -> Image.Image:
    """`image` in mode RGB. Transparency is left out: a pixel has the colour that lies under it."""
    check_range(image)
    if image.mode.startswith("I"):
        # Not by convert, which clips at 255.
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((values + STEP // 2) // STEP).astype(np.uint8))
    elif image.mode in ("P", "PA") and "transparency" in image.info:
        image = image.convert("RGBA")  # of which Pillow would otherwise warn
    return image.convert("RGB")


def turn(image: Image.Image) -> Image.Transpose | None:
    """What sets a loaded image upright by its EXIF orientation; None if it is, or has none that can be read."""
    try:
        return TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF data can raise anything
        return None
