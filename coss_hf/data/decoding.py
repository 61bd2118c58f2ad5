"""Encoded images to upright RGB. No torch: the check of a dataset runs it in forked processes."""

import contextlib
import errno
from collections.abc import Callable
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from coss_hf.data.damaged_metadata import without_metadata
from coss_hf.utils.messages import get_logger

logger = get_logger(__name__)

NOT_OF_THE_IMAGE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
MAX_ASPECT = 16  # longer side over shorter side of an image that is resized by its shorter side

SCALES = (8, 4, 2)  # that a JPEG can be decoded at: one pixel for as many in each direction
SCALABLE = ("JPEG", "MPO")

# How files of the usual formats begin. Pillow would try other readers first.
SIGNATURES = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG"}

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


def is_fault_of_image(error: Exception) -> bool:
    """Whether the image itself caused an error, and not the machine, such as by too many open files or no memory."""
    return not isinstance(error, MemoryError) and getattr(error, "errno", None) not in NOT_OF_THE_IMAGE


class Decoded(NamedTuple):
    """A decoded image.

    Attributes:
        image: upright and in RGB.
        size: width and height of the full image, upright.
        scale: how many times smaller in each direction the image was decoded; 1 for most.
    """

    image: Image.Image
    size: tuple[int, int]
    scale: int


def content_hash(data: bytes) -> int:
    """BLAKE2b of an encoded image, in 64 bits without a sign."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


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
    return decode_reduced(record, None).image


def decode_reduced(record: dict, reduction: Callable[[tuple[int, int]], float] | None) -> Decoded:
    """Decode one image, a JPEG at the smallest scale that leaves as many pixels as are needed.

    libjpeg decodes at 1/2, 1/4 and 1/8 in the frequency domain, in a fraction of the time.

    Args:
        record: as of `decode`.
        reduction: from width and height of the full image, upright, to how many times smaller it may be decoded; None
            for full images.

    Raises:
        ValueError: as of `decode`.
    """
    try:
        return _decode(encoded_bytes(record), reduction)
    except Exception as error:  # Pillow's readers raise almost anything on damaged files
        if not is_fault_of_image(error):
            raise
        path = (record or {}).get("path") or "without a path"
        raise ValueError(f"image {path} cannot be decoded ({type(error).__name__}: {error})") from error


def _decode(data: bytes, reduction: Callable | None) -> Decoded:
    try:
        return _decode_upright(data, reduction)
    except Exception:
        for repaired in without_metadata(data):
            with contextlib.suppress(Exception):
                return _decode_upright(repaired, reduction)
        raise


def _decode_upright(data: bytes, reduction: Callable | None) -> Decoded:
    readers = [name for signature, name in SIGNATURES.items() if data.startswith(signature)]
    image = Image.open(BytesIO(data), formats=readers or None)
    width, height = image.size
    scale = 1
    if reduction is not None and image.format in SCALABLE:
        size = (height, width) if _orientation(image) >= 5 else (width, height)
        allowed = reduction(size)
        scale = next((scale for scale in SCALES if scale <= allowed), 1)
        if scale > 1 and image.draft(None, (width // scale, height // scale)) is None:
            scale = 1  # of several parts
    upright = upright_rgb(image)
    if scale > 1:
        return Decoded(upright, size, scale)
    return Decoded(upright, upright.size, 1)


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(0x0112)
        return found if found in UPRIGHT else 0  # texts, bytes and numbers above 8 turn nothing
    except Exception as error:  # whatever is wrong with a tag, the pixels are an image
        logger.debug("The EXIF tags of an image cannot be read: %s", error)
        return 0


def upright_rgb(image: Image.Image) -> Image.Image:
    """Turn an image by its EXIF orientation, if it can be read, and convert it to RGB, as `decode` does."""
    image.load()  # first, since Pillow turns TIFF by itself
    orientation = _orientation(image)
    image = to_rgb(image)
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
        image.info.clear()  # of the copy: it would be turned again by whoever turns upright what was decoded here
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, as `decode` does."""
    if "transparency" in image.info:  # Pillow would warn about palettes
        image = image.copy()  # the given one may be the user's
        del image.info["transparency"]
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
