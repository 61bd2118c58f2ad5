"""The files of a run's folder: atomic checkpoints, the lock of the folder, and which checkpoint to resume from."""

import functools
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from filelock import FileLock, Timeout
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import sort_checkpoints

from coss_hf.hub.export_folders import remove_exports
from coss_hf.losses.registry import summands
from coss_hf.trainer.manifest import MANIFEST, find_damage
from coss_hf.utils.code_identity import is_of_another_python
from coss_hf.utils.messages import for_reader
from coss_hf.utils.process_group import Processes

RECORD = "distillation.json"
CLASSIFIER = "--teacher's classifier"
TEACHER_CODE = "--teacher's code"
TRANSFORM_CODE = "--transform"  # of `ViewDataset.identity`
STEPS_OF_EPOCH = "--gradient_accumulation_steps"
CODE = (TEACHER_CODE, TRANSFORM_CODE)
BEST = "best"
LOCK = "_lock"
STAGING = "unfinished-"
REPLACED = "replaced-"
DAMAGED = "damaged-"
TEMPORARY = re.compile(r"\.tmp[A-Za-z0-9]{6}")  # of safetensors, which then gives the file its name
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


def rotate(run_dir: str | Path, limit: int | None, best: str | None, pushed: set[str]) -> None:
    """Delete the oldest checkpoints beyond ``limit``, as ``Trainer`` does, but those that are being pushed.

    Args:
        run_dir: folder of the checkpoints.
        limit: number of checkpoints to keep; None for all.
        best: a checkpoint that stays, next to the newest.
        pushed: checkpoints that are being pushed; a later call deletes them.
    """
    if not limit:
        return
    found = sort_checkpoints(str(run_dir))
    kept = {*found[-1:], *([str(Path(best))] if best else [])}
    count = len(found) - max(limit, len(kept))
    for folder in [one for one in found if one not in kept][: max(count, 0)]:
        if folder not in pushed:
            shutil.rmtree(folder, ignore_errors=True)


def lock_output_dir(output_dir: str | Path) -> None:
    """Keeps other runs out of a folder until this process ends, however it does.

    Waits a while for one that is on its way out: what a killed launcher left behind ends with its step.

    Raises:
        ValueError: another run is at work there, or it cannot be made or written.
    """
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir={output_dir} cannot be made ({error}); give another folder.") from error
    # The name is one that Trainer does not push. Within a process a second run may follow the first.
    lock = FileLock(Path(output_dir, LOCK), is_singleton=True)
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
    except OSError as error:
        raise ValueError(
            f"--output_dir={output_dir} cannot be written ({error}); give a folder that you may write to."
        ) from error
    _locks.append(lock)  # released with the process


def recover(output_dir: str | Path) -> None:
    """Puts a run's folder in order after a crash: what was half written goes, what was half replaced comes back."""
    folder = Path(output_dir)
    names = ("checkpoint-*", BEST)
    for replaced in [path for name in names for path in folder.glob(REPLACED + name)]:
        checkpoint = replaced.with_name(replaced.name.removeprefix(REPLACED))
        if checkpoint.exists():
            shutil.rmtree(replaced)
        else:
            os.replace(replaced, checkpoint)
    for unfinished in [path for name in names for path in folder.glob(STAGING + name)]:
        shutil.rmtree(unfinished)


def remove_temporary_files(output_dir: str | Path) -> None:
    """Remove what a run that was killed while it saved its student left half written."""
    for path in Path(output_dir).glob(".tmp*"):
        if TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink()


def holds_run(output_dir: str | Path) -> bool:
    """Whether a student or checkpoints are in a folder."""
    output = Path(output_dir)
    return os.path.exists(output / "model.safetensors") or any(output.glob("checkpoint-*"))


def may_be_refused(args: TrainingArguments) -> bool:
    """Whether ``claim_output_dir`` may refuse the output folder; the same on all processes, which call together."""
    locked = os.path.exists(Path(args.output_dir, LOCK))  # by a run at work, or by one that has ended
    found = holds_run(args.output_dir) and not args.overwrite_output_dir
    return any(Processes().gather(found or locked))


