"""Supervised training of a teacher on labelled images."""

import copy
import json
import math
import os
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from time import monotonic

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import TrainOutput, get_last_checkpoint, rotate_checkpoints

from coss_hf.data.labels import class_numbers
from coss_hf.data.loading import ImageSplits
from coss_hf.data.processed_images import ProcessedImages
from coss_hf.data.run_images import RunImages
from coss_hf.data.transforms import AUGMENTATIONS
from coss_hf.data.views import ViewDataset, collate_views
from coss_hf.models.backbone import Backbone
from coss_hf.models.cifar.classifier import load_classifier
from coss_hf.reporting.run_record import command, versions, write_json
from coss_hf.trainer.arguments import DataArguments
from coss_hf.trainer.callbacks.console import print_lines
from coss_hf.trainer.callbacks.epoch import EpochCallback
from coss_hf.trainer.callbacks.preemption import Preemption
from coss_hf.trainer.checkpoint_files import (
    RECORD,
    STEPS_OF_EPOCH,
    check_identity,
    check_training_state,
    enter_output_dir,
    find_checkpoint,
    holds_run,
    remove_earlier_run,
    shapes,
)
from coss_hf.trainer.checkpointing import CheckpointWriter, save_training_state, without_token
from coss_hf.trainer.engine import check_graphs, check_processes
from coss_hf.trainer.given_arguments import (
    ENGINE,
    check_numbers,
    check_order_of_images,
    given,
    recording_derived,
    refused,
    resolve_saving,
)
from coss_hf.trainer.rehearsal import noise_views, short_arguments, try_trainer
from coss_hf.trainer.schedule import RunLength
from coss_hf.utils.distributed import leave
from coss_hf.utils.messages import parameter_names
from coss_hf.utils.process_group import Processes
from coss_hf.utils.randomness import StepSeed

TRAINING_TIME = "training_time.json"


@dataclass
class TrainingTime:
    """How long a training has taken, over all its parts: each checkpoint keeps the time that led to it.

    The time of steps that were lost, because a later checkpoint was not written, is not in it.

    Attributes:
        seconds: time of the parts before this one, up to the checkpoint that it was resumed from.
        started: when this part began, on the clock of ``time.monotonic``.
    """

    seconds: float = 0.0
    started: float = 0.0

    @classmethod
    def start(cls, checkpoint: str | None) -> "TrainingTime":
        """Start the clock of a part.

        Args:
            checkpoint: the one that is resumed from; None for a fresh start.
        """
        if checkpoint is None:
            return cls(started=monotonic())
        kept = json.loads(Path(checkpoint, TRAINING_TIME).read_text())
        return cls(kept["seconds"], started=monotonic())

    def total(self) -> float:
        """Return the seconds of all parts, up to now."""
        return self.seconds + monotonic() - self.started

    def save(self, folder: Path) -> None:
        """Write the time so far next to the state of the training."""
        Path(folder, TRAINING_TIME).write_text(json.dumps({"seconds": self.total()}))


