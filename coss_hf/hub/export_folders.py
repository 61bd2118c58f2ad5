"""The folders of exported files in a student's folder, and whether they still belong to its weights."""

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from coss_hf.utils.messages import get_logger

logger = get_logger(__name__)

# In each of them: what was measured, and of which weights the files are.
RECORD = "export.json"
FILES = {
    "onnx": ("model.onnx", "model_int8.onnx"),
    "openvino": ("openvino_model.xml", "openvino_model.bin"),
    "executorch": ("model.pte",),
}
_WEIGHTS = ("model*.safetensors", "head.safetensors")


def weights_digest(folder: str | Path) -> str | None:
    """Return a hash of the files of weights in a folder, the head's included; None where there are none."""
    files = sorted({path for pattern in _WEIGHTS for path in Path(folder).glob(pattern) if path.is_file()})
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def exported_folders(folder: str | Path) -> tuple[list[str], list[str]]:
    """Find the folders of exported files in a student's folder.

    Args:
        folder: of the student.

    Returns:
        The names of those whose files are of the student's present weights; and of those whose files are of other
        weights, or have no record that tells.
    """
    current = []
    stale = []
    found = [name for name, files in FILES.items() if any(Path(folder, name, file).is_file() for file in files)]
    digest = weights_digest(folder) if found else None
    for name in found:
        belongs = are_of_weights(Path(folder, name, RECORD), digest)
        (current if belongs else stale).append(name)
    return current, stale


def warn_of_stale_exports(folder: str | Path) -> None:
    """Name the exported files in a student's folder that are of other weights than those now in it."""
    stale = exported_folders(folder)[1]
    if stale:
        logger.warning(
            "%s: the files in %s were exported from other weights. Run coss-hf export again, or remove them.",
            folder,
            ", ".join(stale),
        )


def remove_exports(folder: str | Path) -> None:
    """Remove the exported files of an earlier student from a folder; folders that are then empty go, too."""
    for name, names in FILES.items():
        exported = Path(folder, name)
        for file in (*names, RECORD):
            (exported / file).unlink(missing_ok=True)
        if exported.is_dir() and not any(exported.iterdir()):
            exported.rmdir()


def copy_exports(find: Callable[[str], str | None], folder: str | Path) -> None:
    """Copy exported files from where a student was loaded, if they are of the weights in its new folder.

    Args:
        find: function that gives the path of a file by its name relative to the student's folder, or None.
        folder: the student's new folder, which contains its weights.
    """
    weights = functools.cache(lambda: weights_digest(folder))  # read only where there is something to compare
    for name, files in FILES.items():
        target = Path(folder, name)
        record = find(f"{name}/{RECORD}")
        if record is None or Path(record).resolve() == (target / RECORD).resolve():
            continue
        if not are_of_weights(record, weights()):
            continue
        target.mkdir(exist_ok=True)
        for file in (*files, RECORD):
            (target / file).unlink(missing_ok=True)  # of another student
            found = find(f"{name}/{file}")
            if found is not None:
                shutil.copy(found, target / file)


def replaced_exports(
    there: Iterable[str], folder: str | Path, pushed: Iterable[str], find: Callable[[str], str | None]
) -> list[str]:
    """Find the exported files on the Hub that a push makes wrong: they are of other weights than those it pushes.

    Args:
        there: names of all files in the repository.
        folder: of the student that is pushed.
        pushed: names of the folders of exported files that are pushed with it.
        find: function that downloads a file of the repository and gives its path, or None.

    Returns:
        Names of files that the folder does not replace. A file stays where its record tells that it is of the weights
        that are pushed.
    """
    there = {*there}
    weights = functools.cache(lambda: weights_digest(folder))
    found = []
    for name, files in FILES.items():
        left = [f"{name}/{file}" for file in (*files, RECORD) if f"{name}/{file}" in there]
        if name in pushed:  # the new record does not describe a file that only the Hub has
            found += [file for file in left if not Path(folder, file).is_file()]
        elif left:
            record = find(f"{name}/{RECORD}") if f"{name}/{RECORD}" in there else None
            found += [] if record is not None and are_of_weights(record, weights()) else left
    return found


def are_of_weights(record: str | Path | None, digest: str | None) -> bool:
    """Whether exported files with this record are of the weights with this hash; a missing record does not tell."""
    return record is not None and digest is not None and _recorded(Path(record), "weights") == digest


def exported_with_head(folder: str | Path, name: str) -> bool:
    """Whether the files in a student's folder of this name include its projection head."""
    return bool(_recorded(Path(folder, name, RECORD), "head"))


def _recorded(path: Path, key: str):
    try:
        return json.loads(path.read_text()).get(key)
    except (OSError, ValueError, AttributeError):
        return None
