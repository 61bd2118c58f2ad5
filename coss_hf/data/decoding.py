"""Encoded images to upright RGB. No torch: the check of a dataset runs it in forked processes."""

import contextlib
import errno
import logging
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from coss_hf.data.damaged_metadata import without_metadata

logger = logging.getLogger(__name__)

NOT_OF_THE_IMAGE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
MAX_ASPECT = 16  # longer side over shorter side of an image that is resized by its shorter side

# What turns an image upright, by its EXIF orientation.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def encoded_bytes(record: dict | None) -> bytes:
    """The encoded image of a record `{"bytes", "path"}`, read from its path where it has no bytes."""
    if record is None or (record["bytes"] is None and record["path"] is None):
        raise ValueError("neither bytes nor a path")
    if record["bytes"] is not None:
        return record["bytes"]
    if "://" in record["path"]:
        raise ValueError("a URL: images are not downloaded")
    return Path(record["path"]).read_bytes()


def decode(record: dict) -> Image.Image:
    """Decode one image, upright (EXIF) and in RGB.

    Transparency is dropped as by Pillow's `convert("RGB")`. Grey values of 16 bits are divided by 257 and rounded.
    Floating-point grey is taken as 0..1 when all of it is, else as 0..255. Texts, tags and profiles that cannot be read
    are left out.

    Args:
        record: a row's image `{"bytes", "path"}`, of a column `datasets.Image(decode=False)`.

    Raises:
        ValueError: the image cannot be decoded; the message names its path.
    """
    try:
        return _decode(encoded_bytes(record))
    except Exception as error:  # Pillow's readers raise almost anything on damaged files
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in NOT_OF_THE_IMAGE:
            raise
        path = (record or {}).get("path") or "without a path"
        raise ValueError(f"image {path} cannot be decoded ({type(error).__name__}: {error})") from error


def _decode(data: bytes) -> Image.Image:
    try:
        return _decode_upright(data)
    except Exception:
        for repaired in without_metadata(data):
            with contextlib.suppress(Exception):
                return _decode_upright(repaired)
        raise


def _decode_upright(data: bytes) -> Image.Image:
    image = Image.open(BytesIO(data))
    return upright_rgb(image)


def upright_rgb(image: Image.Image) -> Image.Image:
    """Turn an image by its EXIF orientation, if it can be read, and convert it to RGB, as `decode` does."""
    image.load()  # first, since Pillow turns TIFF by itself
    try:
        orientation = image.getexif().get(0x0112)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with a tag, the pixels are an image
        logger.debug("The EXIF tags of an image cannot be read: %s", error)
        orientation = None
    image = to_rgb(image)
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, as `decode` does."""
    image.info.pop("transparency", None)  # Pillow would warn about palettes
    if image.mode == "RGB":
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    if image.mode == "La":
        image = image.convert("LA")
    return image.convert("RGB")


def crop_long_side(image: Image.Image) -> Image.Image:
    """The centre of an image that is more than `MAX_ASPECT` times as long as wide; other images as they are.

    For what resizes an image by its shorter side and keeps the centre: a file of 100 bytes, 4,000 pixels by 2, would
    otherwise become an image of 512,000 by 256.
    """
    width, height = image.size
    left = max(0, width - MAX_ASPECT * height) // 2
    top = max(0, height - MAX_ASPECT * width) // 2
    return image.crop((left, top, width - left, height - top)) if left or top else image


def _eight_bits(grey: np.ndarray) -> np.ndarray:
    low = grey.min()
    high = grey.max()
    if grey.dtype.kind in "ui":
        top = 65535
    elif high <= 1:
        top = 1
    else:
        top = 255
    if not 0 <= low <= high <= top:  # also refuses NaN
        raise ValueError(f"grey values from {low} to {high}, expected 0 to {top}")
    return np.rint(grey.astype(np.float64) * (255 / top)).astype(np.uint8)
