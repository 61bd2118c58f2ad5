"""The trainer of every method."""

import contextlib
import copy
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from datasets import DatasetDict, IterableDatasetDict
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import (
    EvalLoopOutput,
    IntervalStrategy,
    PredictionOutput,
    TrainOutput,
)

from coss_hf.data.loading import ImageSplits
from coss_hf.data.run_images import RunImages
from coss_hf.data.stream_views import StreamViews
from coss_hf.data.views import ViewDataset, collate_views
from coss_hf.evaluation.diagnostics import OF_OTHER_IMAGES
from coss_hf.evaluation.evaluator import Evaluator
from coss_hf.features import Features
from coss_hf.hub.model_card import write_card
from coss_hf.losses.base import DistillationLoss
from coss_hf.losses.registry import LOSSES, read_by, summands
from coss_hf.models.backbone import Backbone
from coss_hf.models.image_processor import brings_code
from coss_hf.models.loading import has_own_code
from coss_hf.models.modules import ModuleNetwork
from coss_hf.reporting.closing import closing_summary, next_lines
from coss_hf.reporting.run_record import to_dict, write_json
from coss_hf.reporting.run_report import remove_pictures, write_record
from coss_hf.reporting.trackers import check_trackers, report_end_of_run, use_own_trackers
from coss_hf.trainer.arguments import DataArguments
from coss_hf.trainer.cached_teacher import CachedTeacher, check_cached
from coss_hf.trainer.callbacks.console import print_lines
from coss_hf.trainer.callbacks.diagnostics import DiagnosticsCallback
from coss_hf.trainer.callbacks.epoch import EpochCallback, StreamCallback
from coss_hf.trainer.callbacks.preemption import Preemption
from coss_hf.trainer.callbacks.waiting import WaitingCallback
from coss_hf.trainer.checkpoint_files import (
    BEST,
    RECORD,
    STEPS_OF_EPOCH,
    TEACHER_CODE,
    check_identity,
    check_training_state,
    claim_output_dir,
    classifier_identity,
    end_of_messages,
    find_checkpoint,
    finished,
    incomplete,
    may_be_refused,
    newest_complete,
    read_state,
    remove_earlier_run,
    rotate,
    set_damaged_aside,
    shapes,
)
from coss_hf.trainer.checkpointing import CheckpointWriter, load_student, save_student, save_training_state
from coss_hf.trainer.conflicting_inputs import check_data
from coss_hf.trainer.distillation_model import DistillationModel, loss_argument, try_criterion, uses_maps
from coss_hf.trainer.engine import synchronise_batch_norm, use_channels_last, use_precision
from coss_hf.trainer.fsdp import broadcast_buffers, gather, is_sharded, name_blocks, unsharded_copy, unshare
from coss_hf.trainer.given_arguments import instead_of_arguments, plain
from coss_hf.trainer.given_optimizer import complete_optimizer
from coss_hf.trainer.gradient_accumulation import attach_other_totals, check_deterministic_forward, scale_gradient
from coss_hf.trainer.inputs import Prepared, RunInputs, TrainerInputs, evaluator_of, find_neighbors, resolve_inputs
from coss_hf.trainer.loss_monitor import LossMonitor
from coss_hf.trainer.pretraining import pretrain
from coss_hf.trainer.publishing import HubPublisher
from coss_hf.trainer.reloading import check_reload
from coss_hf.trainer.run_results import RunReport, compare, report
from coss_hf.trainer.schedule import milestone_schedule
from coss_hf.trainer.settings import (
    RECORDED,
    loader_batches,
    most_workers,
    pixels_to_embed,
    recorded_settings,
    take_over,
    values_to_record,
)
from coss_hf.trainer.step_times import StepTimes
from coss_hf.trainer.stream_loader import StreamLoader, load_position, save_position
from coss_hf.trainer.training_args import DistillationArguments
from coss_hf.trainer.weight_decay import matrices
from coss_hf.utils.code_identity import code_entry
from coss_hf.utils.distributed import all_reduce_sum, any_process
from coss_hf.utils.errors import WORKER_ERRORS, LostWorker, RunStopped, is_lost_worker
from coss_hf.utils.messages import first_line, for_reader, get_logger, on_command_line, parameter_names
from coss_hf.utils.process_group import Processes
from coss_hf.utils.randomness import StepSeed
from coss_hf.utils.shared_memory import check_shared_memory

logger = get_logger(__name__)


