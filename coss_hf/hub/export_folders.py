"""The folders of exported files in a student's folder, and whether they still belong to its weights."""

import hashlib
import json
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
# All of them, relative to the student's folder.
EXPORTED = [f"{folder}/{file}" for folder, files in FILES.items() for file in (*files, RECORD)]
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
        belongs = digest is not None and _recorded(Path(folder, name, RECORD), "weights") == digest
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


def exported_with_head(folder: str | Path, name: str) -> bool:
    """Whether the files in a student's folder of this name include its projection head."""
    return bool(_recorded(Path(folder, name, RECORD), "head"))


def _recorded(path: Path, key: str):
    try:
        return json.loads(path.read_text()).get(key)
    except (OSError, ValueError, AttributeError):
        return None
