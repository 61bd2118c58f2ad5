"""Neighbours kept from run to run."""

import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np

from coss_hf.utils.messages import get_logger

logger = get_logger(__name__)


def read_neighbors(folder: Path) -> tuple[np.ndarray, dict] | None:
    """The neighbours kept in `folder`, and how they were found; None where there are none or they are damaged."""
    if not folder.exists():
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text())
        checksum = meta.pop("sha256")
        with open(folder / "neighbors.npy", "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == checksum:
                file.seek(0)
                return np.load(file), meta
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    logger.warning("The cached neighbours in %s are damaged: they are computed again.", folder)
    return None


def write_neighbors(folder: Path, neighbors: np.ndarray, meta: dict) -> bool:
    """Keeps neighbours in `folder`, which is there complete or not at all, whatever other processes do meanwhile.

    Returns:
        Whether that went well: the disk may be full, or another process faster.
    """
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as temporary:
            entry = Path(temporary) / "entry"
            entry.mkdir()
            np.save(entry / "neighbors.npy", neighbors)
            with open(entry / "neighbors.npy", "rb") as file:
                meta = meta | {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
            (entry / "meta.json").write_text(json.dumps(meta, indent=2))
            if folder.exists():
                os.replace(folder, Path(temporary) / "replaced")  # damaged, or just written by another process
            os.replace(entry, folder)
    except OSError as error:
        logger.warning("The neighbours were not kept in %s: %s", folder, error)
        return False
    return True
