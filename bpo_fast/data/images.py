"""Images: where their files may lie, and the one way from a file to the pixels that a model sees."""

import io
import os
import threading
import warnings
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from bpo_fast.runs.text import is_text, shown

# An image of more pixels is refused before they are decoded. 8192 x 8192 is more than cameras of the data sets give;
# decoding and converting one holds 0.5 GiB (8 bits a channel), 1 GiB (transparent) or 1.3 GiB (floats).
MAX_PIXELS = 2**26
# What data sets hold. Pillow's other formats may hold an image within the image, of any size (ICO, ICNS), or are drawn
# by a program that it starts (EPS).
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
# `warnings.catch_warnings` is not for several threads at once.
_OPENING = threading.Lock()


class Embedded(str):
    """The name of an image whose bytes lie in a table, not in a file of that name."""

    __slots__ = ()


def image_path(root: str | os.PathLike, name: object) -> Path:
    """Path of the image that a record names, below the image folder.

    Args:
        root: the image folder; it may be a link itself.
        name: what the record holds: a path relative to `root`, or an absolute one that lies in it.

    Returns:
        The path, whether there is a file or not; `read_image` says so.

    Raises:
        ValueError: `name` is not the text of a path, or leads out of `root`: by `..`, as an absolute path, or by a
            link.

    Example:

    >>> image_path("coco", "train/1.jpg").as_posix()
    'coco/train/1.jpg'
    >>> image_path("coco", "../secret.jpg")
    Traceback (most recent call last):
    ValueError: image '../secret.jpg': found a path that leaves the image folder 'coco', expected one inside it; move \
the image there.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"image: found {shown(name)}, expected the path of an image.")
    if "\0" in name or not is_text(name):
        raise ValueError(f"image: found {shown(name)}, a path that no file can have, expected that of an image.")
    path = Path(root, name)
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise ValueError(
            f"image {shown(name)}: found a path that leaves the image folder '{root}', expected one inside it; move "
            "the image there."
        )
    return path


def read_image(source: str | os.PathLike | bytes, name: str = "image", *, least: int | None = None) -> Image.Image:
    """Read an image whole, upright and in RGB; of an animation its first frame.

    Args:
        source: path of its file, or the file's bytes.
        name: of the image, for an error about bytes.
        least: pixels a side that are enough; a JPEG of many more is decoded to fewer, in a fraction of the time.

    Raises:
        ValueError: the file is missing, has more than `MAX_PIXELS`, or is not an image that can be decoded to its end.
    """
    in_memory = isinstance(source, bytes)
    name = name if in_memory else source
    try:
        with _opened(io.BytesIO(source) if in_memory else source) as image:
            if least is not None:
                image.draft("RGB", (least, least))
            return upright_rgb(image)
    except FileNotFoundError:
        raise ValueError(f"{name}: found no such file, expected an image.") from None
    # Pillow's decoders report damage by nearly any error, by format.
    except Exception as error:
        raise ValueError(f"{name}: found a file that cannot be decoded ({error}), expected an image.") from None


@cache
def _formats():
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _opened(file):
    """The image, of which only the head is read, if its size is within the limit."""
    with _OPENING, warnings.catch_warnings():
        # Pillow's own limits are one that warns, above ours, and one that raises.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(file, formats=_formats())
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ValueError(f"{image.width} x {image.height} pixels, over the limit of {MAX_PIXELS:,}")
    return image


def upright_rgb(image: Image.Image) -> Image.Image:
    """An opened image as models see it: turned as its EXIF data say, 8 bits a channel, transparency on white.

    Pillow's own conversion clips 16-bit and floating-point values at 255, which turns such an image white. Here those
    of 16 bits are divided by 257. Those of 32 bits are taken to reach from 0 to the least of 255 and 65535 (for floats
    also 1) that holds them all; where there is none, they are stretched from their least to their greatest. An image
    that this has made already comes back as it is.

    Raises:
        ValueError, OSError: the image cannot be decoded to its end, or a value of it is not finite.

    Example:

    >>> upright_rgb(Image.new("I;16", (1, 1), 32896)).getpixel((0, 0))
    (128, 128, 128)
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = _grey(np.asarray(image) / np.float32(257))
    elif image.mode in ("I", "F"):
        image = _grey(
            _scaled(np.asarray(image, dtype=np.float64), (255, 65535) if image.mode == "I" else (1, 255, 65535))
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _scaled(values, greatest):
    """Changes them in place: 8 bytes a pixel are held once."""
    if not np.isfinite(values).all():
        raise ValueError("a pixel that is not a finite number")
    low, high = values.min(), values.max()
    fitting = [limit for limit in greatest if low >= 0 and high <= limit]
    if not fitting:
        values -= low
    values *= 255 / fitting[0] if fitting else 255 / ((high - low) or 1)
    return values


def _grey(values):
    return Image.fromarray(np.rint(values, out=values).astype(np.uint8))