def claim_output_dir(
    args: TrainingArguments, resume_from_checkpoint: str | bool | None, *, dry_run: bool = False
) -> str | None:
    """Lock the output folder and return the checkpoint to resume from; None for a fresh start.

    All processes of a run call together.

    Args:
        args: of the training.
        resume_from_checkpoint: what to resume from, see ``find_checkpoint``.
        dry_run: only look.

    Raises:
        ValueError: another run is at work there, a run is there already and would be overwritten, or there is no such
            checkpoint.
    """
    output = Path(args.output_dir)
    if not dry_run:
        enter_output_dir(args, resume_from_checkpoint)
    checkpoint = find_checkpoint(str(output), resume_from_checkpoint)
    if holds_run(output) and checkpoint is None and not (args.overwrite_output_dir or dry_run):
        resume = "continue it with --resume_from_checkpoint"
        if resume_from_checkpoint:
            resume = "it has no complete checkpoint to resume from"
        raise ValueError(
            f"--output_dir={output} already holds a run: {resume}, replace it with --overwrite_output_dir, or give "
            f"another folder."
        )
    return checkpoint


def remove_earlier_run(args: TrainingArguments, resume_from_checkpoint: str | bool | None) -> None:
    """Remove what ``--overwrite_output_dir`` replaces and no step may write anew.

    Checkpoints, the best student, exported files.

    The newest checkpoint would be resumed from, and an ONNX file would be taken for the new student's.
    """
    if args.overwrite_output_dir and not resume_from_checkpoint and args.process_index == 0:
        for name in ("checkpoint-*", BEST):
            for old in Path(args.output_dir).glob(name):
                shutil.rmtree(old)
        remove_exports(args.output_dir)


def enter_output_dir(args: TrainingArguments, resume_from_checkpoint: str | bool | None) -> None:
    """Lock a run's folder and put it in order. All processes of a run call together.

    Raises:
        ValueError: another run is at work there, it cannot be made, or not all machines share it.
    """
    processes = Processes()
    with processes.together():
        if args.process_index == 0:
            lock_output_dir(args.output_dir)
            remove_temporary_files(args.output_dir)
            # Only where the run is to be resumed: a refusal changes nothing.
            if resume_from_checkpoint or args.overwrite_output_dir:
                recover(args.output_dir)
    processes.check_shared(Path(args.output_dir), f"--output_dir={args.output_dir}")


def shapes(module: nn.Module) -> str:
    """Hash of the names and shapes of all weights."""
    layout = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    return hashlib.blake2b(json.dumps(layout, sort_keys=True).encode(), digest_size=8).hexdigest()


def classifier_identity(criterion: nn.Module) -> dict[str, str]:
    """Hash of the classifier that a loss reads, which no fingerprint of a teacher covers; empty for other losses."""
    losses = [loss for loss in summands(criterion) if getattr(loss, "classifier", "unused") != "unused"]
    layers = [loss.teacher_fc for loss in losses if getattr(loss, "teacher_fc", None) is not None]
    if not layers:
        return {CLASSIFIER: "none"} if losses else {}
    tensors = [tensor.detach().float().cpu().numpy().tobytes() for tensor in layers[0].state_dict().values()]
    return {CLASSIFIER: hashlib.blake2b(b"".join(tensors), digest_size=8).hexdigest()}


