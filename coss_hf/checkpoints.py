"""Checkpoints that are whole or not there, which one to resume from, and what to do on SIGTERM."""

import hashlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from filelock import FileLock, Timeout
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from coss_hf.distributed import any_process

RECORD = "distillation.json"
STAGING, REPLACED = "unfinished-", "replaced-"
PATIENCE = 60  # seconds for another run to end
_held: list[FileLock] = []


class RunStopped(RuntimeError):
    """A run cannot go on; the message says why, and what is on disk."""


class NonFiniteLoss(RunStopped):
    """The loss became NaN or infinite; the message names the step and the images.

    Attributes:
        found: whether images of this process are to blame.
    """

    def __init__(self, message: str, found: bool = False):
        super().__init__(message)
        self.found = found


class CheckpointError(RunStopped):
    """A checkpoint could not be written; earlier ones are whole."""


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


def hold(output_dir: str | Path) -> None:
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
    _held.append(lock)  # released with the process


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


@lru_cache
def _block_in_children(preemption: type) -> None:
    def mask(how: int) -> Callable:
        return lambda: preemption._watching and signal.pthread_sigmask(how, {signal.SIGTERM})

    def child() -> None:
        if preemption._watching:
            threading.Thread(target=_end_when_the_parent_asks, daemon=True).start()

    os.register_at_fork(before=mask(signal.SIG_BLOCK), after_in_parent=mask(signal.SIG_UNBLOCK), after_in_child=child)


def _end_when_the_parent_asks() -> None:
    """SIGTERM from the process that made this one ends it, as ever; from anybody else it does nothing."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(128 + signal.SIGTERM)


class Preemption(TrainerCallback):
    """On SIGTERM, a checkpoint at the end of the step at which all processes know of it, and then the end.

    A context manager: the signal is watched inside. The processes talk at each step, over gloo: a GPU need not wait.
    Schedulers send the signal to a run's loader workers as well, which die of it in torch's own handler, and the step
    with them: they are born with the signal blocked, and listen to their parent alone. A launcher that was killed is a
    signal, too: it cannot stop the processes that it started, and nobody else would.

    Attributes:
        agreed: whether training ended because of the signal.
    """

    _watching = False

    def __init__(self):
        self.received, self.agreed, self._before = False, False, None
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        # Cannot be taken back, so that it is made once and looks whether anything is watched.
        _block_in_children(Preemption)

    def __enter__(self):
        self.received = self.agreed = False
        Preemption._watching = True
        if threading.current_thread() is threading.main_thread():  # Python handles signals in no other
            self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *error):
        Preemption._watching = False
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _receive(self, *_):
        self.received = True

    def on_step_end(self, args, state, control, **kwargs):
        orphaned = self._launcher is not None and os.getppid() != self._launcher
        self.agreed = any_process(self.received or orphaned)
        if self.agreed:
            control.should_save, control.should_evaluate = True, False

    def on_save(self, args, state, control, **kwargs):
        # Not earlier: what is saved would stop a run that restores its callbacks.
        control.should_training_stop |= self.agreed

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.agreed:  # stock ends the epoch on its way out
            control.should_save = control.should_evaluate = False


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
