"""Views of images for training: augmentation, each anchor's group with its neighbours, collation."""

import struct
from collections.abc import Callable, Iterator
from hashlib import blake2b

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coss_hf.data import teacher_cache
from coss_hf.data.checking import content_hashes
from coss_hf.data.reading import ImageReader
from coss_hf.data.teacher_cache import TeacherCache
from coss_hf.data.transform_identity import MAKING_VIEWS, transform_code
from coss_hf.data.transforms import Fit, RandomCrop, augmentation
from coss_hf.utils.code_identity import code_entry, without_addresses
from coss_hf.utils.messages import get_logger
from coss_hf.utils.randomness import keeping_generators, seed_generators

logger = get_logger(__name__)

KEPT_BYTES = 2**29  # most bytes of images, cut to size, that are kept in memory
TRIES = 3  # views of a transform, each made twice
DRAW = -1  # the slot, in a view's key, that stands for the draw of the neighbours


class ViewDataset(torch.utils.data.Dataset):
    """Groups of views for training: the anchor's and those of k of its neighbours.

    Neighbours and views are pure functions of (seed, epoch, anchor, slot in the group): they depend neither on workers
    nor on what was drawn before, and an image drawn for two anchors gets two views.

    Args:
        dataset: n rows as `load_images` returns them.
        image_column: the name of their image column.
        augmentation_name: the name of the augmentation, see `augmentation`; or a callable from a PIL image to a uint8
            tensor (3, size, size) that draws from the global generators of Python's `random`, NumPy and torch alone,
            which are seeded for each view.
        size: the side of a view in pixels.
        seed: the seed of all draws.
        neighbors: row numbers (n, K) of each image's neighbours; -1 is padding, never drawn.
        k: number of neighbours drawn without replacement from an anchor's K (with replacement, where padding leaves
            fewer than k; where it leaves none, other views of the anchor are taken instead).
        on_bad_image: `error` or `skip`, where an image can no longer be decoded; see `ImageReader`.
        view_epochs: number P of epochs after which the same views come back, neighbours included: the epoch counts
            modulo P. 0: never.
        reduced_decoding: decode JPEGs at the smallest scale that has all pixels which a view needs.

    Attributes:
        teacher_cache: the teacher's embeddings of the views, which come with them; None without.

    Raises:
        ValueError: an unknown augmentation, or neighbours that do not fit.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_column: str,
        augmentation_name: str | Callable,
        size: int,
        *,
        seed: int = 0,
        neighbors: np.ndarray | None = None,
        k: int = 0,
        on_bad_image: str = "error",
        view_epochs: int = 0,
        reduced_decoding: bool = True,
    ):
        transform, name = resolve_augmentation(augmentation_name, size)
        self.augment = transform
        self.augmentation_name = name
        self._built_in = isinstance(augmentation_name, str)
        self._transform_code = "" if self._built_in else transform_code(transform, size)
        self.reader = ImageReader(dataset, image_column, on_bad_image)
        self.reader.share_memory()
        name = next((name for name in ("image_hash", "image_file_hash") if name in dataset.column_names), None)
        if name is None:
            raise ValueError("--dataset has no column image_hash, which each view is drawn by: load it by load_images.")
        self._hashes = dataset.select_columns(name).rename_column(name, "hash")
        self.is_by_file = name == "image_file_hash"
        if self.is_by_file:
            self.reader.keep_contents()
        self.size = size
        self.seed = seed
        self.view_epochs = view_epochs
        self.reduced_decoding = reduced_decoding
        self.teacher_cache: TeacherCache | None = None
        self._kept: Tensor | None = None
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.use_neighbors(neighbors, k)

    def use_neighbors(self, neighbors: np.ndarray | None, k: int):
        """Draw `k` of the `neighbors` (n, K) of each anchor into its group from now on."""
        if k < 0:
            raise ValueError(f"--neighbors_k {k}: give 0 (no neighbours) or more.")
        self.neighbors = None if neighbors is None or not k else np.asarray(neighbors)
        self.k = k
        if k:
            self._check_neighbors()

    def keep_images(self) -> bool:
        """Decode all images once and keep them in memory, uint8 (n, 3, size, size); views stay the same.

        Nothing is kept where the augmentation draws before images have that size, or where they are too many.

        Returns:
            Whether images are kept.
        """
        if self._kept is not None:
            return True
        if not self._built_in:  # a transform of one's own may have other things under the name `transforms`
            return False
        fit, to_tensor, *_ = self.augment.transforms
        if not isinstance(fit, Fit) or len(self) * 3 * self.size**2 > KEPT_BYTES:
            return False
        self._kept = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8)
        for start in range(0, len(self), 1_000):
            rows = list(range(start, min(start + 1_000, len(self))))
            for row, file in zip(rows, self.reader.files(rows), strict=True):
                self._kept[row] = to_tensor(_first(fit, file, lambda: None, self.reduced_decoding))
        return True

    def _check_neighbors(self):
        n = len(self)
        shape = None if self.neighbors is None else self.neighbors.shape
        if shape is None or len(shape) != 2 or shape[0] != n:
            raise ValueError(f"--neighbors_k {self.k} needs the neighbours of each of {n} images, (n, K), not {shape}.")
        if shape[1] < self.k:
            raise ValueError(
                f"--neighbors_k {self.k} is more than the {shape[1]} neighbours known: compute a larger pool."
            )
        if self.neighbors.max() >= n or self.neighbors.min() < -1:
            raise ValueError(
                f"--neighbors_k {self.k}: neighbours outside rows 0..{n - 1}; compute them on these images."
            )
        own = (self.neighbors == np.arange(n)[:, None]).any(axis=1)
        if own.any():
            raise ValueError(
                f"--neighbors_k {self.k}: {own.sum():,} of {n:,} images are among their own neighbours, such as row "
                f"{own.argmax()}: drop each image from what a search finds for it, usually the first column."
            )

    @property
    def short(self) -> tuple[int, int]:
        """Number of images with fewer than k neighbours (drawn with replacement), and with none (own views)."""
        if self.neighbors is None:
            return 0, 0
        counts = (self.neighbors >= 0).sum(axis=1)
        return int((counts < self.k).sum()), int((counts == 0).sum())

    def identity(self) -> dict[str, str]:
        """What determines the views of a run, by command-line flag: equal where the views are equal."""
        hashes = self._hashes.with_format("numpy")[:]["hash"]
        return {
            "--dataset": _digest(hashes),
            "--augmentation": self.augmentation_name,
            **code_entry("--transform", self._transform_code, MAKING_VIEWS),
            "--view_size": str(self.size),
            "--neighbors_k": str(self.k),
            "--neighbors_pool": "none" if self.neighbors is None else _digest(self.neighbors),
            "--reduced_decoding": str(self.reduced_decoding),
            "--view_epochs": str(self.view_epochs),
            "--view_seed": str(self.seed),
        }

    def know_contents(self) -> str:
        """From now on an image whose content changes counts as replaced, so that its embedding is not kept.

        Returns:
            A digest of the contents of all images. Where they are known by their files alone, these are read.
        """
        hashes = self._hashes.with_format("arrow")[:]["hash"].to_numpy()  # NumPy's format has no unsigned integers
        if self.is_by_file or hashes.dtype != np.uint64:  # names, or what somebody else calls a hash
            hashes = content_hashes(self.reader.rows, self.reader.column)
        self.reader.expect_contents(hashes)
        self._kept = None  # of files that nobody compared
        return _digest(hashes)

    @property
    def epoch(self) -> int:
        """The current epoch, in shared memory: a change reaches loader workers that are already running."""
        return int(self._epoch)

    def set_epoch(self, epoch: int):
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, anchor: int) -> dict[str, Tensor]:
        return self.__getitems__([anchor])[0]

    def __getitems__(self, anchors: list[int]) -> list[dict[str, Tensor]]:
        """One item an anchor: `pixel_values` uint8 (1+k, 3, size, size) and `index` int64 (1+k,), the anchor first.

        With a teacher cache also what it holds of these views; see `TeacherCache.items`.
        """
        epoch = self.epoch
        groups = [self._group(anchor, epoch) for anchor in anchors]
        images = self._images([index for group in groups for index in group])
        items = []
        with keeping_generators():
            for anchor, group in zip(anchors, groups, strict=True):
                views = [self._view(next(images), epoch, anchor, slot) for slot in range(len(group))]
                items.append({"pixel_values": torch.stack(views), "index": torch.tensor(group)})
        if self.teacher_cache is not None:
            replaced = [self.reader.is_other_image(group) for group in groups]
            for item, cached in zip(items, self.teacher_cache.items(epoch, anchors, replaced), strict=True):
                item |= cached
        return items

    def names(self, indices: list[int]) -> list[str]:
        """Names of images for messages: their path, else their row."""
        return self.reader.names(indices)

    def read_contents(self) -> np.ndarray:
        """Hashes of files and of their contents, uint64 (r, 2), of images that were identified by their file."""
        contents = self.reader.contents()
        files = self._hashes.with_format("arrow")[:]["hash"].to_numpy()
        return np.stack([files, contents], axis=1)[contents != 0]

    def replaced_names(self) -> list[str]:
        """Names of the images that were replaced so far, since they could no longer be decoded."""
        return self.reader.replaced_names()

    def view(self, anchor: int, slot: int, epoch: int | None = None) -> tuple[Tensor, int]:
        """Compute one view again.

        Args:
            anchor: the row number of the group's anchor.
            slot: the position of the view in the group, 0 for the anchor's own.
            epoch: the epoch of the view; by default the current one.

        Returns:
            The view, uint8 (3, size, size), and the row number of its image.
        """
        epoch = self.epoch if epoch is None else epoch
        index = self._group(anchor, epoch)[slot]
        with keeping_generators():
            return self._view(next(self._images([index])), epoch, anchor, slot), index

    def _group(self, anchor: int, epoch: int) -> list[int]:
        if not 0 <= anchor < len(self):
            raise IndexError(f"anchor {anchor} of {len(self)} images")
        if not self.k:
            return [int(anchor)]
        pool = self.neighbors[anchor]
        pool = pool[pool >= 0]
        if not len(pool):
            return [int(anchor)] * (1 + self.k)
        generator = np.random.default_rng(self._key(epoch, anchor, DRAW))
        return [int(anchor), *generator.choice(pool, self.k, replace=len(pool) < self.k).tolist()]

    def _images(self, indices: list[int]) -> Iterator[Callable | Tensor]:
        """Images that are kept, or functions that decode them."""
        if self._kept is not None:
            return iter(self._kept[indices])
        return self.reader.files(indices)

    def _view(self, image: Callable | Tensor, epoch: int, anchor: int, slot: int) -> Tensor:
        key = self._key(epoch, anchor, slot)
        return make_view(self.augment, image, key, built_in=self._built_in, reduced_decoding=self.reduced_decoding)

    def _key(self, epoch: int, anchor: int, slot: int) -> int:
        """A hash, so that neighbouring keys start unrelated streams. 32 bits are all that torch's generator takes."""
        if self.view_epochs:
            epoch %= self.view_epochs
        packed = struct.pack("<4q", self.seed, epoch, anchor, slot)
        return int.from_bytes(blake2b(packed, digest_size=4).digest(), "little")


