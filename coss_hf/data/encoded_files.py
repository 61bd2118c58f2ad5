"""What is known of the images of a dataset without reading them: names, sizes and times of their files."""

import os
from hashlib import blake2b

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

MISSING = -1


class EncodedFiles:
    """Names and sizes of n encoded images.

    Args:
        images: n rows of undecoded images.
        column: the name of the image column.

    Attributes:
        names: the last part of each path; empty where there is none.
        sizes: bytes of each, int64; `MISSING` without bytes and without a file.
        times: when each file was changed, in nanoseconds; 0 for bytes in the dataset.
    """

    def __init__(self, images: Dataset, column: str):
        sizes = []
        paths = []
        for chunk in images.data.column(column).chunks:  # of the bytes, only the offsets are read
            encoded = pc.if_else(pc.is_valid(chunk), pc.binary_length(chunk.field("bytes")), None)
            sizes.append(pc.fill_null(encoded, MISSING).to_numpy(zero_copy_only=False).astype(np.int64))
            paths += chunk.field("path").to_pylist()
        self.sizes = np.concatenate(sizes) if sizes else np.zeros(0, np.int64)
        if images._indices is not None:  # of rows that were selected
            rows = images._indices.column(0).to_numpy()
            self.sizes = self.sizes[rows]
            paths = [paths[row] for row in rows]
        self.names = [os.path.basename(path or "") for path in paths]
        self.times = np.zeros(len(paths), np.int64)
        for row in np.flatnonzero(self.sizes == MISSING).tolist():
            self.sizes[row], self.times[row] = _size_and_time(paths[row])

    def fingerprints(self) -> np.ndarray:
        """Hashes of each name and size, uint64: those of a file that was replaced by another one differ."""
        hashes = [
            int.from_bytes(blake2b(f"{name}\0{size}".encode(), digest_size=8).digest(), "little")
            for name, size in zip(self.names, self.sizes.tolist(), strict=True)
        ]
        return np.array(hashes, np.uint64)


def _size_and_time(path: str | None) -> tuple[int, int]:
    try:
        status = os.stat(path or "")
    except OSError:
        return MISSING, 0
    return status.st_size, status.st_mtime_ns
