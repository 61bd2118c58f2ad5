"""The files of a run's folder: atomic checkpoints, the lock of the folder, and which checkpoint to resume from."""

import hashlib
import json
import os
import shutil
from pathlib import Path

from filelock import FileLock, Timeout
from torch import nn
from transformers.trainer_utils import get_last_checkpoint

RECORD = "distillation.json"
STAGING, REPLACED = "unfinished-", "replaced-"
PATIENCE = 60  # seconds for another run to end
_locks: list[FileLock] = []


def staging(checkpoint: Path) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return checkpoint.with_name(STAGING + checkpoint.name)


def publish(unfinished: Path, checkpoint: Path) -> None:
    """Gives a written checkpoint its name, once its files would survive a power cut. One of that name is replaced."""
    for path in [*unfinished.rglob("*"), unfinished]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    replaced = checkpoint.with_name(REPLACED + checkpoint.name)
    if checkpoint.exists():
        os.replace(checkpoint, replaced)
    os.replace(unfinished, checkpoint)
    shutil.rmtree(replaced, ignore_errors=True)


def lock_output_dir(output_dir: str | Path) -> None:
    """Keeps other runs out of a folder until this process ends, however it does.

    Waits a while for one that is on its way out: what a killed launcher left behind ends with its step.

    Raises:
        ValueError: another run is at work there, or it cannot be made.
    """
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir={output_dir} cannot be made ({error}); give another folder.") from error
    # The name is one that Trainer does not push. Within a process a second run may follow the first.
    lock = FileLock(Path(output_dir, "_lock"), is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Another run is at work in {output_dir}: waiting {PATIENCE} seconds for its end.", flush=True)
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            raise ValueError(
                f"--output_dir={output_dir}: another run is at work there; stop it, or give another folder."
            ) from None
    _locks.append(lock)  # released with the process


def recover(output_dir: str | Path) -> None:
    """Puts a run's folder in order after a crash: what was half written goes, what was half replaced comes back."""
    folder, names = Path(output_dir), ("checkpoint-*", "best")
    for replaced in [path for name in names for path in folder.glob(REPLACED + name)]:
        checkpoint = replaced.with_name(replaced.name.removeprefix(REPLACED))
        if checkpoint.exists():
            shutil.rmtree(replaced)
        else:
            os.replace(replaced, checkpoint)
    for unfinished in [path for name in names for path in folder.glob(STAGING + name)]:
        shutil.rmtree(unfinished)


def shapes(module: nn.Module) -> str:
    """Hash of the names and shapes of all weights."""
    layout = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    return hashlib.blake2b(json.dumps(layout, sort_keys=True).encode(), digest_size=8).hexdigest()


def read_state(folder: str | Path, files: tuple[str, ...] = ("config.json", RECORD)) -> dict | None:
    """Trainer state of a complete checkpoint, else None: it is written last, and a half-written one does not parse.

    Args:
        files: that must be there, too.
    """
    try:
        state = json.loads((Path(folder) / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return None
    whole = all((Path(folder) / name).is_file() for name in files)
    return state if "global_step" in state and whole else None


def finished(state: dict, args) -> bool:
    """Whether the run that saved ``state`` is already as long as ``args`` ask for."""
    if args.max_steps > 0:
        return state["global_step"] >= args.max_steps
    return state["global_step"] >= state["max_steps"] and state["epoch"] >= args.num_train_epochs


def find_checkpoint(output_dir: str, asked: str | bool | None, **options) -> str | None:
    """Folder to resume from.

    Args:
        output_dir: of the run.
        asked: None or False for a fresh start; True, ``"auto"`` or ``"True"`` for the newest complete checkpoint, None
            if there is none; else a checkpoint folder.
        options: of ``read_state``.

    Raises:
        ValueError: a folder that is not a complete checkpoint.
    """
    if not asked or str(asked).lower() in ("false", "none"):
        return None
    if asked is True or str(asked).lower() in ("auto", "true"):
        folders = [folder for folder in Path(output_dir).glob("checkpoint-*") if folder.name[11:].isdigit()]
        folders.sort(key=lambda folder: int(folder.name[11:]), reverse=True)
        return next((str(folder) for folder in folders if read_state(folder, **options)), None)
    folder = Path(asked)
    if not read_state(folder, **options):
        inside = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        hint = f" Did you mean {inside}?" if inside else " Give --resume_from_checkpoint auto for the newest."
        raise ValueError(f"--resume_from_checkpoint={asked} is not a complete checkpoint.{hint}")
    return str(folder)


def check_identity(checkpoint: str, identity: dict[str, str]) -> None:
    """Check that the run that wrote a checkpoint is this one.

    Args:
        checkpoint: its folder.
        identity: of this run; see ``DistillationTrainer.identity``.

    Raises:
        ValueError: it had another student, teacher, dataset, ...
    """
    saved = json.loads(Path(checkpoint, RECORD).read_text())
    other = [key for key in identity if saved.get(key) != identity[key]]
    if not other:
        return
    shown = [f"{key} (then {saved.get(key)}, now {identity[key]})" for key in other if len(str(identity[key])) < 40]
    raise ValueError(
        f"--resume_from_checkpoint: {checkpoint} was written with another {', '.join(shown or other)}. Give what it "
        f"was written with, or start afresh in another --output_dir."
    )


def check_training_state(checkpoint: str, args) -> None:
    """Check that a checkpoint holds more than the student.

    ``Trainer`` would go on without momentum, schedule and random numbers, and not say so.

    Raises:
        ValueError: the run that wrote it is not finished, and kept no training state.
    """
    if any(Path(checkpoint).glob("rng_state*.pth")) or finished(read_state(checkpoint), args):
        return
    raise ValueError(
        f"--resume_from_checkpoint: {checkpoint} holds the student without the state of its training "
        f"(--save_only_model). Start afresh in another --output_dir, from --student {checkpoint} if you like."
    )
