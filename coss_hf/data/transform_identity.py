"""What tells two augmentations apart: their code and options, and what they make of a few images."""

from collections.abc import Callable
from hashlib import blake2b

import numpy as np
from datasets.fingerprint import Hasher
from PIL import Image

from coss_hf.utils.code_identity import code_identity, without_addresses
from coss_hf.utils.randomness import keeping_generators, seed_generators

TRIES = 6  # draws for each test image


def transform_identity(transform: Callable, name: str, size: int) -> str:
    """Return the name of an augmentation with a hash of its code, its options and its views of test images.

    The code includes the helpers and global values that it names, and attributes; see `code_identity`.

    Args:
        transform: from a PIL image to a uint8 tensor (3, h, w).
        name: its name.
        size: h and w.

    Raises:
        ValueError: it draws from a generator of its own, so that its views cannot come back.

    Example:
        >>> from coss_hf.data.transforms import augmentation
        >>> first, second = (transform_identity(augmentation("cifar", size), "cifar", size) for size in (32, 40))
        >>> first.split()[0], first == second
        ('cifar', False)
    """
    shown = _views(transform, size)
    if shown != _views(transform, size):
        raise ValueError(
            f"--transform={name} gives another view at a second call with the same seeds: --teacher_cache would keep "
            f"embeddings of views that never come back. Draw from the global generators of random, NumPy or torch, "
            f"which are seeded for each view, or leave --teacher_cache out."
        )
    digest = blake2b(shown, digest_size=8)
    digest.update(f"{code_identity(transform)} {_state(transform)}".encode())
    return f"{name} {digest.hexdigest()}"


# On whose versions the views, and with them `transform_code`, depend.
MAKING_VIEWS = ("pillow", "torch", "torchvision")


def transform_code(transform: Callable, size: int) -> str:
    """Return a hash of what a transform does, for the record of a run: of its code, and of its views of test images.

    Unlike ``transform_identity`` it takes transforms of which a run only warns: of one that draws from a generator of
    its own the views are left out, and of one that changes as it is called its attributes.

    Args:
        transform: from a PIL image to a uint8 tensor (3, h, w).
        size: h and w.
    """
    code = code_identity(transform)
    try:
        first, second = (_views(transform, size) for _ in range(2))
    except Exception:  # of one that takes no image of noise: the training says what is wrong, if anything is
        first, second = b"", b""
    if code_identity(transform) != code:
        code = code_identity(type(transform))
    digest = blake2b(code.encode(), digest_size=8)
    if first == second:
        digest.update(first)
    return digest.hexdigest()


def _views(transform: Callable, size: int) -> bytes:
    """Views of images of noise, each from a generator seeded for it, hashed."""
    digest = blake2b()
    with keeping_generators():
        for number, (width, height) in enumerate(((size + 8, size + 16), (3 * size, 2 * size))):
            pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
            image = Image.fromarray(pixels)
            for seed in range(TRIES):
                seed_generators(seed)
                digest.update(transform(image).contiguous().numpy().tobytes())
    return digest.digest()


def _state(transform: Callable) -> str:
    """Hash of values that the code alone does not tell, such as tables and weights; printed where it has none."""
    try:
        return Hasher.hash(transform)
    except Exception:  # of objects that cannot be pickled
        return without_addresses(repr(transform))
