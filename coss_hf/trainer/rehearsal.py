"""Arguments tried on two images of noise, before images and neighbours are worked on for hours."""

import contextlib
import copy
import logging
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import DefaultFlowCallback, Trainer, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from coss_hf.data.views import ViewDataset
from coss_hf.features import Features
from coss_hf.models.backbone import Backbone
from coss_hf.models.loading import quiet_loading
from coss_hf.trainer import settings
from coss_hf.trainer.cached_teacher import check_cached
from coss_hf.trainer.callbacks.epoch import EpochCallback
from coss_hf.trainer.conflicting_inputs import made_views
from coss_hf.trainer.distillation_model import loss_argument, losses_of, reads_maps
from coss_hf.trainer.given_arguments import COMPILATION, ENGINE, LOADER, OPTIMIZER, SCHEDULE, STEP, refused
from coss_hf.trainer.inputs import view_size
from coss_hf.trainer.reloading import check_before_training
from coss_hf.trainer.trainer import DistillationTrainer
from coss_hf.trainer.training_args import DistillationArguments
from coss_hf.utils.messages import first_line, parameter_names
from coss_hf.utils.process_group import Processes

STEPS = 100  # of the schedule that is tried


class _AnyLoss(nn.Module):
    """A loss that takes any batch, in place of the run's own: the rest of the arguments is tried with it."""

    def forward(self, student: Features, teacher: Features, index: Tensor) -> dict[str, Tensor]:
        return {"loss": student.embedding.float().square().mean() + 0 * teacher.embedding.float().mean()}


@parameter_names()
def rehearse(
    student: Backbone, teacher: Backbone, args: DistillationArguments, criterion: nn.Module | None = None
) -> None:
    """Build loader, trackers, optimizer and schedule of a run, and make one step on noise, of a copy of the student.

    Args:
        student: to be trained; left as it is.
        teacher: frozen; moved to the run's device, but back again where the run has a cache of its embeddings.
        args: of the training.
        criterion: a loss instead of ``args.method``; the step on noise is made without it.

    Raises:
        ValueError: what could not be built or done, the arguments that were given for it, and why; an image processor
            of the student that cannot be saved; a student that would not load as what was saved.
    """
    if args.gradient_checkpointing and not student.model.supports_gradient_checkpointing:
        raise ValueError(
            f"--gradient_checkpointing: the student ({type(student.model).__name__}) does not support it; leave it out."
        )
    if args.teacher_cache:
        maps = reads_maps(student, teacher, losses_of(args, criterion))
        check_cached(args.teacher_cache, loss_argument(args, criterion), view_epochs=args.view_epochs, reads_maps=maps)
    short = short_arguments(args)
    # What changes a network in place must not change the teacher, which is not a copy; nor has the loss any totals.
    short.dry_run = True  # looks for the Hub's repository without creating it: the images may yet be refused
    short.channels_last = False
    short.exact_accumulation = False
    short.num_images = None
    short.neighbors_k = 0
    short.lr_milestones = None
    short.teacher_cache = None
    copied = copy.copy(student)
    try:
        copied.model = copy.deepcopy(student.model)
    except Exception as error:  # code of any origin
        raise ValueError(
            f"--student={student.name}: no copy of it can be made to try a step with ({first_line(error)}); give a "
            f"network that copy.deepcopy takes."
        ) from error
    is_sharded = bool(args.fsdp) or args.deepspeed_plugin is not None  # loading can leave weights empty
    if not is_sharded:
        copied.model.to(args.device)  # some kernels of attention need it
    with Processes().together():
        if args.process_index == 0:  # each copy takes space on the disk
            check_before_training(copied, copies=not is_sharded)
    views = noise_views(short, args.augmentation, view_size(args, student, teacher))
    # Views of noise are made otherwise than those of the run.
    for name in ("view_size", "view_seed", "view_epochs", "reduced_decoding"):
        setattr(short, name, made_views(views)[name])
    before = next(teacher.model.parameters()).device
    try_trainer(short, lambda: DistillationTrainer(copy.copy(teacher), copied, short, views, criterion=_AnyLoss()))
    if args.teacher_cache:  # it may never embed again
        teacher.model.to(before)


