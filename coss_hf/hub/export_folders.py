"""The folders of exported files in a student's folder, and whether they still belong to its weights."""

import hashlib
import json
from pathlib import Path

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


def current_exports(folder: str | Path) -> tuple[list[str], list[str]]:
    """Find the exported files in a student's folder.

    Args:
        folder: of the student.

    Returns:
        The files of its present weights, relative to the folder, with their records; and the names of the folders
        whose files are of other weights, or have no record that tells.
    """
    files = []
    stale = []
    digest = None
    for name, names in FILES.items():
        found = [f"{name}/{file}" for file in names if Path(folder, name, file).is_file()]
        if not found:
            continue
        digest = digest or weights_digest(folder)
        if _recorded(Path(folder, name, RECORD)) == digest:
            files += [*found, f"{name}/{RECORD}"]
        else:
            stale.append(name)
    return files, stale


def remove_exports(folder: str | Path) -> None:
    """Remove the exported files of an earlier student from a folder; folders that are then empty go, too."""
    for name, names in FILES.items():
        exported = Path(folder, name)
        for file in (*names, RECORD):
            (exported / file).unlink(missing_ok=True)
        if exported.is_dir() and not any(exported.iterdir()):
            exported.rmdir()


def _recorded(path: Path) -> str | None:
    try:
        return json.loads(path.read_text()).get("weights")
    except (OSError, ValueError, AttributeError):
        return None
