"""Image files: which files are images, their order, and their decoding to RGB, 8 bits per channel, of one size.

Conversion to RGB, the same as PIL's `convert("RGB")` except for 16 bits, which PIL would clip:
    RGB            as it is
    L, 1, P        grey or palette colour in all three channels
    LA, PA, RGBA   alpha dropped
    CMYK, YCbCr, LAB, HSV   converted (inverted Adobe CMYK is recognised)
    I;16, I        16-bit grey, scaled by 255 / 65535 and rounded, in all three channels
An EXIF orientation is ignored, as public Re-ID code does. Floating-point images are refused.

Resizing is PIL's `Image.resize((W, H), Image.BILINEAR)`, what torchvision's Resize does to a PIL image.

This module imports neither pandas nor torch: each worker process that packs loads it.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from danet_core.files import StudyError

INTERPOLATION = "bilinear"
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp"})


def natural_key(name: str) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """Sort key under which `2.jpg` precedes `10.jpg`; names that differ only in zeros keep a fixed order."""
    parts = re.split(r"(\d+)", name)
    # int() reads every digit \d matches, other scripts' included
    return tuple((1, int(p), "") if i % 2 else (0, 0, p.casefold()) for i, p in enumerate(parts)), name


def load_rgb(path: Path) -> Image.Image:
    """Decode a whole image file to mode RGB.

    Raises StudyError, naming the file, when it is empty, truncated, no image, too large, or in floating point.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return to_rgb(image)
    except FileNotFoundError:
        raise StudyError(f"{path} is missing; restore it, or prepare the data set again") from None
    except PermissionError:
        raise StudyError(f"{path} cannot be read: no read permission; give yourself read access (chmod u+r)") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ... on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StudyError(
            f"{path} ({_size(path)} bytes) cannot be decoded ({reason.replace(str(path), 'the file')}); "
            "expected a whole image; copy it again from the archive, or prepare a rendered set again"
        ) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB; see the module's docstring. Raises ValueError for floating point or over 16 bits."""
    if image.mode == "RGB":
        return image.copy() if image.readonly else image
    if image.mode == "F":
        raise ValueError("floating-point pixels, expected 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"grey values from {values.min()} to {values.max()}, expected 8 or 16 bits")
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    return image.convert("RGB")


def decode(path: Path, height: int, width: int) -> UInt8[np.ndarray, "3 H W"]:
    """An image file as uint8 (3, height, width), RGB, bilinear. Raises StudyError as `load_rgb`."""
    image = load_rgb(path)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
