"""Saving and resuming: the student apart from the training state, and checkpoints that are whole or not there."""

import contextlib
import copy
import json
import os
import shutil
import signal
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from coss_hf.models.heads import HEAD_FILE
from coss_hf.trainer.callbacks.preemption import Preemption
from coss_hf.trainer.checkpoint_files import RECORD, find_checkpoint, finished, publish, read_state, shapes, staging
from coss_hf.trainer.distillation_model import DistillationModel
from coss_hf.trainer.fsdp import load_weights
from coss_hf.utils.disk import full_disk
from coss_hf.utils.distributed import any_process
from coss_hf.utils.errors import CheckpointError, NonFiniteLoss

CRITERION_FILE = "criterion.safetensors"
BEST = "best"


class SavingTrainer(Trainer):
    """What ``DistillationTrainer`` puts on disk, and how it starts from there.

    A checkpoint is written to a folder of another name, flushed to the disk, and renamed when every process is done. On
    SIGTERM all processes write one at the end of the step and the run ends with exit code 143.
    """

    _preemption: Preemption | None = None
    _identity: dict[str, str] | None = None

    @property
    def _unwrapped(self) -> DistillationModel:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    # ---- writing ----

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self._stop_if_not_finite()
        output_dir = output_dir or self.args.output_dir
        if not self.args.should_save:
            return
        os.makedirs(output_dir, exist_ok=True)
        model = self._unwrapped
        state = model.state_dict() if state_dict is None else state_dict
        parts = {"student": {}, "head": {}, "criterion": {}}
        for key, tensor in state.items():
            part, name = key.split(".", 1)
            parts[part][name] = tensor
            if not tensor.isfinite().all():
                raise NonFiniteLoss(f"{key} is not finite at step {self.state.global_step}: nothing was saved.")
        model.student.save_pretrained(output_dir, state_dict=parts["student"])
        self.processing_class.save_pretrained(output_dir)
        for part, file in (("head", HEAD_FILE), ("criterion", CRITERION_FILE)):
            path = Path(output_dir, file)
            path.unlink(missing_ok=True)  # of an earlier run in this folder
            if parts[part]:
                tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in parts[part].items()}
                save_file(tensors, path, metadata={"format": "pt"})
        args = copy.copy(self.args)
        args.hub_token = None  # no secret on disk
        torch.save(args, os.path.join(output_dir, "training_args.bin"))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As stock.

        Raises:
            CheckpointError: on every process, where one could not write; before any of them waits for another.
        """
        error = None
        try:
            if self.is_deepspeed_enabled and self.deepspeed is None:  # a finished run: nothing was wrapped
                self._save(output_dir)
            else:
                super().save_model(output_dir, _internal_call=True)
        except NonFiniteLoss:
            raise
        except Exception as e:  # each library has an error of its own for a full disk
            error = e
        if any_process(error is not None):
            raise self._not_written(output_dir or self.args.output_dir, error) from error
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    @contextlib.contextmanager
    def room(self):
        """For what is written beside the student, on one process.

        Raises:
            CheckpointError: the disk is full.
        """
        try:
            yield
        except Exception as error:
            if full := full_disk(error):
                raise self._not_written(full.filename or self.args.output_dir, full) from error
            raise

    def _not_written(self, path: str | Path, error: Exception | None) -> CheckpointError:
        if isinstance(error, CheckpointError):
            error = error.__cause__
        earlier = find_checkpoint(self.args.output_dir, "auto")
        return CheckpointError(
            f"{path} could not be written: {error or 'another process failed'}. "
            + (f"{earlier} is whole" if earlier else "No checkpoint was written before")
            + "; put that right (make room on a full disk) and give the same command with --resume_from_checkpoint."
        )

    def _save_checkpoint(self, model, trial) -> None:
        """As stock, which writes in place: a run killed there would leave half a checkpoint."""
        self.store_flos()
        run_dir = Path(self._get_output_dir(trial=trial))
        final = run_dir / f"checkpoint-{self.state.global_step}"
        unfinished, error = staging(final), None
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            self._write_checkpoint(str(unfinished), final)
        except NonFiniteLoss:
            raise
        except Exception as e:  # each library has an error of its own for a full disk
            error = e
        if any_process(error is not None):
            if self.args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise self._not_written(final, error) from error
        if self.args.should_save:
            publish(unfinished, final)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run_dir), self.args.save_total_limit, best, use_mtime=False)

    def _write_checkpoint(self, folder: str, final: Path) -> None:
        self.save_model(folder, _internal_call=True)
        best = self.state.best_global_step
        if best and (best == self.state.global_step or final.with_name(f"checkpoint-{best}").exists()):
            self.state.best_model_checkpoint = str(final.with_name(f"checkpoint-{best}"))
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(folder)
            self._save_scaler(folder)
            self._save_rng_state(folder)
        if not self.args.should_save:
            return
        Path(folder, RECORD).write_text(json.dumps(self.identity(), indent=2))
        for callback in (c for c in [*self.callback_handler.callbacks, self.control] if isinstance(c, ExportableState)):
            saved, name = self.state.stateful_callbacks, type(callback).__name__
            if isinstance(saved[name], list):
                saved[name].append(callback.state())
            else:
                saved[name] = callback.state()
        self.state.save_to_json(os.path.join(folder, "trainer_state.json"))

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        """As stock, and keeps the best student so far in ``best/``, whatever checkpoints are written."""
        name = f"eval_{(self.args.metric_for_best_model or '').removeprefix('eval_')}"
        if name == "eval_overlap10" and name not in metrics:  # too few images; it was not asked for
            return False
        better = super()._determine_best_metric(metrics, trial)
        if better:
            best = Path(self._get_output_dir(trial=trial), BEST)
            unfinished = staging(best)
            if self.args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self.save_model(str(unfinished), _internal_call=True)
            if self.args.should_save:
                publish(unfinished, best)
        return better

    # ---- resuming ----

    def identity(self) -> dict[str, str]:
        """What must be the same for a run to go on from a checkpoint; each under the argument that decides it."""
        if self._identity is None:
            args, data, model = self.args, self.train_dataset, self._unwrapped
            self._identity = {
                "--teacher": self.teacher.fingerprint(),
                "--student": f"{type(model.student).__name__} {shapes(model.student)}",
                "--head": "none" if model.head is None else shapes(model.head),
                "--method": args.method,
                "--seed": str(args.seed),
                "--per_device_train_batch_size": f"{args.images_per_step} images a step",
            } | data.identity()
        return self._identity

    def check_checkpoint(self, checkpoint: str) -> None:
        """Raises ValueError where the run that wrote ``checkpoint`` had another student, teacher, dataset, ..., or kept
        no training state to go on from."""
        saved = json.loads(Path(checkpoint, RECORD).read_text())
        mine = self.identity()
        other = [key for key in mine if saved.get(key) != mine[key]]
        if other:
            shown = [
                f"{key} (then {saved.get(key)}, now {mine[key]})" for key in other if len(str(mine[key])) < 40
            ] or other
            raise ValueError(
                f"--resume_from_checkpoint: {checkpoint} was written with another {', '.join(shown)}. Give what it was "
                f"written with, or start afresh in another --output_dir."
            )
        # Stock training would go on without momentum, schedule and random numbers, and not say so.
        if not (any(Path(checkpoint).glob("rng_state*.pth")) or finished(read_state(checkpoint), self.args)):
            raise ValueError(
                f"--resume_from_checkpoint: {checkpoint} holds the student without the state of its training "
                f"(--save_only_model). Start afresh in another --output_dir, from --student {checkpoint} if you like."
            )

    def find_checkpoint(self, asked: str | bool | None) -> str | None:
        """The checkpoint to resume from, checked; None for a fresh start.

        Raises:
            ValueError: not a complete checkpoint, or one of another run.
        """
        checkpoint = find_checkpoint(self.args.output_dir, asked)
        if checkpoint:
            self.check_checkpoint(checkpoint)
        return checkpoint

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Stock loading is not strict and knows only the file's key layout: ViT and others would restart silently."""
        model = self.accelerator.unwrap_model(self.model if model is None else model, keep_torch_compile=False)
        own = model.student
        saved = type(self.student.model).from_pretrained(resume_from_checkpoint, dtype=own.dtype)
        load_weights(own, saved.state_dict())
        for part, file in ((model.head, HEAD_FILE), (model.criterion, CRITERION_FILE)):
            if part is not None and part.state_dict():
                load_weights(part, load_file(os.path.join(resume_from_checkpoint, file)))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> TrainOutput:
        """As stock, but see ``checkpoints.find_checkpoint`` for what ``resume_from_checkpoint`` may be.

        Raises:
            ValueError: not a complete checkpoint, or one of another run.
            CheckpointError: a checkpoint could not be written; earlier ones are whole.
            SystemExit: code 143 after SIGTERM, once a checkpoint is written.
        """
        checkpoint = self.find_checkpoint(resume_from_checkpoint)
        if checkpoint is None:
            if resume_from_checkpoint:
                print(f"No complete checkpoint in {self.args.output_dir}: starting afresh.", flush=True)
            return self._train(**kwargs)
        state = read_state(checkpoint)
        if self.args.process_index == 0:
            print(f"Resuming from {checkpoint}, step {state['global_step']}.", flush=True)
        if not finished(state, self.args):
            return self._train(resume_from_checkpoint=checkpoint, **kwargs)
        # Stock training would do one more step where a finished run ended in mid-epoch.
        self.state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(best or checkpoint)
        return TrainOutput(self.state.global_step, float("nan"), {})

    def _train(self, **kwargs) -> TrainOutput:
        if self._preemption is None:
            self._preemption = Preemption()
            self.add_callback(self._preemption)
        with self._preemption:
            result = super().train(**kwargs)
        if self._preemption.agreed:
            print(f"SIGTERM: step {self.state.global_step} is saved; go on with --resume_from_checkpoint.", flush=True)
            raise SystemExit(128 + signal.SIGTERM)
        return result