@dataclass
class TeacherArguments(TrainingArguments):
    """``transformers.TrainingArguments`` with the method's defaults."""

    output_dir: str = field(
        default="teacher", metadata={"help": "Folder to which the network and its image processor are written."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace a network that is already in --output_dir."}
    )
    model: str | None = field(
        default=None, metadata={"help": "Network to train: resnet56, resnet32x4, ..., or a Hub name or folder."}
    )
    hidden_sizes: list[int] | None = field(
        default=None,
        metadata={"help": "Numbers of channels of the stages of a CIFAR network. Default: those of its name."},
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Side of the input in pixels. Default: that of the checkpoint, or 32 for a CIFAR network."},
    )
    mean: list[float] | None = field(
        default=None, metadata={"help": "Mean of the pixels per channel. Default: that of CIFAR-100."}
    )
    std: list[float] | None = field(
        default=None, metadata={"help": "Standard deviation of the pixels per channel, as of --mean."}
    )
    augmentation: str = field(
        default="cifar",
        metadata={"help": "Random augmentation of the training images.", "choices": list(AUGMENTATIONS)},
    )
    reduced_decoding: bool = field(
        default=True,
        metadata={
            "help": "Decode JPEG files at the smallest scale that has all pixels which a view needs. If False, at full "
            "size."
        },
    )
    num_train_epochs: float = field(default=240, metadata={"help": "Number of passes over the training images."})
    per_device_train_batch_size: int = field(
        default=128, metadata={"help": "Number of images per device and optimizer step."}
    )
    per_device_eval_batch_size: int = field(
        default=256, metadata={"help": "Number of images per forward pass in evaluation."}
    )
    optim: str = field(
        default="sgd", metadata={"help": "Optimizer: sgd, or any other of transformers.TrainingArguments."}
    )
    learning_rate: float = field(default=0.05, metadata={"help": "Largest learning rate of the schedule."})
    momentum: float = field(
        default=0.9, metadata={"help": "Momentum of the SGD optimizer; other optimizers ignore it."}
    )
    weight_decay: float = field(
        default=5e-4,
        metadata={"help": "Weight decay. The SGD optimizer applies it to every parameter, as in the paper."},
    )
    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "Schedule of the learning rate, as of transformers.TrainingArguments."}
    )
    lr_milestones: list[float] | None = field(
        default=None, metadata={"help": "Epochs after which the learning rate of the SGD optimizer is divided by 10."}
    )
    max_grad_norm: float = field(
        default=0.0,
        metadata={"help": "Largest norm of the gradient; longer gradients are scaled to it. 0: no clipping."},
    )
    save_strategy: str | None = field(
        default=None,
        metadata={
            "help": "When checkpoints are written: steps, epoch or no. The trained network is saved in any case. "
            "Default: no, or steps where --save_steps is given."
        },
    )
    save_steps: float | None = field(
        default=None, metadata={"help": "Number of optimizer steps between two checkpoints. Default: 500."}
    )
    save_dtype: str = field(
        default="float32",
        metadata={
            "help": "Data type in which the trained network is saved. Its accuracy is that of the saved weights.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Drop the last incomplete batch of each epoch."})
    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "Drop columns that the model does not read. Must be False: rows hold views and row numbers."},
    )

    derived: InitVar[dict[str, tuple] | None] = None  # see `DistillationArguments`

    @parameter_names()
    def __post_init__(self, derived):
        with recording_derived(self, derived):
            self._derive()

    def _derive(self) -> None:
        self.given = given(self)
        check_numbers(self)
        resolve_saving(self, "no")
        if "eval_steps" in self.given and "eval_strategy" not in self.given:
            self.eval_strategy = "steps"
        try:
            super().__post_init__()
        except Exception as error:  # values of all kinds, packages that are not installed, files that cannot be read
            raise refused(self.given, ENGINE, "Trainer does not take this", error) from error
        check_order_of_images(self)


