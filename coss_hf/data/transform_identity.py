"""What tells two augmentations apart: their code and options, and what they make of a few images."""

import inspect
import re
from collections.abc import Callable
from hashlib import blake2b

import numpy as np
import torch
from PIL import Image

TRIES = 6  # draws for each test image


def transform_identity(transform: Callable, name: str, size: int) -> str:
    """Return the name of an augmentation with a hash of its code, its options and its views of test images.

    Args:
        transform: from a PIL image to a uint8 tensor (3, h, w).
        name: its name.
        size: h and w.

    Raises:
        ValueError: it draws from another generator than torch's global one, so that its views cannot come back.

    Example:
        >>> from coss_hf.data.transforms import augmentation
        >>> first, second = (transform_identity(augmentation("cifar", size), "cifar", size) for size in (32, 40))
        >>> first.split()[0], first == second
        ('cifar', False)
    """
    shown = _views(transform, size)
    if shown != _views(transform, size):
        raise ValueError(
            f"--transform={name} gives another view at a second call with the same seed of torch: --teacher_cache "
            f"would keep embeddings of views that never come back. Draw from torch's global generator alone "
            f"(torch.rand, torchvision.transforms.v2), not from random or numpy, or leave --teacher_cache out."
        )
    digest = blake2b(shown, digest_size=8)
    digest.update(_code(transform).encode())
    return f"{name} {digest.hexdigest()}"


def _views(transform: Callable, size: int) -> bytes:
    """Views of images of noise, each from a generator seeded for it, hashed."""
    digest = blake2b()
    with torch.random.fork_rng(devices=[]):
        for number, (width, height) in enumerate(((size + 8, size + 16), (3 * size, 2 * size))):
            pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
            image = Image.fromarray(pixels)
            for seed in range(TRIES):
                torch.default_generator.manual_seed(seed)
                digest.update(transform(image).contiguous().numpy().tobytes())
    return digest.digest()


def _code(transform: Callable) -> str:
    """Source, values that it closes over, and printed options, which hold what rarely shows in a view."""
    function = inspect.unwrap(getattr(transform, "func", transform))  # of functools.partial, too
    parts = [repr(transform), repr(getattr(transform, "args", ())), repr(getattr(transform, "keywords", {}))]
    try:
        parts.append(inspect.getsource(function if inspect.isroutine(function) else type(function)))
    except (OSError, TypeError):  # typed in, or not written in Python
        parts.append(repr(getattr(getattr(function, "__code__", None), "co_code", "")))
    parts.append(repr(getattr(function, "__defaults__", None)))
    parts += [repr(cell.cell_contents) for cell in getattr(function, "__closure__", None) or () if _is_set(cell)]
    return re.sub(r" at 0x[0-9a-fA-F]+", "", "\n".join(parts))


def _is_set(cell) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
