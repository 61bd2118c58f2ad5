"""Encoded images to upright RGB. No torch: the check of a dataset runs it in forked processes."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

UPRIGHT = dict(zip(range(2, 9), (0, 3, 1, 5, 4, 6, 2), strict=True))  # EXIF orientation: Image.Transpose


def encoded_bytes(record: dict | None) -> bytes:
    if record is None or (record["bytes"] is None and record["path"] is None):
        raise ValueError("neither bytes nor a path")
    return record["bytes"] if record["bytes"] is not None else Path(record["path"]).read_bytes()


def decode(record: dict) -> Image.Image:
    """Decodes one image, upright (EXIF) and in RGB.

    Transparency is dropped as by Pillow's `convert("RGB")`. Grey values of 16 bits are divided by 257 and rounded.
    Floating-point grey is taken as 0..1 when all of it is, else as 0..255.

    Args:
        record: `{"bytes", "path"}`, a row's image of a column `datasets.Image(decode=False)`.

    Raises:
        ValueError: naming the path, for anything that cannot be decoded.
    """
    try:
        image = Image.open(BytesIO(encoded_bytes(record)))
        image.load()
        orientation = image.getexif().get(0x0112)  # after load, since Pillow turns TIFF by itself
        image = to_rgb(image)
        return image.transpose(Image.Transpose(UPRIGHT[orientation])) if orientation in UPRIGHT else image
    except Exception as error:  # Pillow's readers raise almost anything on damaged files
        path = (record or {}).get("path") or "without a path"
        raise ValueError(f"image {path} cannot be decoded ({type(error).__name__}: {error})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    image.info.pop("transparency", None)  # Pillow would warn about palettes
    if image.mode == "RGB":
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    return (image.convert("LA") if image.mode == "La" else image).convert("RGB")


def _eight_bits(grey: np.ndarray) -> np.ndarray:
    low, high = grey.min(), grey.max()
    top = 65535 if grey.dtype.kind in "ui" else 1 if high <= 1 else 255
    if not 0 <= low <= high <= top:  # also refuses NaN
        raise ValueError(f"grey values from {low} to {high}, expected 0 to {top}")
    return np.rint(grey.astype(np.float64) * (255 / top)).astype(np.uint8)