class SupervisedTrainer(Trainer):
    """``transformers.Trainer``, with dropout that depends on the seed and the step alone, and checkpoints that are
    complete or not there.

    SIGTERM and Ctrl-C end it as they end a distillation: the step is saved.

    Args:
        identity: what must be the same for a run to be resumed, by argument; kept in its checkpoints.
    """

    def __init__(self, *args, identity: dict[str, str] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self._identity = identity or {}
        self._step_seed = StepSeed(self.args.seed, self.args.device)
        self._checkpoints = CheckpointWriter(self.args, self.accelerator.wait_for_everyone)
        self.time = TrainingTime()
        self._preemption = Preemption()
        self.add_callback(self._preemption)
        print_lines(self)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> TrainOutput:
        newest = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else None
        checkpoint = newest or resume_from_checkpoint
        self.time = TrainingTime.start(checkpoint if isinstance(checkpoint, (str, Path)) else None)
        with self._preemption:
            result = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        self._preemption.leave(self.state.global_step, self.args.process_index)
        return result

    def get_train_dataloader(self) -> DataLoader:
        self._step_seed.restart()
        return super().get_train_dataloader()

    def compute_loss(self, model, *args, **kwargs):
        if model.training:
            self._step_seed.apply(self.state.global_step)
        return super().compute_loss(model, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Strictly: ``Trainer`` knows only the file's key layout, so that a ViT would silently start anew."""
        network = self.accelerator.unwrap_model(self.model if model is None else model, keep_torch_compile=False)
        saved = type(network).from_pretrained(resume_from_checkpoint, dtype=network.dtype)
        network.load_state_dict(saved.state_dict())

    def _save_checkpoint(self, model, trial) -> None:
        self.store_flos()
        run_dir = self._get_output_dir(trial=trial)
        with self._checkpoints.atomic(Path(run_dir, f"checkpoint-{self.state.global_step}"), manifest=True) as folder:
            self.save_model(str(folder), _internal_call=True)
            save_training_state(self, str(folder))
            if self.args.should_save:
                Path(folder, RECORD).write_text(json.dumps(self._identity, indent=2))
                self.time.save(folder)
                self.state.save_to_json(str(folder / "trainer_state.json"))
        if self.args.should_save:
            rotate_checkpoints(run_dir, self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=False)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        args = self.args
        self.args = without_token(args)  # Trainer writes its arguments, and pushes the file
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args = args

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with self._checkpoints.same_error_everywhere(output_dir or self.args.output_dir):
            super().save_model(output_dir, _internal_call)


@dataclass
class SupervisedRun:
    """A supervised training, from its arguments to the network that it leaves.

    Attributes:
        trainer: ready for the first step.
        backbone: the one within the classifier that is trained.
        splits: the images.
        checkpoint: the one to resume from; None for a fresh start.
    """

    trainer: SupervisedTrainer
    backbone: Backbone
    splits: ImageSplits
    checkpoint: str | None

    def train(self, launched_as: str | None = None) -> dict | None:
        """Train, save the classifier and measure it on test images, else on held-out ones.

        Args:
            launched_as: the command for the record; default: that of this process.

        Returns:
            On the first process what ``run.json`` holds: command, seed, versions, ``images_seen``, ``accuracy`` where
            there are images to measure it on, and ``hours``, those of all parts of a training that was resumed.
        """
        trainer = self.trainer
        args = trainer.args
        enter_output_dir(args, args.resume_from_checkpoint)
        remove_earlier_run(args, args.resume_from_checkpoint)
        if self.splits.run_images is not None and trainer.is_world_process_zero():
            self.splits.run_images.save(args.output_dir, replace=self.checkpoint is None)
        trainer.train(resume_from_checkpoint=self.checkpoint)
        hours = round(trainer.time.total() / 3600, 2)
        trainer.model.to(getattr(torch, args.save_dtype))
        trainer.save_model()
        trainer.model.float()  # the rounded weights, which are measured
        leave()
        if not trainer.is_world_process_zero():
            return None
        record = {"command": launched_as or command(), "seed": args.seed, "versions": versions()}
        record["images_seen"] = run_length(args, len(trainer.train_dataset)).images_after(trainer.state.global_step)
        record["hours"] = hours
        queries = self.splits.test or self.splits.validation
        found = None
        if queries is not None:
            found = class_numbers(self.splits.label_column, self.splits.train, queries)
        if found is not None:
            images = ProcessedImages(
                queries, self.splits.image_column, self.backbone.preprocess, self.splits.on_bad_image
            )
            record["accuracy"] = accuracy(trainer.model, images, found[0][1], args)
            name = "test" if self.splits.test else "validation"
            print(f"accuracy on {len(queries):,} {name} images: {100 * record['accuracy']:.1f} %")
        write_json(Path(args.output_dir, "run.json"), record)
        return record


def build_supervised_run(data: DataArguments, args: TeacherArguments) -> SupervisedRun:
    """Build everything up to the first step; all bad input is found here.

    Args:
        data: labelled images.
        args: network and training.

    Raises:
        ValueError: any input that the run cannot use.
    """
    if any(Processes().gather(os.path.exists(args.output_dir))):  # bad input makes no folder
        enter_output_dir(args, args.resume_from_checkpoint)
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    check_processes(args)
    check_graphs(args)
    if not args.model:
        raise ValueError("--model is missing; see --help.")
    if Path(args.output_dir, "model.safetensors").exists() and not args.overwrite_output_dir:
        raise ValueError(f"--output_dir={args.output_dir} holds a network: replace it with --overwrite_output_dir.")
    if checkpoint is None and holds_run(args.output_dir) and not args.overwrite_output_dir:
        raise ValueError(
            f"--output_dir={args.output_dir} holds checkpoints: continue the run with --resume_from_checkpoint, or "
            f"replace it with --overwrite_output_dir."
        )
    with args.main_process_first(desc="images"):
        splits = data.load(recorded=RunImages.of_checkpoint(checkpoint), by_content=False)
    set_seed(args.seed)
    model, processor = load_classifier(
        args.model,
        class_names(splits),
        size=args.image_size,
        mean=args.mean,
        std=args.std,
        hidden_sizes=args.hidden_sizes,
    )
    backbone = Backbone(model, processor, size=args.image_size, argument="image")  # refuses sizes it cannot take
    views = ViewDataset(
        splits.train,
        splits.image_column,
        args.augmentation,
        max(backbone.size),
        seed=args.seed,
        on_bad_image=splits.on_bad_image,
        reduced_decoding=args.reduced_decoding,
    )
    (labels,), _ = class_numbers(splits.label_column, splits.train)
    identity = supervised_identity(model, views, args)
    if checkpoint is not None:
        check_identity(checkpoint, identity)
        check_training_state(checkpoint, args)
    rehearse_supervised(model, backbone, args)
    trainer = build_supervised_trainer(model, backbone, labels, args, views, identity)
    return SupervisedRun(trainer, backbone, splits, checkpoint)


def run_length(args: TeacherArguments, images: int) -> RunLength:
    """Return the length of one pass over the training images."""
    size = args.train_batch_size * args.world_size
    batches = images // size if args.dataloader_drop_last else math.ceil(images / size)
    return RunLength(batches, args.gradient_accumulation_steps, size)


def supervised_identity(model: PreTrainedModel, views: ViewDataset, args: TeacherArguments) -> dict[str, str]:
    """What must be the same for a run to be resumed; each entry under the argument that decides it."""
    length = run_length(args, len(views))
    no_options = ("--neighbors", "--view_")
    of_views = {name: value for name, value in views.identity().items() if not name.startswith(no_options)}
    # A resumed optimizer has these from its checkpoint, whatever the arguments say.
    own = ("momentum",) if args.optim == "sgd" else ("adam_beta1", "adam_beta2", "adam_epsilon")
    of_optimizer = {f"--{name}": str(getattr(args, name)) for name in ("learning_rate", "weight_decay", *own)}
    return {
        "--model": f"{type(model).__name__} {shapes(model)}",
        "--seed": str(args.seed),
        "--per_device_train_batch_size": f"{length.images_per_step} images per step",
        **of_views,
        "--data_seed": str(args.seed if args.data_seed is None else args.data_seed),
        "--train_sampling_strategy": str(args.train_sampling_strategy),
        STEPS_OF_EPOCH: f"{length.steps_per_epoch} steps per epoch",
        **of_optimizer,
    }


def build_supervised_trainer(
    model: PreTrainedModel,
    backbone: Backbone,
    labels: torch.Tensor,
    args: TeacherArguments,
    views: ViewDataset,
    identity: dict[str, str] | None = None,
) -> SupervisedTrainer:
    """Build a trainer of a classifier.

    Args:
        model: the classifier.
        backbone: the one within ``model``.
        labels: ``(n,)`` class numbers of the images that ``views`` shows.
        args: of the training.
        views: of the training images, without neighbours.
        identity: see ``SupervisedTrainer``.

    Raises:
        ValueError: fewer images than one step, or milestones that the run does not reach.
    """
    length = run_length(args, len(views))
    step = length.images_per_step
    if len(views) < step:
        raise ValueError(f"--per_device_train_batch_size: a step takes {step} images, of {len(views)}; lower it.")
    optimizer = scheduler = None
    if args.optim == "sgd":
        parameters = model.to(args.device).parameters()
        optimizer = torch.optim.SGD(parameters, args.learning_rate, args.momentum, weight_decay=args.weight_decay)
    if args.lr_milestones:
        if optimizer is None or max(args.lr_milestones) >= args.num_train_epochs:
            raise ValueError(f"--lr_milestones {args.lr_milestones}: needs --optim sgd, and epochs of this run.")
        if args.warmup_steps:
            raise ValueError(
                f"--warmup_steps={args.warmup_steps:g}: --lr_milestones has no warm-up; leave one of them out."
            )
        drops = [round(epoch * length.steps_per_epoch) for epoch in args.lr_milestones]
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops)

    def collate(items: list[dict]) -> dict[str, torch.Tensor]:
        batch = collate_views(items)
        return {"pixel_values": backbone.normalize(batch["pixel_values"]), "labels": labels[batch["index"]]}

    trainer = SupervisedTrainer(
        model,
        args,
        data_collator=collate,
        train_dataset=views,
        processing_class=backbone.processor,
        optimizers=(optimizer, scheduler),
        callbacks=[EpochCallback(views)],
        identity=identity,
    )
    # Networks that swallow keyword arguments are taken for ones that scale an accumulated loss by themselves.
    trainer.model_accepts_loss_kwargs = False
    return trainer


def rehearse_supervised(model: PreTrainedModel, backbone: Backbone, args: TeacherArguments) -> None:
    """Try the arguments on noise, as ``rehearse`` does those of a distillation.

    Args:
        model: the classifier; left as it is.
        backbone: the one within ``model``.
        args: of the training.

    Raises:
        ValueError: what could not be built or done, the arguments that were given for it, and why.
    """
    short = short_arguments(args)
    short.lr_milestones = None
    views = noise_views(short, args.augmentation, max(backbone.size))
    labels = torch.zeros(len(views), dtype=torch.long)
    try_trainer(short, lambda: build_supervised_trainer(copy.deepcopy(model), backbone, labels, short, views))


def class_names(splits: ImageSplits) -> list[str]:
    """Return the names of the classes, by number.

    Raises:
        ValueError: training images without labels.
    """
    column = splits.label_column
    if column is None:
        raise ValueError("--label_column: no labels found, and a supervised teacher needs them; name their column.")
    found = class_numbers(column, splits.train)
    if found is None:
        raise ValueError(f"--label_column {column}: some images have no label; leave them out of the training split.")
    return found[1]


@torch.no_grad()
def accuracy(model: PreTrainedModel, images: ProcessedImages, labels: torch.Tensor, args: TeacherArguments) -> float:
    """Return the share of un-augmented images that the classifier gets right.

    Args:
        model: the classifier.
        images: ``n`` images.
        labels: ``(n,)`` class numbers.
        args: device, batch size and workers.
    """
    model.eval()
    loader = DataLoader(images, args.per_device_eval_batch_size, num_workers=args.dataloader_num_workers)
    predicted = torch.cat([model(pixel_values=pixels.to(args.device)).logits.argmax(1).cpu() for pixels in loader])
    return (predicted == labels).double().mean().item()