def make_view(
    augment: Callable, image: Callable | Tensor, key: int, *, built_in: bool, reduced_decoding: bool
) -> Tensor:
    """Return a view of an image, uint8 (3, size, size), of which all draws are decided by ``key``.

    Args:
        augment: the augmentation.
        image: a function that decodes the image, see `decode_reduced` for its argument; or its pixels, cut to size.
        key: seed of the draws.
        built_in: whether the augmentation is one of this package.
        reduced_decoding: decode a JPEG at the smallest scale that has all pixels which the view needs.
    """

    def seed() -> None:
        # Not torch.manual_seed, which would reseed the accelerators' generators as well.
        torch.default_generator.manual_seed(key)

    if not built_in:
        image = image(None).image
        seed_generators(key)  # which of them somebody else's code draws from is not known
        return augment(image)
    seed()
    if isinstance(image, Tensor):
        later = augment.transforms[2:]
    else:
        first, *later = augment.transforms
        image = _first(first, image, seed, reduced_decoding)
    for transform in later:
        image = transform(image)
    return image


def _first(transform: Fit | RandomCrop, file: Callable, seed: Callable[[], None], reduced_decoding: bool):
    """The first step of a built-in augmentation, of an image that is not decoded yet."""
    return transform.of_file(file if reduced_decoding else lambda reduction: file(None), seed)