def short_arguments(args: TrainingArguments) -> TrainingArguments:
    """Arguments of one small step that evaluates, saves and deletes nothing; values that are too small stay."""
    args = copy.copy(args)
    args.per_device_train_batch_size = min(args.per_device_train_batch_size, 2)
    args.gradient_accumulation_steps = min(args.gradient_accumulation_steps, 1)
    needs_workers = args.dataloader_prefetch_factor or args.dataloader_persistent_workers
    workers = args.dataloader_num_workers
    args.dataloader_num_workers = int(bool(needs_workers)) if workers is None else min(workers, 1)
    args.max_steps = 1
    args.save_strategy = SaveStrategy.NO
    args.save_total_limit = None  # in the folder are the checkpoints of the run that is resumed
    args.eval_strategy = IntervalStrategy.NO
    args.eval_on_start = False
    args.load_best_model_at_end = False
    args.resume_from_checkpoint = None  # one step of noise begins anew
    return args


def noise_views(args: TrainingArguments, augmentation: str, size: int) -> ViewDataset:
    """Views ``size`` x ``size`` of as many images of noise as a step of ``args`` takes."""
    count = args.world_size * max(args.per_device_train_batch_size, 1)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    columns = {"image": [Image.fromarray(image) for image in pixels], "image_hash": [str(i) for i in range(count)]}
    features = datasets.Features({"image": datasets.Image(), "image_hash": datasets.Value("string")})
    return ViewDataset(datasets.Dataset.from_dict(columns, features=features), "image", augmentation, size)


def try_trainer(args: TrainingArguments, build: Callable[[], Trainer]) -> None:
    """Build a trainer of one step and let it make that step, part by part, so that an error names its part.

    Args:
        args: of ``short_arguments``.
        build: makes the trainer, whose network is thrown away.

    Raises:
        ValueError: what could not be built or done, the arguments that were given for it, and why.
    """
    with _quiet(), _removing_empty(Path(args.output_dir)):
        with _refusing(args, ENGINE, "Trainer cannot be set up"):
            trainer = build()
        kept = (DefaultFlowCallback, EpochCallback)  # none that would report the step
        trainer.callback_handler.callbacks = [c for c in trainer.callback_handler.callbacks if isinstance(c, kept)]
        if args.torch_compile:
            with _refusing(args, COMPILATION, "networks cannot be compiled"):
                _try_compilation(args)
        with _refusing(args, LOADER, "the data loader cannot be used"):
            next(iter(trainer.get_train_dataloader()))
        with _refusing(args, OPTIMIZER, "the optimizer cannot be built"):
            trainer.create_optimizer()
        with _refusing(args, SCHEDULE, "the schedule of the learning rate cannot be built"):
            _try_schedule(trainer.create_scheduler(STEPS))
        trainer.optimizer = None
        trainer.lr_scheduler = None
        # Networks are sharded and compiled once, for the run itself.
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or args.torch_compile):
            with _refusing(args, STEP, "a first step on two images of noise fails"):
                trainer.accelerator.free_memory = lambda: None  # collecting garbage takes longer than the step
                Trainer.train(trainer)  # not the run's own, which handles SIGTERM
        if args.device.type == "cuda":
            torch.cuda.empty_cache()


def _try_compilation(args: TrainingArguments) -> None:
    compiled = torch.compile(lambda x: x + 1, backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    compiled(torch.ones(2, device=args.device))


def _try_schedule(scheduler) -> None:
    if not isinstance(scheduler, LambdaLR):
        return
    for step in (0, 1, STEPS // 2, STEPS - 1, STEPS):
        for factor in scheduler.lr_lambdas:
            if not math.isfinite(factor(step)):
                raise ValueError(f"the rate is {factor(step)} at step {step} of {STEPS}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of a step that is made twice, and of objects that could not be made."""
    hook = sys.unraisablehook
    # The end of a command by a signal is one, too, see ``utils.ending``.
    sys.unraisablehook = lambda one: hook(one) if isinstance(one.exc_value, SystemExit) else None
    try:
        with quiet_loading(), _quiet_settings(), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        sys.unraisablehook = hook


@contextlib.contextmanager
def _quiet_settings() -> Iterator[None]:
    """The run itself says what its settings are."""
    level = settings.logger.level
    settings.logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        settings.logger.setLevel(level)


@contextlib.contextmanager
def _removing_empty(folder: Path) -> Iterator[None]:
    """Remove ``folder`` afterwards, which Trainer makes, where it was not there before."""
    existed = folder.exists()
    try:
        yield
    finally:
        if not existed:
            with contextlib.suppress(OSError):  # not made, or not empty
                folder.rmdir()


@contextlib.contextmanager
def _refusing(args: TrainingArguments, names: tuple[str, ...], problem: str) -> Iterator[None]:
    """Turn any error of the block into a ``ValueError`` that names arguments; one that names its own is passed on."""
    try:
        yield
    except Exception as error:  # of Trainer, accelerate, and any package that they import
        traceback.clear_frames(error.__traceback__)  # destructors of what is half made complain here, or never
        raise refused(args.given, names, problem, error) from error