def read_state(folder: str | Path) -> dict | None:
    """Trainer state of a complete checkpoint, else None: it is written last, and a half-written one does not parse."""
    try:
        state = json.loads((Path(folder) / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return None
    complete = all((Path(folder) / name).is_file() for name in ("config.json", RECORD))
    return state if "global_step" in state and complete else None


def finished(state: dict, args) -> bool:
    """Whether the run that saved ``state`` is already as long as ``args`` ask for."""
    if args.max_steps > 0:
        return state["global_step"] >= args.max_steps
    return state["global_step"] >= state["max_steps"] and state["epoch"] >= args.num_train_epochs


def incomplete(folder: str | Path) -> str | None:
    """Say why a folder is not a complete checkpoint; None where it is one."""
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    if read_state(folder) is None:
        return "it is not complete: trainer_state.json or another of its records is missing or cannot be read"
    return find_damage(folder)


def newest_complete(output_dir: str | Path) -> tuple[str | None, dict[str, str]]:
    """Find the newest complete checkpoint of a run.

    Args:
        output_dir: of the run.

    Returns:
        The checkpoint, or None; and the newer ones that are not complete, each with the reason.
    """
    passed_over = {}
    folders = [folder for folder in Path(output_dir).glob("checkpoint-*") if folder.name[11:].isdigit()]
    for folder in sorted(folders, key=lambda folder: int(folder.name[11:]), reverse=True):
        reason = incomplete(folder)
        if reason is None:
            return str(folder), passed_over
        passed_over[str(folder)] = reason
    return None, passed_over


def find_checkpoint(output_dir: str, resume_from_checkpoint: str | bool | None) -> str | None:
    """Find the checkpoint to resume from, and say which ones are damaged. All processes of a run call together.

    Args:
        output_dir: of the run.
        resume_from_checkpoint: None or False for a fresh start; True, ``"auto"`` or ``"True"`` for the newest complete
            checkpoint, None if there is none at all; else a checkpoint folder.

    Raises:
        ValueError: a folder that is not a complete checkpoint, or a run of which no checkpoint is complete any more.
    """
    if not resume_from_checkpoint or str(resume_from_checkpoint).lower() in ("false", "none"):
        return None
    processes = Processes()
    found = None
    with processes.together():
        if processes.rank == 0:  # one decides: files may change, and each process would read all of them
            automatic = resume_from_checkpoint is True or str(resume_from_checkpoint).lower() in ("auto", "true")
            found = _choose(output_dir) if automatic else _check(resume_from_checkpoint)
    return processes.gather(found)[0]


def _choose(output_dir: str) -> str | None:
    found, passed_over = newest_complete(output_dir)
    reasons = "; ".join(f"{folder}: {reason}" for folder, reason in passed_over.items())
    # What was never complete, since a run was killed while it wrote its first checkpoint, is no reason to stop.
    once_complete = [folder for folder in passed_over if Path(folder, MANIFEST).exists() or read_state(folder)]
    if found is None and once_complete:
        raise ValueError(
            f"--resume_from_checkpoint: no checkpoint in {output_dir} is complete ({reasons}). Put back what is "
            f"missing or damaged, or start afresh: in another --output_dir, or with --overwrite_output_dir instead of "
            f"--resume_from_checkpoint."
        )
    if passed_over:
        _say_once(f"Damaged, and passed over for {found or 'a fresh start'}: {reasons}.")
    return found


def _check(resume_from_checkpoint: str) -> str:
    reason = incomplete(resume_from_checkpoint)
    if reason is not None:
        folder = Path(resume_from_checkpoint)
        runs = [folder, folder.parent] if folder.is_dir() else [folder.parent]
        others = [newest_complete(run)[0] for run in runs]
        other = next((found for found in others if found), None)
        hint = f"Give {other}, which is." if other else "Give --resume_from_checkpoint auto for the newest."
        raise ValueError(
            f"--resume_from_checkpoint={resume_from_checkpoint} is not a complete checkpoint: {reason}. {hint}"
        )
    return str(Path(resume_from_checkpoint))


@functools.cache
def _say_once(text: str) -> None:
    """A run looks for its checkpoint more than once: before it loads images, and with what they are."""
    print(for_reader(text), flush=True)


def end_of_messages() -> None:
    """A run has ended: what the next one in this process, of a notebook, finds out is printed again."""
    _say_once.cache_clear()


def set_damaged_aside(checkpoint: str) -> None:
    """Rename the checkpoints that were passed over for ``checkpoint``: the run would keep them as its newest."""
    _, passed_over = newest_complete(Path(checkpoint).parent)
    for damaged in map(Path, passed_over):
        aside = damaged.with_name(DAMAGED + damaged.name)
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(damaged, aside)


def check_identity(checkpoint: str, identity: dict[str, str]) -> None:
    """Check that the run that wrote a checkpoint is this one.

    Args:
        checkpoint: its folder.
        identity: of this run; see ``DistillationTrainer.identity``.

    Raises:
        ValueError: it had another student, teacher, dataset, ...
    """
    saved = json.loads(Path(checkpoint, RECORD).read_text())
    unclear = [name for name in CODE if is_of_another_python(saved.get(name), identity.get(name))]
    other = [key for key in identity if key not in unclear and saved.get(key) != identity[key]]
    if not other:
        return
    shown = [f"{key} (then {saved.get(key)}, now {identity[key]})" for key in other if len(str(identity[key])) < 40]
    raise ValueError(
        f"--resume_from_checkpoint: {checkpoint} was written with another {', '.join(shown or other)}. Give what it "
        f"was written with, or start afresh in another --output_dir."
    )


def check_training_state(checkpoint: str, args) -> None:
    """Check that a checkpoint holds more than the network.

    ``Trainer`` would continue without momentum, schedule and random numbers, without saying so.

    Raises:
        ValueError: the run that wrote it is not finished, and kept no training state.
    """
    if any(Path(checkpoint).glob("rng_state*.pth")) or finished(read_state(checkpoint), args):
        return
    raise ValueError(
        f"--resume_from_checkpoint: {checkpoint} holds the network without the state of its training "
        f"(--save_only_model). Start afresh in another --output_dir, from the network in {checkpoint} if you like."
    )
