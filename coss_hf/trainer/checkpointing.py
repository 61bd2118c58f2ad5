"""Writing checkpoints: atomically, by all processes together, with the student apart from the training state."""

import contextlib
import copy
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

from coss_hf.hub.student_folder import write_student, write_tensors
from coss_hf.models.heads import HEAD_FILE
from coss_hf.models.modules import ModuleNetwork
from coss_hf.trainer.checkpoint_files import newest_complete, publish, staging
from coss_hf.trainer.distillation_model import DistillationModel
from coss_hf.trainer.fsdp import load_weights
from coss_hf.trainer.manifest import write_manifest
from coss_hf.utils.disk import full_disk
from coss_hf.utils.distributed import any_process
from coss_hf.utils.errors import CheckpointError, NonFiniteLoss, RunStopped
from coss_hf.utils.messages import command_to

CRITERION_FILE = "criterion.safetensors"


class CheckpointWriter:
    """Write folders that are complete or not there: to a folder of another name, flushed to the disk, then renamed.

    Args:
        args: ``should_save`` and ``output_dir`` are read.
        wait: barrier over all processes.
    """

    def __init__(self, args: TrainingArguments, wait: Callable[[], None]):
        self.args = args
        self._wait = wait

    @contextlib.contextmanager
    def atomic(self, final: Path, *, manifest: bool = False) -> Iterator[Path]:
        """Yield the folder to write into, which gets its name ``final`` once every process is done.

        All processes call. What is written in the block by each of them belongs to the folder.

        Args:
            final: the folder's name.
            manifest: add sizes and checksums of all files, written last: for what a run is resumed from.

        Raises:
            CheckpointError: on every process, where one could not write. Nothing incomplete is left.
        """
        unfinished = staging(final)
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
        self._wait()
        try:
            with self.same_error_everywhere(final):
                yield unfinished
        except RunStopped:
            if self.args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
        with self.same_error_everywhere(final):
            if self.args.should_save:
                if manifest:
                    write_manifest(unfinished)
                publish(unfinished, final)
        self._wait()

    @contextlib.contextmanager
    def same_error_everywhere(self, path: str | Path) -> Iterator[None]:
        """Raise what went wrong in the block on any process on all of them, before one waits for another.

        Args:
            path: what is written in the block, for the message.

        Raises:
            NonFiniteLoss: on the processes that found it.
            CheckpointError: instead of any other error, and on the other processes.
        """
        error = None
        try:
            yield
        except Exception as e:  # each library has an error of its own for a full disk
            error = e
        if any_process(error is not None, patient=True):
            if isinstance(error, NonFiniteLoss):
                raise error
            raise self._not_written(path, error) from error

    @contextlib.contextmanager
    def disk_full_as_checkpoint_error(self, student_saved: bool = False) -> Iterator[None]:
        """For what one process writes next to the student.

        Args:
            student_saved: whether the trained student is complete next to it.

        Raises:
            CheckpointError: the disk is full.
        """
        try:
            yield
        except Exception as error:
            if full := full_disk(error):
                raise self._not_written(full.filename or self.args.output_dir, full, student_saved) from error
            raise

    def _not_written(self, path: str | Path, error: Exception | None, student_saved: bool = False) -> CheckpointError:
        if isinstance(error, CheckpointError):
            error = error.__cause__
        reason = full_disk(error) or error or "another process failed"
        earlier, _ = newest_complete(self.args.output_dir)
        if earlier:
            then = f"{earlier} is complete; free some space or mend what is wrong, and give the same command with "
            then += "--resume_from_checkpoint"
        elif student_saved:
            then = f"The trained student is saved in {self.args.output_dir}; free some space, and measure it with "
            then += command_to("evaluate")
        else:
            then = "No checkpoint was written before; free some space or mend what is wrong, and start afresh with "
            then += "--overwrite_output_dir"
        return CheckpointError(f"{path} could not be written: {reason}. {then}.")


def save_student(
    folder: str, model: DistillationModel, args: TrainingArguments, state: dict[str, Tensor], step: int
) -> None:
    """Write the student with its image processor and, in files of their own, its head and what the loss has learnt.

    Args:
        folder: made where it is missing.
        model: what is trained.
        args: of the training; kept without the Hub's token.
        state: full state dict of ``model``.
        step: number of optimizer steps so far, for the message.

    Raises:
        NonFiniteLoss: a weight is NaN or infinite; nothing was written.
    """
    os.makedirs(folder, exist_ok=True)
    parts: dict[str, dict[str, Tensor]] = {"network": {}, "head": {}, "criterion": {}}
    for key, tensor in state.items():
        part, name = key.split(".", 1)
        parts[part][name] = tensor
        if not tensor.isfinite().all():
            raise NonFiniteLoss(f"{key} is not finite at step {step}: nothing was saved.")
    write_student(folder, model.student, model.head, network_state=parts["network"], head_state=parts["head"])
    write_tensors(Path(folder, CRITERION_FILE), parts["criterion"])
    torch.save(without_token(args), os.path.join(folder, "training_args.bin"))


def without_token(args: TrainingArguments) -> TrainingArguments:
    """Return a copy of the arguments that may be written: no secret comes to the disk, or from there to the Hub."""
    args = copy.copy(args)
    args.hub_token = None
    return args


def save_training_state(trainer: Trainer, folder: str) -> None:
    """Write what a training needs to resume as if it had not stopped, unless ``--save_only_model`` leaves it out.

    All processes call together: each has random numbers of its own.

    Args:
        trainer: the training.
        folder: of the checkpoint.
    """
    if trainer.args.save_only_model:
        return
    trainer._save_optimizer_and_scheduler(folder)
    trainer._save_scaler(folder)
    trainer._save_rng_state(folder)


def load_student(
    model: DistillationModel, network_class: type[PreTrainedModel] | type[ModuleNetwork], folder: str
) -> None:
    """Read what ``save_student`` wrote into ``model``, strictly.

    ``Trainer``'s own loading is not strict and knows only the file's key layout: ViT and others would silently restart.

    Args:
        model: what is trained; may be sharded.
        network_class: class of the unsharded network.
        folder: of the checkpoint.
    """
    if issubclass(network_class, ModuleNetwork):
        saved = network_class.saved_weights(folder)
    else:
        saved = _fitted(network_class.from_pretrained(folder, dtype=model.network.dtype).state_dict(), model)
    load_weights(model.network, saved)
    for part, file in ((model.head, HEAD_FILE), (model.criterion, CRITERION_FILE)):
        if part is not None and part.state_dict():
            load_weights(part, load_file(os.path.join(folder, file)))


def _fitted(saved: dict[str, Tensor], model: DistillationModel) -> dict[str, Tensor]:
    """What was saved, with the pooler of the network in memory, which has none or another width; nothing reads it."""
    own = model.network.state_dict()
    saved = {name: value for name, value in saved.items() if name in own}
    for name in model.student.pooler_alone:
        if name not in saved or saved[name].shape != own[name].shape:
            saved[name] = torch.zeros(own[name].shape, dtype=own[name].dtype)
    return saved
