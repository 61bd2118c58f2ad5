"""The teacher's embeddings of views, kept on disk from epoch to epoch and from run to run.

Two files in a folder that is named after everything that the embeddings depend on: `rows`, an array (P, n, 1+k, d), and
`map`, an unsigned 64-bit number for each row: 0, or a checksum of the row, of its number and of the folder's name. A
row counts as there only if its checksum fits, so that nothing that happens to the files (a process that was killed, a
power cut, two writers, a damaged disk, files of another folder) makes a wrong row: it makes a missing one.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from coss_hf.utils.messages import get_logger
from coss_hf.utils.units import size_in_bytes

logger = get_logger(__name__)

DTYPES = ("float32", "float16")
FLUSH_SECONDS = 10  # what a killed process loses of its work at most
NOT_KEPT = -1  # in place of the number of a row that is not to be written
ROWS = "rows"
MAP = "map"
META = "meta.json"


class TeacherCache:
    """Rows of embeddings that any number of processes read and write, without locks.

    Nothing is written before `create`.

    Args:
        folder: of all caches.
        identity: everything that an embedding depends on, by name; its hash names this cache's own folder.
        shape: (P, n, 1+k, d): epochs, images, views of a group, dimension. Caches of other P share one folder: the
            files of fewer epochs are the beginning of those of more.
        dtype: `float32` or `float16`, of the files. What is read is float32.

    Attributes:
        path: the cache's own folder.

    Example:
        >>> import tempfile
        >>> cache = TeacherCache(tempfile.mkdtemp(), {"teacher": "a"}, (1, 3, 1, 2))
        >>> cache.create()
        >>> cache.write([2], torch.ones(1, 2))
        >>> cache.flush()
        >>> cache.read([1, 2])[1]
        [False, True]
    """

    def __init__(
        self,
        folder: str | Path,
        identity: dict[str, str],
        shape: tuple[int, int, int, int],
        dtype: str = "float32",
    ):
        if dtype not in DTYPES:
            raise ValueError(f"--teacher_cache_dtype={dtype!r}: choose one of {', '.join(DTYPES)}.")
        self.folder = Path(folder)
        self.identity = {**identity, "shape": " x ".join(map(str, shape[1:])), "dtype": dtype}
        self.shape = shape
        self.dtype = np.dtype(dtype).newbyteorder("<")  # on every machine
        self._key = hashlib.blake2b(json.dumps(self.identity, sort_keys=True).encode(), digest_size=16).digest()
        self.path = self.folder / self._key.hex()
        self.row_bytes = shape[-1] * self.dtype.itemsize
        self._maps: tuple[np.ndarray, np.ndarray] | None = None
        self._files: dict[str, int] = {}
        self._unflushed: dict[int, int] = {}
        self._flushed = time.monotonic()
        self._full = False

    def __len__(self) -> int:
        epochs, images, views, _ = self.shape
        return epochs * images * views

    def __getstate__(self) -> dict:
        """For loader workers that are not forked: they read, and open the files themselves."""
        return self.__dict__ | {"_maps": None, "_files": {}, "_unflushed": {}}

    # ---- before the start ----

    def create(self, epochs: int | None = None) -> None:
        """Make the files where they are missing or too short; what they hold stays.

        Args:
            epochs: of the training; None for all. Files that cannot be written will do where some of these are there.

        Raises:
            ValueError: they cannot be written and hold no rows.
        """
        self.close()
        weakref.finalize(self, _close_files, self._files).atexit = False
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name, size in self._sizes().items():
                file = os.open(self.path / name, os.O_RDWR | os.O_CREAT, 0o666)
                self._files[name] = file
                if os.fstat(file).st_size < size:
                    # Takes no disk space yet; unlike ftruncate, never shortens what another process has lengthened.
                    _write_at(file, b"\0", size - 1)
            self._write_meta()
        except OSError as error:
            self.close()
            if not self.present(epochs):
                raise self._unwritable(error.strerror or error) from error
            if not self.is_complete(epochs):
                logger.warning(
                    "--teacher_cache=%s: %s cannot be written (%s) and lacks some rows: the teacher embeds these each "
                    "time.",
                    *(self.folder, self.path, error.strerror or error),
                )
        self._maps = None  # of files that may have been shorter

    def check_writable(self, epochs: int | None = None) -> bool:
        """As far as it can be told without writing, check that `create` will succeed.

        Returns:
            Whether rows can be written; if not, those that are there will be read.

        Raises:
            ValueError: it will not succeed.
        """
        paths = [path for path in (self.path / ROWS, self.path / MAP) if path.exists()]
        folder = self.path.absolute()
        while not folder.exists():
            folder = folder.parent
        problem = None if folder.is_dir() else f"{folder} is no folder"
        for path in (folder, *paths):
            if problem is None and not os.access(path, os.W_OK):
                problem = f"{path} is read-only"
        if problem is not None and not self.present(epochs):
            raise self._unwritable(problem)
        return problem is None

    def _unwritable(self, problem) -> ValueError:
        return ValueError(
            f"--teacher_cache={self.folder}: {self.path} cannot be written ({problem}); get the permission or give "
            f"another folder. (One that cannot be written can be read where it holds rows.)"
        )

    def _sizes(self) -> dict[str, int]:
        return {ROWS: len(self) * self.row_bytes, MAP: len(self) * 8}

    def _write_meta(self) -> None:
        """For people, and to tell how another cache differs; nothing depends on it, not even on its being written."""
        if _read_meta(self.path) == self.identity:
            return
        with contextlib.suppress(OSError):
            # Not named by the process: those of two containers may have one number.
            file, temporary = tempfile.mkstemp(prefix=f".{META}.", dir=self.path)
            with os.fdopen(file, "w") as writer:
                writer.write(json.dumps(self.identity, indent=2))
            os.chmod(temporary, 0o644)
            os.replace(temporary, self.path / META)

    def check_free_space(self, epochs: int) -> None:
        """Check that the rows of some epochs which are missing fit on the disk.

        Raises:
            ValueError: they do not.
        """
        needed = (self.rows_of(epochs) - self.present(epochs)) * (self.row_bytes + 8)
        free = self.free_bytes()
        if needed > free:
            raise ValueError(
                f"--teacher_cache={self.folder}: the missing rows of {epochs} epochs take {size_in_bytes(needed)} "
                f"({self.shape[1]:,} images x {self.shape[2]} views x {self.shape[3]} numbers of {self.dtype.name} "
                f"each), and {size_in_bytes(free)} are free there; free space, give another folder, fewer "
                f"--view_epochs, or --teacher_cache_dtype float16."
            )

    def free_bytes(self) -> int:
        """Free space on the disk of the cache."""
        folder = self.path.absolute()
        while not folder.is_dir():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def rows_of(self, epochs: int) -> int:
        """Number of rows of the first epochs."""
        _, images, views, _ = self.shape
        return min(epochs, self.shape[0]) * images * views

    def present(self, epochs: int | None = None) -> int:
        """Number of rows of the first epochs (of all) that the map knows."""
        if not self._open():
            return 0
        return int(np.count_nonzero(self._maps[1][: self.rows_of(epochs or self.shape[0])]))

    def is_complete(self, epochs: int | None = None) -> bool:
        """Whether the map knows all rows, or those of the first epochs."""
        return self.present(epochs) == self.rows_of(epochs or self.shape[0])

    def has_similar(self, unknown: set[str]) -> bool:
        """Whether a cache in the folder may be this one, of which some entries of the identity are not known yet."""
        known = {name: value for name, value in self.identity.items() if name not in unknown}
        return any(known.items() <= other.items() for other in self.others())

    def others(self) -> list[dict[str, str]]:
        """What other caches in the same folder were made of."""
        try:
            paths = sorted(path for path in self.folder.iterdir() if path.is_dir() and path != self.path)
        except OSError:
            return []
        return [meta for meta in map(_read_meta, paths) if meta is not None]

    def describe(self) -> str:
        """Where it is, its size and how much of it is there, in one line."""
        epochs, images, views, dim = self.shape
        size = sum(self._sizes().values())
        return (
            f"{self.path}: {size_in_bytes(size)} for {epochs:,} epochs x {images:,} images x {views} views x {dim:,} "
            f"numbers ({self.dtype.name}), {100 * self.present() // len(self)} % there, "
            f"{size_in_bytes(self.free_bytes())} free"
        )

    def differences(self) -> str:
        """How the most similar other cache in the folder differs, in one sentence; empty without any."""
        found = [[name for name in self.identity if other.get(name) != self.identity[name]] for other in self.others()]
        if not found:
            return ""
        return f"{self.folder} holds other caches; the most similar one differs in {', '.join(min(found, key=len))}"

    # ---- reading: in loader workers ----

    def _open(self) -> bool:
        """Map the files, or as many rows as they have room for; whether there are any."""
        if self._maps is not None:
            return True
        try:
            widths = {ROWS: self.row_bytes, MAP: 8}
            count = min(len(self), *((self.path / name).stat().st_size // width for name, width in widths.items()))
            rows = np.memmap(self.path / ROWS, self.dtype, "r", shape=(count, self.shape[-1]))
            there = np.memmap(self.path / MAP, "<u8", "r", shape=(count,))
        except (OSError, ValueError):
            return False
        self._maps = (rows, there)
        return True

    def read(self, rows: Sequence[int]) -> tuple[Tensor, list[bool]]:
        """Read rows.

        Args:
            rows: their numbers, (m,).

        Returns:
            Embeddings float32 (m, d), zeros where a row is missing; and whether each is there.
        """
        embeddings = np.zeros((len(rows), self.shape[-1]), np.float32)
        known = [False] * len(rows)
        if self._open():
            array, there = self._maps
            for position, row in enumerate(rows):
                checksum = int(there[row]) if row < len(there) else 0
                if checksum:
                    data = array[row].tobytes()  # read once: another process may be writing the row
                    known[position] = self._checksum(row, data) == checksum
                    if known[position]:
                        embeddings[position] = np.frombuffer(data, self.dtype)
        return torch.from_numpy(embeddings), known

    def _checksum(self, row: int, data: bytes) -> int:
        """Never 0, which stands for a missing row."""
        digest = hashlib.blake2b(data, digest_size=8, key=self._key, salt=int(row).to_bytes(8, "little"))
        return int.from_bytes(digest.digest(), "little") or 1

    def items(self, epoch: int, anchors: list[int], replaced: list[list[bool]]) -> list[dict]:
        """What the cache holds of groups of views: for each group `cached` (1+k, d), `known` and `rows`.

        Args:
            epoch: of the views.
            anchors: row numbers of the groups' anchors.
            replaced: for each view, whether another image stands in for its own, which could not be read: neither
                is that view's embedding known, nor is it kept.
        """
        epochs, images, views, _ = self.shape
        first = (epoch % epochs * images + np.asarray(anchors)) * views
        rows = (first[:, None] + np.arange(views)).tolist()
        embeddings, known = self.read([row for group in rows for row in group])
        items = []
        for number, (group, others) in enumerate(zip(rows, replaced, strict=True)):
            part = slice(number * views, (number + 1) * views)
            items.append(
                {
                    "cached": embeddings[part],
                    "known": [there and not other for there, other in zip(known[part], others, strict=True)],
                    "rows": [NOT_KEPT if other else row for row, other in zip(group, others, strict=True)],
                }
            )
        return items

    # ---- writing: in the process of the teacher ----

    def write(self, rows: Sequence[int], embeddings: Tensor) -> None:
        """Keep rows; on the disk they are after the next `flush`, which comes by itself every few seconds.

        A row that is not finite, in the cache's type, is not kept. If the disk is full, no more rows are kept.

        Args:
            rows: their numbers, (m,); those below 0 are not kept.
            embeddings: (m, d), on any device.
        """
        if self._full or not self._files:
            return
        with np.errstate(over="ignore"):  # such a row is not kept
            array = embeddings.detach().to("cpu", torch.float32).numpy().astype(self.dtype)
        finite = np.isfinite(array).all(axis=1)
        with self._stopping_at_a_full_disk():
            for row, values, keep in zip(rows, array, finite, strict=True):
                if keep and row >= 0:
                    data = values.tobytes()
                    _write_at(self._files[ROWS], data, row * self.row_bytes)
                    self._unflushed[row] = self._checksum(row, data)
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self.flush()

    def flush(self) -> None:
        """Bring written rows to the disk, and only then let the map say that they are there."""
        if not self._unflushed:
            return
        with self._stopping_at_a_full_disk():
            _sync(self._files[ROWS])
            for row, checksum in self._unflushed.items():
                _write_at(self._files[MAP], checksum.to_bytes(8, "little"), 8 * row)
            _sync(self._files[MAP])
            self._unflushed.clear()
            self._flushed = time.monotonic()

    @contextlib.contextmanager
    def _stopping_at_a_full_disk(self):
        try:
            yield
        except OSError as error:
            self._full = True
            self._unflushed.clear()
            logger.warning(
                "--teacher_cache=%s: %s cannot be written any more (%s): training continues, and the teacher embeds "
                "what is missing there.",
                *(self.folder, self.path, error.strerror or error),
            )

    def close(self) -> None:
        """Flush, and close the files."""
        self.flush()
        _close_files(self._files)
        self._maps = None


def _close_files(files: dict[str, int]) -> None:
    while files:
        os.close(files.popitem()[1])


def _sync(file: int) -> None:
    getattr(os, "fdatasync", os.fsync)(file)  # macOS has the latter alone


def _write_at(file: int, data: bytes, position: int) -> None:
    written = os.pwrite(file, data, position)
    if written < len(data):  # the disk is full: what is left says so
        os.pwrite(file, data[written:], position + written)


def _read_meta(path: Path) -> dict[str, str] | None:
    try:
        found = json.loads((path / META).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def collate(items: list[dict]) -> dict:
    """The cache's part of a batch of groups, in order; empty where there is no cache.

    Returns:
        `cached` float32 (b*(1+k), d), zeros where a row is missing; `missing`, the positions of these; and
        `missing_rows`, under which numbers they are to be kept.
    """
    if "cached" not in items[0]:
        return {}
    known = [there for item in items for there in item["known"]]
    rows = [row for item in items for row in item["rows"]]
    missing = [position for position, there in enumerate(known) if not there]
    return {
        "cached": torch.cat([item["cached"] for item in items]),
        "missing": missing,
        "missing_rows": [rows[position] for position in missing],
    }