class DistillationTrainer(Trainer):
    """Distil a frozen teacher into a student without labels.

    What it does differently from ``transformers.Trainer``: a step embeds the views by the teacher, too; checkpoints
    hold the student apart from its head and the loss, are complete or not there, and are resumed bit for bit; on
    SIGTERM or Ctrl-C all processes write one at the end of the step and the run ends with exit code 143 or 130;
    evaluation measures embeddings.

    Args:
        teacher: the network to learn from, never saved: a Hub name or folder, a ``PreTrainedModel``, another
            ``torch.nn.Module`` (of timm or torchvision), a ``Student`` without a head, or a ``Backbone``, such as
            ``Backbone.from_module`` makes of a module of your own.
        student: the network to train: the same. Parameters that you froze stay frozen.
        args: ``DistillationArguments``; the trainer works with a resolved copy. By default those of a run in the folder
            ``student``.
        train_dataset: images, which need no labels: a ``Dataset`` or ``DatasetDict`` with a column of images, a Hub
            name, a folder or parquet file, what ``coss_hf.load_images`` returns, or a ``ViewDataset``. With
            ``args.neighbors_k``, neighbours that came with the dataset are used, else they are mined, in all processes
            together. An ``IterableDataset`` is read as a stream, without neighbours, for ``args.max_steps`` or
            ``args.num_images``.
        eval_dataset: images to evaluate on: the same. Default: those that the dataset brings, else some held out of
            train, as ``recipes/distill.py`` does.
        evaluator: what ``evaluate`` measures, instead of that of ``eval_dataset``.
        criterion: the loss: a method's name or a sum of methods (see ``args.method``, its default), or a module called
            as ``criterion(student, teacher, index)``. A ``DistillationLoss`` is given what its class declares to read
            and nothing else, also where it is called later.
        transform: the augmentation: a name (see ``args.augmentation``, its default), or a callable from a PIL image to
            a uint8 tensor ``(3, h, w)``. The global generators of Python's ``random``, NumPy and torch are seeded for
            each view.
        data: columns and splits of the images, and how neighbours are searched; default: ``DataArguments()``.
        neighbors: row numbers ``(n, K)`` of each training image's neighbours, instead of a search. No images are held
            out of train then, unless ``data`` says how many.
        callbacks: as in ``transformers.Trainer``.
        optimizers: an optimizer of the student's parameters, and a schedule or None, instead of those of ``args``. The
            projection head and what a loss learns, which the trainer builds, are added to the optimizer as a parameter
            group with its defaults. Where there are any, give no schedule: ``args.lr_scheduler_type`` names one.
        prepared: of ``factory``, whose caller answers for the output folder and the arguments. Leave it out.

    Attributes:
        splits: the images; None where a ``ViewDataset`` was given.
        arguments: what the run was given, for its record; a recipe adds what it was given besides ``args``.
        settings: what was filled of that which ``args`` left out, with the reasons.
        monitor: running means, throughput and the check for losses that are not finite.
        checkpoints: writes folders that are complete or not there.
        publisher: pushes the student to the Hub.

    Raises:
        ValueError: input that the training cannot use; the message names the parameter, its value and the remedy.

    Example::

        trainer = DistillationTrainer(
            teacher="facebook/dinov2-base",
            student="timm/vit_small_patch16_224.augreg_in21k",
            args=DistillationArguments("food-vits", num_train_epochs=30, neighbors_k=3),
            train_dataset=load_dataset("ethz/food101", split="train"),
        )
        trainer.train()
        trainer.evaluate()
        trainer.save_model()
    """

    @parameter_names()
    def __init__(
        self,
        teacher: str | PreTrainedModel | Backbone,
        student: str | PreTrainedModel | Backbone,
        args: DistillationArguments | None = None,
        train_dataset=None,
        eval_dataset=None,
        *,
        evaluator: Evaluator | None = None,
        criterion: str | nn.Module | None = None,
        transform: str | Callable | None = None,
        data: DataArguments | None = None,
        neighbors: np.ndarray | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers=(None, None),
        prepared: Prepared | None = None,
    ):
        if not (args is None or isinstance(args, DistillationArguments)):
            raise ValueError(
                f"--args is a {type(args).__name__}; give DistillationArguments, which take what "
                f"transformers.TrainingArguments do."
            )
        if neighbors is not None and not (args and args.neighbors_k):
            raise ValueError("--neighbors: --neighbors_k=0 draws none of them; give neighbors_k in args.")
        if isinstance(train_dataset, ViewDataset) and not (neighbors is None and transform is None):
            raise ValueError("--neighbors, --transform: a ViewDataset makes the views; give them to it.")
        data = data or DataArguments()
        if prepared is None:  # else the same arguments have read the images
            check_data(train_dataset, eval_dataset, data)
        if neighbors is not None and data.validation_size is None:
            data = replace(data, validation_size=0)  # their rows are those of the images that were given
        self._given = TrainerInputs(
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            evaluator=evaluator,
            criterion=criterion,
            transform=transform,
            data=data,
            neighbors=neighbors,
            callbacks=callbacks,
            optimizers=optimizers,
            prepared=prepared,
        )
        self._prepared_checkpoint = prepared.checkpoint if prepared is not None and prepared.has_claimed else None
        self._set_up(teacher, student, args)

    def _set_up(self, teacher, student, args: DistillationArguments | None) -> None:
        """Build everything up to the first step; again where a run is resumed with the images that it began with."""
        given = self._given
        inputs = resolve_inputs(teacher, student, args, given)
        self.splits = inputs.splits
        self.settings = inputs.settings
        self.settings.leave_to(*given.optimizers)
        self._has_neighbors = False
        self._build(inputs, given.callbacks, given.optimizers)
        self.arguments: dict = to_dict(given.data, self.args) | inputs.given | {"method": self.method}
        self.arguments |= instead_of_arguments(self.arguments, *given.optimizers)
        if self.splits is not None or self.evaluator is not None:  # else the views are noise, of a rehearsal
            self._check_evaluations()
        self._cache_to_open = self._find_cache()
        # Whether the folder's run is to be resumed, replaced or left alone is known in `train`, which may get the
        # parameter for it. Until then a used folder is no error: it may be evaluated. But hours are not spent on it.
        if not (self._claims_output_dir() and may_be_refused(self.args)):
            self._find_neighbors()

    def _find_neighbors(self) -> None:
        """Find neighbours, once, and last, since that takes longest; then open the cache, whose rows follow them."""
        if self._has_neighbors:
            return
        if self.splits is not None:
            self._use_neighbors(self._given.neighbors, self._given.data)
        if self._cache_to_open is not None and not self.args.dry_run:
            self._open_cache(self._cache_to_open)
        self._identity = None
        self._has_neighbors = True

    def _use_neighbors(self, neighbors: np.ndarray | None, data: DataArguments) -> None:
        if not self.args.neighbors_k:
            return
        if neighbors is None:
            self._place_teacher()
            neighbors = find_neighbors(self.splits, self.teacher, data, self.args)
        self.train_dataset.use_neighbors(neighbors, self.args.neighbors_k)

    def _find_cache(self) -> CachedTeacher | None:
        """The cache of this teacher; before neighbours are searched, which takes long."""
        args = self.args
        if not args.teacher_cache:
            return None
        images = self.length.images_after(self.length.steps_per_epoch)
        seen = self.length.images_after(args.max_steps) / images if args.max_steps > 0 else args.num_train_epochs
        precision = self.accelerator.mixed_precision
        cached = CachedTeacher(args, self.teacher, self.train_dataset, precision, math.ceil(seen))
        cached.check_early()
        return cached

    def _open_cache(self, cached: CachedTeacher) -> None:
        """Behind the neighbours, on which views depend; nothing is written before the training."""
        cached.use(self.train_dataset, show=self.args.process_index == 0)
        self.cached_teacher = cached
        self.add_callback(cached)

    def _bring_cached_rows(self) -> None:
        """From now on the views come with this teacher's embeddings: another trainer may have had the same views."""
        cached = self.cached_teacher
        self.train_dataset.teacher_cache = None
        if cached is None:
            return
        if not cached.knows(self.train_dataset):
            cached.use(self.train_dataset, show=self.args.process_index == 0)
        if self._prints_text() and not on_command_line():  # which has logged it, and Python shows no such messages
            print("\n".join(cached.description()), flush=True)
        cached.start()
        self.train_dataset.teacher_cache = cached.cache

    def _build(self, inputs: RunInputs, callbacks: list[TrainerCallback] | None, optimizers) -> None:
        """Build model, callbacks and all that ``Trainer`` needs."""
        student = inputs.student
        views = inputs.views
        evaluator = inputs.evaluator
        self.is_streaming = isinstance(views, StreamViews)
        count = None if self.is_streaming else len(views)
        self.length = inputs.args.run_length(count)
        self.teacher = inputs.teacher
        self._teacher_code = self.teacher.code()
        model = DistillationModel.from_args(student, self.teacher, inputs.args, count, inputs.criterion)
        if inputs.criterion is not None:
            try_criterion(model, self.teacher)
        args = inputs.args.resolved(
            self.length,
            has_evaluator=evaluator is not None,
            # What lies behind the last map compared gets no gradient.
            has_unused_parameters=student.maps > 0 or uses_maps(model.criterion),
        )
        self.cached_teacher: CachedTeacher | None = None
        self._evaluates_other_images = False
        if args.teacher_cache:
            epochs = getattr(views, "view_epochs", 0)
            maps = self.teacher.maps > 0
            check_cached(args.teacher_cache, loss_argument(args, inputs.criterion), view_epochs=epochs, reads_maps=maps)
        check_trackers(args.report_to)
        self._check_shared_memory(args, student, views, evaluator)
        self._prepare_networks(model, args)
        complete_optimizer(*optimizers, model)
        self.evaluator = evaluator
        self.monitor = LossMonitor(views.names)
        self._times = StepTimes(args.device)
        self.teacher_images = 0  # views that this process had its teacher embed, not those from a cache
        self.record: dict = {}
        self._recorded_in: set[str] = set()  # folders that got a first record
        self.publisher = HubPublisher(args)  # asked for the repository while Trainer is set up
        self._identity: dict[str, str] | None = None
        self._position: dict | None = None  # in a stream, after the last step
        self._stream_loader: StreamLoader | None = None
        use_precision(args)
        super().__init__(
            model,
            args,
            data_collator=collate_views,
            train_dataset=views,
            eval_dataset=None if evaluator is None else evaluator.test_images,
            processing_class=student.processor,
            callbacks=[*self._own_callbacks(args, views, evaluator), *(callbacks or [])],
            optimizers=optimizers,
        )
        print_lines(self, args.log_format, model.criterion)
        self.checkpoints = CheckpointWriter(args, self.accelerator.wait_for_everyone)
        use_own_trackers(self)
        self.preemption = Preemption()
        self._step_seed = StepSeed(args.seed, args.device)
        if args.torch_compile:
            self._compile_teacher()
        if self.is_fsdp_enabled:
            self._prepare_fsdp(model, args)

    def _own_callbacks(
        self, args: DistillationArguments, views: ViewDataset | StreamViews, evaluator: Evaluator | None
    ) -> list[TrainerCallback]:
        found: list[TrainerCallback] = [StreamCallback(views) if self.is_streaming else EpochCallback(views)]
        if evaluator is not None:
            found.append(DiagnosticsCallback(len(evaluator.test_images), last_step=args.evaluates_by_default))
        return [*found, WaitingCallback(self._most_workers, self.is_streaming)]

    def _prepare_fsdp(self, model: DistillationModel, args: DistillationArguments) -> None:
        # Autocast does mixed precision, as without FSDP: its own would round the loss as well.
        self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        name_blocks(model, model.network)
        self._unsharded = unsharded_copy(model).to(args.device)
        unshare(model.network)

    @property
    def methods(self) -> list[str]:
        """Names of the built-in methods that are trained by; of a loss of another kind there is none."""
        given = self._given.criterion
        if not isinstance(given, nn.Module):
            return [method.name for method in self.args.methods]
        return [name for name, loss in LOSSES.items() if type(given) is loss]

    @property
    def method(self) -> str:
        """The loss as records and the card name it."""
        given = self._given.criterion
        if not isinstance(given, nn.Module):
            return self.args.method
        return repr(given) if isinstance(given, DistillationLoss) else type(given).__name__

    def _loss_needs_embeddings_alone(self) -> bool:
        """Whether the loss of held-out images can be computed from their embeddings."""
        given = self._given.criterion
        if isinstance(given, nn.Module):
            return isinstance(given, DistillationLoss) and given.is_function_of_embeddings()
        return all(LOSSES[name].is_function_of_embeddings() for name in self.methods)

    def _check_evaluations(self) -> None:
        """Refuse a ``metric_for_best_model`` that evaluations during training do not measure, and a wrong interval."""
        args = self.args
        args.check_evaluations(self.length)
        wanted = (args.metric_for_best_model or "").removeprefix("eval_")
        if self.evaluator is None or args.eval_strategy == "no" or not wanted:
            return
        waiting = args.waiting_for_evaluations()
        if wanted == "overlap10" and not waiting:
            return  # the default, which few images do not have
        names = self._names_of_metrics()
        if wanted not in names:
            remedy = f"choose one of {', '.join(names)}"
            if wanted == "overlap10":
                remedy = f"{waiting} waits for it: hold out 11 images or more, or {remedy}"
            raise ValueError(f"--metric_for_best_model={wanted} is not measured during this training; {remedy}.")

    def _names_of_metrics(self) -> list[str]:
        """What evaluations during training measure."""
        names = self.evaluator.metric_names()
        if self.full_model.head is None and self.student.dim != self.teacher.dim:
            names = [name for name in names if name not in ("cosine", "dimension_cosine")]
        if self._loss_needs_embeddings_alone() and self._size_of_eval_batch(len(self.evaluator.test_images)):
            names.append("loss")
        return names

    def _check_shared_memory(
        self,
        args: DistillationArguments,
        student: Backbone,
        train_dataset: ViewDataset | StreamViews,
        evaluator: Evaluator | None,
    ) -> None:
        embeds = evaluator is not None or args.neighbors_k > 0
        pixels = pixels_to_embed(student, self.teacher) if embeds else 0
        batches = loader_batches(args, train_dataset.size, pixels)
        check_shared_memory(args.dataloader_num_workers, batches, args.dataloader_prefetch_factor)

    def _most_workers(self) -> int | None:
        """As many loader workers as can help; None where the machine was not looked at."""
        return None if self.settings.situation is None else most_workers(self.args, self.settings.situation)

    def _prepare_networks(self, model: DistillationModel, args: DistillationArguments) -> None:
        """Memory format and batch norm that ``args`` ask for, in place."""
        if args.exact_accumulation:
            check_deterministic_forward(model.network, model.student.size)
        if args.sync_batch_norm:
            synchronise_batch_norm(model.network, model.criterion)
        if args.channels_last:
            use_channels_last(model.network)
            use_channels_last(self.teacher.model)

    def _compile_teacher(self) -> None:
        args = self.args
        for backbone in (self.student, self.teacher):
            # Else the first step moves constants to the device, and all is compiled twice.
            backbone.normalize(torch.zeros(1, 3, 1, 1, dtype=torch.uint8, device=args.device))
        self._teacher_features = torch.compile(
            self._teacher_features, backend=args.torch_compile_backend, mode=args.torch_compile_mode
        )

    # ---- the networks ----

    @property
    def student(self) -> Backbone:
        """The student, without its head. Under FSDP as it was at the last evaluation or at the end of training."""
        return self.full_model.student

    @property
    def unwrapped_model(self) -> DistillationModel:
        """What is trained, without what accelerate and torch.compile put around it; under FSDP its parameters are
        sharded."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def full_model(self) -> DistillationModel:
        """The unsharded model: under FSDP a copy, as of the last ``collect``."""
        return self._unsharded if is_sharded(self.model) else self.unwrapped_model

    def _wait_for_first(self) -> None:
        """Wait for the first process, which may be at a report or an upload for longer than the run's group waits."""
        Processes().gather(None)

    def collect(self) -> None:
        """Make ``student`` and ``project`` the same on every process; all of them must call."""
        self._wait_for_first()
        broadcast_buffers(self.unwrapped_model.network)
        if is_sharded(self.model):
            gather(self.unwrapped_model, self._unsharded)

    @torch.no_grad()
    def project(self, embedding: Tensor) -> Tensor:
        """Map student embeddings ``(n, d_s)`` to the teacher's space ``(n, d_t)``, on the CPU."""
        return self.full_model.project(embedding.to(self.args.device)).cpu()

    # ---- training ----

    @parameter_names()
    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> TrainOutput:
        """Train the student, from the start or on from a checkpoint.

        A second call is a run of its own, of the student as the first one left it. As in ``transformers.Trainer`` the
        optimizer stays, with what it keeps of each parameter, and the schedule of the rate begins anew.

        Args:
            resume_from_checkpoint: see ``checkpoint_files.find_checkpoint``; default: that of ``args``.
            kwargs: as in ``transformers.Trainer``.

        Raises:
            ValueError: not a complete checkpoint, or one of another run.
            CheckpointError: a checkpoint could not be written; earlier ones are complete.
            LostWorker: a process that loads images ended; the message says what was saved.
            SystemExit: code 143 after SIGTERM or 130 after Ctrl-C, once a checkpoint is written.
        """
        if self.args.dry_run:
            return self._describe()
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        try:
            return self._train(resume_from_checkpoint, kwargs)
        finally:
            end_of_messages()

    def _train(self, resume_from_checkpoint: str | bool | None, kwargs: dict) -> TrainOutput:
        self._wait_for_first()
        checkpoint = self._claim_output_dir(resume_from_checkpoint)
        self._take_recorded_images(checkpoint)
        self._find_neighbors()
        self._bring_cached_rows()
        self._take_recorded_settings(checkpoint)
        self.check_checkpoint(checkpoint)
        self._show_settings()
        self._reset_measurements()
        state = None if checkpoint is None else read_state(checkpoint)
        if state is not None:
            if self.args.process_index == 0:
                if Path(checkpoint).parent == Path(self.args.output_dir):
                    set_damaged_aside(checkpoint)
                print(f"Resuming from {checkpoint}, step {state['global_step']}.", flush=True)
            if finished(state, self.args):
                return self._load_finished_run(checkpoint)
        else:
            self._start_afresh(resume_from_checkpoint)
        use_precision(self.args)
        self._position = self._position_in(checkpoint)
        self._keep_list_of_images(checkpoint)
        if self.preemption not in self.callback_handler.callbacks:  # behind all others, whose wishes it overrides
            self.add_callback(self.preemption)
        with self.preemption, self._lost_worker_as_error(), self._keeping_embeddings():
            result = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        self.preemption.leave(self.state.global_step, self.args.process_index)
        self.collect()
        if self._prints_text() and not on_command_line():
            can_report = self.splits is not None
            best = self.state.best_global_step if self.args.load_best_model_at_end else None
            text = next_lines(
                self.args.output_dir, self.state.log_history, self.state.global_step, best=best, can_report=can_report
            )
            print(text, flush=True)
        return result

    def _reset_measurements(self) -> None:
        """What an earlier training of this trainer left: its record, its losses, its clock and its count of views."""
        self.teacher_images = 0
        self.record = {}
        self._recorded_in = set()
        self.monitor.reset()
        self._times.reset()

    def _take_recorded_settings(self, checkpoint: str | None) -> None:
        """Those of the run to be resumed; before its checkpoint is compared, since a stream's workers have places."""
        taken = take_over(self.args, self.settings, recorded_settings(checkpoint))
        self.arguments |= {name: plain(value) for name, value in taken.items()}
        if self.is_streaming and self.train_dataset.workers != self.args.dataloader_num_workers:
            self.train_dataset.workers = self.args.dataloader_num_workers
            self._identity = None

    def _show_settings(self) -> None:
        """Unless the user has seen them, or wants lines for a program: ``run.json`` keeps them, too."""
        if self._prints_text() and not self.settings.shown:
            if self.settings.filled:
                print(self.settings.table(), flush=True)
            self.settings.shown = True

    def _prints_text(self) -> bool:
        """Whether this process prints, and for people to read: a study has taken the callback that prints away."""
        shows = {"ConsoleCallback", "NotebookProgressCallback"}  # by name, since importing the latter needs IPython
        prints = any(type(one).__name__ in shows for one in self.callback_handler.callbacks)
        return prints and self.is_world_process_zero() and self.args.log_format == "text"

    def _start_afresh(self, resume_from_checkpoint: str | bool | None) -> None:
        if self.args.overwrite_output_dir and self.args.process_index == 0:
            remove_pictures(self.args.output_dir)
        pretrain(self)
        if resume_from_checkpoint and self.args.process_index == 0:
            print(f"No complete checkpoint in {self.args.output_dir}: starting afresh.", flush=True)

    def _keep_list_of_images(self, checkpoint: str | None) -> None:
        """In the output folder, for a resume with the same images whatever happens to the files."""
        if self.splits is not None and self.splits.run_images is not None:
            with self.checkpoints.same_error_everywhere(self.args.output_dir):
                if self.args.process_index == 0:
                    self.splits.run_images.save(self.args.output_dir, replace=checkpoint is None)

    def _describe(self) -> TrainOutput:
        """What ``--dry_run`` prints, instead of a training with neighbours that were made up."""
        from coss_hf.trainer.dry_run import describe  # measures trainers

        text = describe(self, measure=True)  # on all processes: a loss may add up over them
        if self.is_world_process_zero():
            print(for_reader(text), flush=True)
        return TrainOutput(0, 0.0, {})

    def _claims_output_dir(self) -> bool:
        """Whether it is for ``train`` to look who uses the folder: a recipe did it before it read images."""
        return self._given.prepared is None and not self.args.dry_run

    def _claim_output_dir(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Return the checkpoint to resume from. A trainer that trains again must not mix two runs in its own folder."""
        found = self._prepared_checkpoint
        self._prepared_checkpoint = None
        if found is not None and resume_from_checkpoint in (found, self.args.resume_from_checkpoint):
            return found  # this process has had the folder to itself since
        if not self._claims_output_dir():
            return find_checkpoint(self.args.output_dir, resume_from_checkpoint)
        checkpoint = claim_output_dir(self.args, resume_from_checkpoint)
        remove_earlier_run(self.args, resume_from_checkpoint)
        return checkpoint

    def _take_recorded_images(self, checkpoint: str | None) -> None:
        """Begin again with the images that the run to be resumed began with, where others are there now.

        With ``args.resume_from_checkpoint`` they are there from the start; of ``train``'s own parameter it is known
        only here.
        """
        given = self._given
        if self.splits is None or isinstance(given.train_dataset, ImageSplits):
            return
        recorded = RunImages.of_checkpoint(checkpoint)
        if recorded is None or self.splits.run_images is None or recorded.same_as(self.splits.run_images):
            return
        added = self.callback_handler.callbacks
        args = copy.copy(given.args or DistillationArguments())
        args.resume_from_checkpoint = checkpoint
        self._set_up(self.teacher, self.student, args)
        present = {type(callback) for callback in self.callback_handler.callbacks}
        for callback in added:
            if type(callback) not in present:
                self.add_callback(callback)

    def _position_in(self, checkpoint: str | None) -> dict | None:
        """The place in a stream that a checkpoint was written at; None at the beginning, and for other images."""
        if checkpoint is None or not self.is_streaming:
            return None
        return load_position(checkpoint, self.args.process_index)

    def _load_finished_run(self, checkpoint: str) -> TrainOutput:
        """``Trainer`` would do one more step where a finished run ended in mid-epoch."""
        self.state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
        self._load_from_checkpoint(checkpoint)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        self.collect()
        return TrainOutput(self.state.global_step, float("nan"), {})

    def get_train_dataloader(self) -> DataLoader:
        self._find_neighbors()
        self._step_seed.restart()
        if self.is_streaming:
            self._stream_loader = StreamLoader(self.train_dataset, self.args, self._position)
            return self._stream_loader
        return super().get_train_dataloader()

    # ---- a step ----

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True):
        """accelerate puts autocast around every forward pass but those of FSDP2."""
        return self.accelerator.autocast() if self.is_fsdp_enabled else super().autocast_smart_context_manager()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        views = inputs["pixel_values"]
        if self.monitor.start_clock(self.images_seen):
            self._times.reset()
        if self.args.torch_compile:
            torch.compiler.cudagraph_mark_step_begin()  # else the student's graph takes the teacher's memory
        if model.training:
            self._step_seed.apply(self.state.global_step)
        exact = "other_totals" in inputs
        teacher = Features(**inputs["teacher"]) if exact else self.teacher_features(inputs)
        outputs = model(
            pixel_values=views, teacher=teacher, index=inputs["index"], other_totals=inputs.get("other_totals")
        )
        loss = outputs["loss"]
        finite = outputs.pop("finite")
        parts = {name: value for name, value in outputs.items() if name != "loss"}
        self.monitor.record(self.state.global_step + 1, loss, parts, inputs["index"], finite)
        if exact and model.training:
            loss = scale_gradient(loss, self.current_gradient_accumulation_steps)
        return (loss, outputs) if return_outputs else loss

    def _place_teacher(self) -> None:
        if next(self.teacher.model.parameters()).device != self.args.device:
            self.teacher.model.to(self.args.device)

    @contextlib.contextmanager
    def teacher_in_place(self):
        """On the device meanwhile; one that was put aside for a cache is put aside again."""
        before = next(self.teacher.model.parameters()).device
        self._place_teacher()
        try:
            yield
        finally:
            self.teacher.model.to(before)

    @torch.no_grad()
    def teacher_features(self, batch: dict) -> Features:
        """Return the teacher's features of a batch's views, from the cache where they are there."""
        if self.cached_teacher is None or "cached" not in batch:
            return self.embed_teacher(batch["pixel_values"])
        return self.cached_teacher.features(batch, self.embed_teacher)

    @torch.no_grad()
    def embed_teacher(self, views: Tensor) -> Features:
        """Return the teacher's features of ``views`` ``(b, 3, H, W)``, uint8, as a step takes them."""
        self._place_teacher()  # another trainer may have put it aside
        self.teacher_images += len(views)
        with self._times.teacher(), self.accelerator.autocast():
            return self._teacher_features(views)

    def _teacher_features(self, views: Tensor) -> Features:
        dtype = next(self.teacher.model.parameters()).dtype
        return self.teacher.features(self.teacher.normalize(views).to(dtype))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, count = self._load_batches(epoch_iterator, num_batches, device)
        if self.is_streaming:
            self._position = self._stream_loader.position
        if self.args.exact_accumulation:
            with self.accelerator.autocast():
                attach_other_totals(self.model_wrapped, batches, self._teacher_features_of_loss, all_reduce_sum)
        return batches, count

    def _teacher_features_of_loss(self, batch: dict) -> Features:
        return read_by(self.unwrapped_model.criterion, self.teacher_features(batch))

    def _load_batches(self, epoch_iterator, num_batches, device):
        """As ``Trainer`` does. If a loader worker of any process ended, save the steps so far: none has begun."""
        lost = None
        try:
            with self._times.waiting():
                loaded = super().get_batch_samples(epoch_iterator, num_batches, device)
        except WORKER_ERRORS as error:
            if self.args.dataloader_num_workers == 0 or not is_lost_worker(error):
                raise
            lost = error
        if self.args.dataloader_num_workers == 0 or not any_process(lost is not None):
            return loaded
        step = self.state.global_step
        if step > 0 and incomplete(Path(self.args.output_dir, f"checkpoint-{step}")) is not None:
            self._save_checkpoint(self.model, trial=None)
        saved = f"step {step} is saved; give the same command with --resume_from_checkpoint" if step else None
        raise LostWorker(lost, saved) from lost

    @contextlib.contextmanager
    def _keeping_embeddings(self):
        """What the teacher embedded is kept, however the training ends; who uses the teacher next finds it in place."""
        try:
            if self.cached_teacher is not None:
                self.teacher.model.to("cpu")  # the first row that is missing brings it back
            yield
        finally:
            if self.cached_teacher is not None:
                self.cached_teacher.flush()
                self._place_teacher()

    @contextlib.contextmanager
    def _lost_worker_as_error(self):
        try:
            yield
        except WORKER_ERRORS as error:
            if isinstance(error, RunStopped) or not is_lost_worker(error):
                raise
            earlier, _ = newest_complete(self.args.output_dir)
            saved = f"{earlier} is complete; give the same command with --resume_from_checkpoint" if earlier else None
            raise LostWorker(error, saved) from error

    # ---- optimizer and schedule ----

    def get_decay_parameter_names(self, model) -> list[str]:
        if self.args.weight_decay_on == "all":
            return [name for name, _ in model.named_parameters()]
        return matrices(model)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if optimizer is torch.optim.SGD:
            kwargs["momentum"] = args.momentum
        return optimizer, kwargs

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None and self.args.lr_milestones:
            drops = [round(epoch * self.length.steps_per_epoch) for epoch in self.args.lr_milestones]
            warmup = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = milestone_schedule(optimizer or self.optimizer, drops, self.args.lr_gamma, warmup)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_grad_norm(self, model, grad_norm=None):
        """Only where it is logged: it is a pass over all parameters."""
        step = self.state.global_step + 1
        by_steps = self.args.logging_strategy == IntervalStrategy.STEPS
        is_first = step == 1 and self.args.logging_first_step
        if by_steps and step % self.state.logging_steps and not is_first:
            return grad_norm
        return super()._get_grad_norm(model, grad_norm)

    # ---- logs ----

    @property
    def images_seen(self) -> int:
        """Images of all optimizer steps so far, anchors and neighbours alike."""
        return self.length.images_after(self.state.global_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.monitor.check_finite()
        if "loss" in logs and self.monitor.has_means():
            logs |= self.monitor.means(lambda means: self.accelerator.reduce(means, reduction="mean"))
            seconds = self.monitor.seconds()
            rate = self.monitor.images_per_second(self.images_seen)
            if rate is not None:
                logs["images_per_second"] = rate
                logs |= self._times.shares(seconds)
        logs["images_seen"] = self.images_seen
        super().log(logs, start_time)
        if self._evaluates_other_images:
            self.state.log_history[-1][OF_OTHER_IMAGES] = True

    # ---- evaluation ----

    @parameter_names()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Measure the student, and log it.

        Figures of other images than the trainer's own are logged as well, and are left out of alarms, verdict and
        report, which compare the student with itself before the training.

        Args:
            eval_dataset: images to measure it on instead of those that the trainer was made with: a ``Dataset``,
                ``DatasetDict``, name or folder; or a dictionary of several, whose names come into those of the metrics.
            ignore_keys: not used.
            metric_key_prefix: how the names of metrics begin.

        Raises:
            ValueError: no such images, or the trainer was made without any.
        """
        if isinstance(eval_dataset, dict) and not isinstance(eval_dataset, (DatasetDict, IterableDatasetDict)):
            found = {}
            for name, images in eval_dataset.items():
                found |= self.evaluate(images, ignore_keys, f"{metric_key_prefix}_{name}")
            return found
        before = self.evaluator, self.eval_dataset
        if eval_dataset is not None:
            self.evaluator = evaluator_of(self, eval_dataset, self._given.data)
            self.eval_dataset = self.evaluator.test_images
        try:
            self._evaluates_other_images = eval_dataset is not None
            return super().evaluate(None, ignore_keys, metric_key_prefix)
        finally:
            self.evaluator, self.eval_dataset = before
            self._evaluates_other_images = False

    @parameter_names()
    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test") -> PredictionOutput:
        """Measure the student on other images, as ``evaluate`` does; there are no predictions to return.

        Args:
            test_dataset: the images, in any form that ``evaluate`` takes.
            ignore_keys: not used.
            metric_key_prefix: how the names of metrics begin.

        Returns:
            ``metrics``; ``predictions`` and ``label_ids`` are None. ``coss_hf.embed`` gives embeddings.

        Raises:
            ValueError: no such images.
        """
        if test_dataset is None:
            raise ValueError("--test_dataset is missing: give images, or call evaluate for those of the trainer.")
        metrics = self.evaluate(test_dataset, ignore_keys, metric_key_prefix)
        return PredictionOutput(predictions=None, label_ids=None, metrics=metrics)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """Only counted by ``evaluate``: the evaluator reads the images, every one of them, itself."""
        return DataLoader(eval_dataset if eval_dataset is not None else self.eval_dataset)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        if self.evaluator is None:
            raise ValueError(
                "There are no images to evaluate on: give evaluate or the trainer an eval_dataset, or hold some out of "
                "train by --validation_size."
            )
        self.collect()
        with self.teacher_in_place():
            metrics, projected = self.evaluator(self.student, self.project)
            processes = Processes()
            if self._loss_needs_embeddings_alone():
                # Another process may have failed to read an image: each takes its part of the same batches.
                readable = processes.gather(self.evaluator.test_readable)
                self.evaluator.test_readable = torch.stack(readable).all(0)
                metrics["loss"] = self._eval_loss(projected)
        # They decide what all do together (the best student, the rate, the end), and devices round differently.
        metrics = processes.gather(metrics)[0]
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items() if value is not None}
        self.monitor.stop_clock()
        return EvalLoopOutput(
            predictions=None, label_ids=None, metrics=named, num_samples=len(self.evaluator.test_images)
        )

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        """The evaluation at the start is what training is compared with: a resumed run has it in its history."""
        if skip_scheduler and self.state.global_step > 0:
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    @torch.no_grad()
    def _eval_loss(self, projected: Tensor) -> float | None:
        """Mean loss over held-out batches of the training size, un-augmented, of which each process takes its part.

        The images are in one random order, the same on all processes and at every evaluation: folders are sorted by
        class, and a loss that compares the images of a batch would be that of batches of one class.

        None with fewer readable images than processes.
        """
        criterion = self.full_model.criterion
        rows = self.evaluator.test_readable.nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
        rank = self.args.process_index
        world = self.args.world_size
        size = self._size_of_eval_batch(len(rows))
        if not size:
            return None
        tensors = projected[rows], self.evaluator.teacher_test_features[rows], rows
        batches = [x.to(self.args.device).split(size) for x in tensors]
        training = criterion.training
        criterion.eval()
        losses = [
            criterion(Features(student[rank::world]), Features(teacher[rank::world]), index[rank::world])["loss"]
            for student, teacher, index in zip(*batches, strict=True)
            if len(index) == size
        ]
        criterion.train(training)
        # Of a loss of single images, each process knows its own part; of others, each knows that of the full batch.
        return self.accelerator.reduce(torch.stack(losses).mean(), "mean").item()

    def _size_of_eval_batch(self, images: int) -> int:
        """Images of a held-out batch, of all processes; 0 where these are too few for a loss."""
        world = self.args.world_size
        size = min(self.args.images_per_batch, images) // world * world
        # A batch of one image has nothing to be compared with.
        compares = any(getattr(part, "couples_images", False) for part in summands(self.full_model.criterion))
        return size if size >= 1 + compares else 0

    @parameter_names()
    def compare(self) -> dict[str, dict]:
        """Measure teacher, student and the same student at random weights on the images held out, each once.

        Images of the test split where there are some, else the held-out images of the training.

        Returns:
            Metrics of ``teacher``, ``student`` and ``random``; empty without such images.
        """
        self._place_teacher()
        return compare(self)

    @parameter_names()
    def report(self) -> RunReport | None:
        """Compare, and write record, pictures, page and model card to ``args.output_dir``.

        After ``train`` and ``save_model``. The first process works; the others return None at once. The record's
        ``results`` are empty without test or validation images.

        Trackers are told, too, and their runs end. From a recipe they are told after the push. With ``log_format``
        ``text``, the table, the verdict, and lines that use the student are printed.

        Raises:
            CheckpointError: the disk is full.
        """
        made = self.write_report()
        if made is not None:
            if self.args.log_format == "text":
                print(self.closing_summary(made.record, in_python=True), flush=True)
            report_end_of_run(self, made)
        return made

    def closing_summary(self, record: dict, *, in_python: bool = False) -> str:
        """What is printed at the end of a run: see ``reporting.closing``."""
        return closing_summary(
            self.args.output_dir,
            record,
            in_teacher_space=self.student.model.config.teacher_space is not None,
            from_module=isinstance(self.student.model, ModuleNetwork),
            own_code=has_own_code(self.student.model.config) or brings_code(self.student.processor),
            in_python=in_python,
        )

    def write_report(self) -> RunReport | None:
        """See ``report``; trackers are not told."""
        self._find_neighbors()  # on all processes: the page names them
        self._place_teacher()
        return report(self)

    # ---- saving ----

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self.monitor.check_finite()
        if not self.args.should_save:
            return
        model = self.unwrapped_model
        save_student(
            output_dir or self.args.output_dir,
            model,
            self.args,
            model.state_dict() if state_dict is None else state_dict,
            self.state.global_step,
        )

    @parameter_names()
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student as ``transformers.Trainer`` does.

        Raises:
            CheckpointError: on every process, where one could not write; before any of them waits for another.
            NotReloadable: on the first process; what was saved does not load as the student, and is left as it is.
        """
        if not _internal_call:
            self._wait_for_first()
        with self.checkpoints.same_error_everywhere(output_dir or self.args.output_dir):
            if self.is_deepspeed_enabled and self.deepspeed is None:  # a finished run: nothing was wrapped
                self._save(output_dir)
            else:
                super().save_model(output_dir, _internal_call=True)
        if not _internal_call:
            self._write_first_record(output_dir or self.args.output_dir)
            self.check_reload(output_dir or self.args.output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _write_first_record(self, folder: str) -> None:
        """What the student came from, until ``report`` adds what it came to; once in each folder."""
        if not self.is_world_process_zero() or self.splits is None:
            return
        if self.record.get("images_seen") != self.images_seen:
            self._recorded_in = set()
            self.record = write_record(folder, self, {}, self.splits)
        elif folder not in self._recorded_in:
            write_json(Path(folder, "run.json"), self.record)
        self._recorded_in.add(folder)

    def check_reload(self, folder: str) -> None:
        """Load what was saved as anybody would, on the first process, and compare it with the student.

        Args:
            folder: that the student was saved to.

        Raises:
            NotReloadable: what was saved does not load as the student.
        """
        if self.is_world_process_zero():
            if self.is_streaming:
                rows = self.splits.train
                column = self.splits.image_column
            else:
                rows = self.train_dataset.reader.rows
                column = self.train_dataset.reader.column
            check_reload(folder, self.student, self.full_model.head, rows, column)

    def _finalize_training(self, *args, **kwargs):
        """Without its removal of all checkpoints but the best one: a run resumes from the last."""
        limit = self.args.save_total_limit
        self.args.save_total_limit = None
        try:
            result = super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        if self.args.push_to_hub:  # what stayed while it was pushed
            self._rotate(Path(self._get_output_dir(trial=None)))
        return result

    def _save_checkpoint(self, model, trial) -> None:
        """Like ``Trainer``'s, which writes in place: a run killed there would leave half a checkpoint."""
        self.store_flos()
        run_dir = Path(self._get_output_dir(trial=trial))
        final = run_dir / f"checkpoint-{self.state.global_step}"
        with self.checkpoints.atomic(final, manifest=True) as folder:
            self._write_checkpoint(str(folder), final)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        self._rotate(run_dir)

    def _rotate(self, run_dir: Path) -> None:
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate(run_dir, self.args.save_total_limit, best, self.publisher.pushed_folders())

    def _write_checkpoint(self, folder: str, final: Path) -> None:
        self.save_model(folder, _internal_call=True)
        best = self.state.best_global_step
        if best and (best == self.state.global_step or final.with_name(f"checkpoint-{best}").exists()):
            self.state.best_model_checkpoint = str(final.with_name(f"checkpoint-{best}"))
        save_training_state(self, folder)
        self._save_images(folder)
        if not self.args.should_save:
            return
        record = self.identity() | {RECORDED: values_to_record(self.args)}
        Path(folder, RECORD).write_text(json.dumps(record, indent=2))
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self._store_callback_state(callback)
        self.state.save_to_json(os.path.join(folder, "trainer_state.json"))

    def _save_images(self, folder: str) -> None:
        """What each process knows of the images: its place in a stream, or the contents of the files that it read."""
        os.makedirs(folder, exist_ok=True)  # by the first process, or not yet
        if self.is_streaming:
            save_position(folder, self._position, self.args.process_index)
        elif self.splits is not None and self.splits.run_images is not None and self.train_dataset.is_by_file:
            contents = self.train_dataset.read_contents()
            self.splits.run_images.save_contents(folder, contents, self.args.process_index)

    def _store_callback_state(self, callback: ExportableState) -> None:
        states = self.state.stateful_callbacks
        name = type(callback).__name__
        if isinstance(states[name], list):
            states[name].append(callback.state())
        else:
            states[name] = callback.state()

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        """Like ``Trainer``'s, and keeps the best student so far in ``best/``, whatever checkpoints are written."""
        name = f"eval_{(self.args.metric_for_best_model or '').removeprefix('eval_')}"
        if name == "eval_overlap10" and name not in metrics:  # too few images; it was not asked for
            return False
        better = super()._determine_best_metric(metrics, trial)
        if better:
            with self.checkpoints.atomic(Path(self._get_output_dir(trial=trial), BEST)) as folder:
                self.save_model(str(folder), _internal_call=True)
        return better

    # ---- resuming ----

    def identity(self, search: bool = True) -> dict[str, str]:
        """What must be the same for a run to be resumed; each entry under the argument that decides it.

        Args:
            search: whether to find the neighbours first, where that was put off; all processes do it together. Without
                it they are left out until they are known.
        """
        if search:
            self._find_neighbors()
        if self._identity is None:
            model = self.unwrapped_model
            self._identity = {
                "--teacher": self.teacher.fingerprint(),
                **code_entry(TEACHER_CODE, self._teacher_code),
                "--student": f"{type(model.network).__name__} {shapes(model.network)}",
                "--head": "none" if model.head is None else shapes(model.head),
                "--method": self.method
                + "".join(
                    f", revision {loss.revision} of {loss.name}"
                    for loss in summands(model.criterion)
                    if getattr(loss, "revision", 1) > 1
                ),
                "--seed": str(self.args.seed),
                "--per_device_train_batch_size": f"{self.args.images_per_step} images per step",
                **classifier_identity(model.criterion),
            }
            self._identity |= self.train_dataset.identity() | self._order_of_images()
        if self._has_neighbors:
            return self._identity
        found = self._identity
        self._identity = None
        return {name: value for name, value in found.items() if name != "--neighbors_k"}

    def _order_of_images(self) -> dict[str, str]:
        """What decides which images each step sees; a stream has an order and places of its own."""
        if self.is_streaming:
            return {}
        args = self.args
        steps = self.length.steps_per_epoch
        return {
            "--data_seed": str(args.seed if args.data_seed is None else args.data_seed),
            "--train_sampling_strategy": str(args.train_sampling_strategy),
            # Micro-batches of another size may leave out another number of images at the end of an epoch.
            STEPS_OF_EPOCH: f"{steps} steps, {self.length.images_after(steps)} images per epoch",
        }

    def find_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Return the checkpoint to resume from, checked; None for a fresh start.

        Raises:
            ValueError: not a complete checkpoint, one of another run, or one without the state of its training.
        """
        checkpoint = find_checkpoint(self.args.output_dir, resume_from_checkpoint)
        self.check_checkpoint(checkpoint)
        return checkpoint

    def check_checkpoint(self, checkpoint: str | None) -> None:
        """Refuse to resume from a complete checkpoint that this run cannot continue.

        Args:
            checkpoint: its folder; None for a fresh start, which is never refused.

        Raises:
            ValueError: one of another run, or one without the state of its training.
        """
        if checkpoint is not None:
            check_identity(checkpoint, self.identity())
            check_training_state(checkpoint, self.args)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        model = self.accelerator.unwrap_model(self.model if model is None else model, keep_torch_compile=False)
        load_student(model, type(self.student.model), resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:  # of torch, before it loads anything
            if "parameter group" not in str(error):
                raise
            if self._given.optimizers[0] is not None:
                raise ValueError(
                    f"--resume_from_checkpoint={checkpoint}: there the optimizer has other parameter groups than the "
                    f"{len(self.optimizer.param_groups)} of the optimizer that --optimizers gives, the last of which "
                    f"may be the trainer's, for a projection head or what a loss learns ({first_line(error)}); give "
                    f"an optimizer of the same groups, continue with the version of coss_hf that the run was begun "
                    f"with (earlier ones added no group), or start afresh in another --output_dir."
                ) from error
            raise ValueError(
                f"--resume_from_checkpoint: in the run that is resumed weight decay was for other parameters than "
                f"--weight_decay_on={self.args.weight_decay_on} names now; continue with the version of coss_hf "
                f"that it was begun with, or start afresh in another --output_dir."
            ) from error

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        damage = Processes().gather(incomplete(best) if self.args.process_index == 0 else None)[0]
        if damage is None:
            self._load_from_checkpoint(best)
        elif self.args.process_index == 0:  # the last student is better than none
            logger.warning(
                "%s cannot be loaded as the best student: %s. The student of the last step stays.", best, damage
            )

    # ---- the Hub ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository.

        Raises:
            ValueError: no valid name, no or a wrong token, a repository of somebody else.
        """
        if self.is_world_process_zero():
            self.hub_model_id = self.publisher.open_repo(token, private)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero() and self.publisher.wants_checkpoints():
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            self.publisher.push_checkpoint(checkpoint_folder, self.hub_model_id, self.images_seen)

    def _finish_current_push(self) -> None:
        self.publisher.wait()
        if self.args.push_to_hub:
            self._wait_for_first()

    @parameter_names()
    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """Save the student, write its card (``kwargs``) and push; all processes together.

        It always waits for the end of the upload. Returns the commit, on the first process.

        Raises:
            ValueError: a repository in place of the message of the commit.
            PushFailed: the student is on disk; the message says how to push it.
        """
        if commit_message and re.fullmatch(r"[\w.-]+/[\w.-]+", commit_message):
            raise ValueError(
                f"--commit_message={commit_message!r} looks like a repository: give that as --hub_model_id of the "
                f"trainer's arguments."
            )
        self._wait_for_first()
        self.save_model(_internal_call=True)
        self._write_first_record(self.args.output_dir)
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.create_model_card(**kwargs)
        return self.push_output_dir(commit_message, token, revision, private)

    def push_output_dir(
        self,
        commit_message: str | None = None,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ):
        """Push what is in the output folder; on the first process alone. See ``push_to_hub``."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = commit_message or f"Student, {self.images_seen:,} images seen"
        return self.publisher.push_output_dir(self.hub_model_id, message, token, revision, private)

    @parameter_names()
    def create_model_card(self, model_name: str | None = None, record: dict | None = None, **metadata) -> None:
        """Write ``README.md`` next to the student.

        Args:
            model_name: title; default: the repository's or the folder's name.
            record: what ``run.json`` holds; default: that of the last ``report``.
            metadata: ``license``, ``language`` and ``tags`` of the student.
        """
        if self.is_world_process_zero():
            write_card(self, model_name, self.record if record is None else record, metadata)
