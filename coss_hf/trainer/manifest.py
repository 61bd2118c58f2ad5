"""What tells a damaged checkpoint from a complete one: its files with their sizes and checksums."""

import json
import zlib
from functools import lru_cache
from pathlib import Path

MANIFEST = "manifest.json"
CHUNK = 2**24  # bytes that are read at a time


def write_manifest(folder: Path) -> None:
    """Write the size and the CRC-32 of each file of ``folder`` into it; call it when they are complete."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "crc32": _checksum(path)}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1))


def find_damage(folder: Path) -> str | None:
    """Say which file of a checkpoint is not as it was written.

    Args:
        folder: of the checkpoint.

    Returns:
        A clause such as ``optimizer.pt is missing``; None where no damage was found.
    """
    files = [(str(path), path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    # A run asks several times, and the files may have gigabytes.
    return _find_damage(folder, tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in files))


@lru_cache(maxsize=64)
def _find_damage(folder: Path, stamps: tuple) -> str | None:
    if not (folder / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        expected = {name: (entry["bytes"], entry["crc32"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    for name, (size, checksum) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
        try:
            same = _checksum(path) == checksum
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if not same:
            return f"{name} does not hold what was written (its checksum differs)"
    return None


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