def resolve_augmentation(given: str | Callable, size: int) -> tuple[Callable, str]:
    """The transform and its name; one that was given as a callable is tried on an image of noise."""
    if isinstance(given, str):
        return augmentation(given, size), given
    name = getattr(given, "__qualname__", None) or without_addresses(repr(given))
    with keeping_generators():
        first, second = ([_try(given, name, size, seed) for seed in range(TRIES)] for _ in range(2))
    if not all(map(torch.equal, first, second)):
        logger.warning(
            "--transform=%s gives another view when it is called again with the same seeds: it draws from a generator "
            "of its own. Its views depend on the loader workers, and a resumed run is not the uninterrupted one. Draw "
            "from the global generators of random, NumPy or torch, which are seeded for each view.",
            name,
        )
    return given, name


def _try(transform: Callable, name: str, size: int, seed: int) -> Tensor:
    """The view that a transform makes of an image of noise, checked."""
    pixels = np.random.default_rng(0).integers(0, 256, (size + 16, size + 8, 3), dtype=np.uint8)
    seed_generators(seed)
    try:
        view = transform(Image.fromarray(pixels))
    except Exception as error:  # code of any origin
        raise ValueError(
            f"--transform={name} fails on a PIL image ({type(error).__name__}: {error}); give a callable from a "
            f"PIL image to a uint8 tensor (3, {size}, {size})."
        ) from error
    if not isinstance(view, Tensor) or view.dtype != torch.uint8 or view.shape != (3, size, size):
        found = f"{view.dtype} {tuple(view.shape)}" if isinstance(view, Tensor) else type(view).__name__
        raise ValueError(
            f"--transform={name} returns {found}; a view is a uint8 tensor (3, {size}, {size}), which each network "
            f"normalises for itself: leave conversion to float and normalisation out, or set view_size."
        )
    return view


def _digest(array: np.ndarray) -> str:
    return blake2b(np.ascontiguousarray(array).tobytes(), digest_size=8).hexdigest()


def collate_views(items: list[dict]) -> dict:
    """Collate b groups of 1+k views, in order: `pixel_values` uint8 (b*(1+k), 3, S, S), `index` int64 (b*(1+k),).

    With a teacher cache also its part, see `teacher_cache.collate`.
    """
    batch = {key: torch.cat([item[key] for item in items]) for key in ("pixel_values", "index")}
    return batch | teacher_cache.collate(items)
