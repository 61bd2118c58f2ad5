"""What `DistillationTrainer` is given, in any form: as the backbones, images and evaluator that it works with."""

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, set_seed

from coss_hf.data.loading import ImageSplits
from coss_hf.data.run_images import RunImages
from coss_hf.data.stream_views import StreamViews
from coss_hf.data.streams import Stream
from coss_hf.data.transforms import AUGMENTATIONS
from coss_hf.data.views import ViewDataset
from coss_hf.evaluation.evaluator import Evaluator, sample
from coss_hf.hub.student import Student
from coss_hf.models.architecture import is_trained
from coss_hf.models.backbone import Backbone, vision_tower
from coss_hf.models.from_module import backbone_from_module, refuse_untrained
from coss_hf.models.loading import find_processor, load_backbone, missing_weights
from coss_hf.models.modules import module_name
from coss_hf.models.revision import commit_in_memory
from coss_hf.models.towers import ProjectedTower
from coss_hf.neighbors.columns import check_neighbors, check_pool
from coss_hf.trainer.arguments import DataArguments
from coss_hf.trainer.checkpoint_files import find_checkpoint
from coss_hf.trainer.conflicting_inputs import check_augmentation, check_views, check_workers_load, made_views
from coss_hf.trainer.settings import Settings, fill, find_situation, recorded_settings
from coss_hf.trainer.training_args import DistillationArguments
from coss_hf.utils.process_group import Processes

DRY_RUN_SAMPLE = 200  # images that a dry run decodes of each split


@dataclass(frozen=True)
class Prepared:
    """What ``factory`` knows before it makes a trainer of images that were read for it.

    Its caller answers for the output folder, and has tried the arguments on noise where it wants them tried.

    Attributes:
        checkpoint: that the run resumes from; None for a fresh start.
        has_claimed: whether this process has locked the output folder, so that ``checkpoint`` stays the one to resume.
    """

    checkpoint: str | None = None
    has_claimed: bool = False


@dataclass(frozen=True)
class TrainerInputs:
    """What ``DistillationTrainer`` was made with apart from the networks, under the names of its parameters.

    ``prepared`` says what was done before.
    """

    args: DistillationArguments | None
    train_dataset: object
    eval_dataset: object
    evaluator: Evaluator | None
    criterion: str | nn.Module | None
    transform: str | Callable | None
    data: DataArguments
    neighbors: np.ndarray | None
    callbacks: list[TrainerCallback] | None
    optimizers: tuple
    prepared: Prepared | None


class Known(NamedTuple):
    """What is known of a run before its images."""

    teacher: Backbone
    student: Backbone
    args: DistillationArguments
    criterion: nn.Module | None
    given: dict[str, object]
    recorded: Mapping[str, object] | None


@dataclass
class RunInputs:
    """What a trainer works with.

    Attributes:
        teacher: frozen.
        student: to be trained.
        args: of the training, with ``criterion`` and ``transform`` where they are names, and nothing left out.
        views: groups of views of the training images.
        splits: the images; None where only views were given.
        evaluator: measures held-out images during training; None without any.
        criterion: the loss; None for ``args.method``.
        given: names of teacher, student and dataset, and what both networks are given, for the record.
        settings: what was filled of that which ``args`` left out.
    """

    teacher: Backbone
    student: Backbone
    args: DistillationArguments
    views: ViewDataset
    splits: ImageSplits | None
    evaluator: Evaluator | None
    criterion: nn.Module | None
    given: dict[str, object]
    settings: Settings


def resolve_inputs(teacher, student, args: DistillationArguments | None, inputs: TrainerInputs) -> RunInputs:
    """Load and check what ``DistillationTrainer`` is given; see there for what each argument may be.

    Args:
        teacher: frozen.
        student: to be trained.
        args: of the training, instead of those in ``inputs`` where a run begins again.
        inputs: the rest.

    Raises:
        ValueError: any input that the training cannot use.
    """
    for name, value in (("teacher", teacher), ("student", student), ("train_dataset", inputs.train_dataset)):
        if value is None:
            raise ValueError(f"--{name} is missing.")
    args = with_names((args or DistillationArguments()).for_training(), inputs.criterion, inputs.transform)
    criterion = None if isinstance(inputs.criterion, str) else inputs.criterion
    given = {"teacher": described(teacher), "student": described(student), "dataset": described(inputs.train_dataset)}
    teacher, student = load_networks(
        args,
        # Of its own: another trainer of the same teacher may read another number of its maps.
        lambda: copy.copy(as_backbone(teacher, "teacher").freeze()),
        lambda loaded: as_backbone(student, "student", loaded),
    )
    check_networks(student, teacher)
    for role, backbone in (("teacher", teacher), ("student", student)):
        given |= described_input(role, backbone)
    _place(teacher, args)
    if inputs.prepared is None and not isinstance(inputs.train_dataset, ViewDataset):
        from coss_hf.trainer.rehearsal import rehearse  # builds trainers

        _check_streamed(args, inputs.train_dataset, inputs.data, criterion)
        rehearse(student, teacher, args, criterion)
    if inputs.prepared is not None:
        checkpoint = inputs.prepared.checkpoint
    else:
        checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    recorded = recorded_settings(checkpoint)
    known = Known(teacher, student, args, criterion, given, recorded)
    if isinstance(inputs.train_dataset, ViewDataset):
        return _of_views(inputs, known)
    splits = _images(inputs, args, checkpoint)
    return _of_images(inputs, known, splits)


def _of_views(inputs: TrainerInputs, known: Known) -> RunInputs:
    """Inputs of a run whose views were made already."""
    if inputs.eval_dataset is not None:
        raise ValueError("--eval_dataset next to a ViewDataset: give evaluator=Evaluator(...) instead.")
    teacher, student, args, criterion, given, recorded = known
    views = inputs.train_dataset
    check_views(args, views)
    check_workers_load(args, views.augment)
    given |= made_views(views)
    args = args.drawing(views.k)
    embeds = inputs.evaluator is not None
    situation = find_situation(args, student, teacher, size=views.size, images=len(views), embeds=embeds)
    args, settings = fill(args, situation, recorded)
    return RunInputs(teacher, student, args, views, None, inputs.evaluator, criterion, given, settings)


def _of_images(inputs: TrainerInputs, known: Known, splits: ImageSplits) -> RunInputs:
    """Inputs of a run of which the views are made here."""
    teacher, student, args, criterion, given, recorded = known
    evaluator = inputs.evaluator
    if splits.stream is not None:
        args = args.for_stream(criterion)
    images = None if splits.stream is not None else len(splits.train)
    size = view_size(args, student, teacher)
    embeds = evaluator is not None or splits.validation is not None
    situation = find_situation(args, student, teacher, size=size, images=images, embeds=embeds)
    args, settings = fill(args, situation, recorded)
    views = make_views(splits, student, teacher, args, inputs.transform, inputs.data.shuffle_buffer_size)
    if callable(inputs.transform):
        given["augmentation"] = views.augmentation_name
    if evaluator is None:
        held_out = sample(splits.validation, args.eval_sample_size)
        evaluator = build_evaluator(splits, teacher, args, held_out, during_training=True)
    return RunInputs(teacher, student, args, views, splits, evaluator, criterion, given, settings)


def _images(inputs: TrainerInputs, args: DistillationArguments, checkpoint: str | None) -> ImageSplits:
    """Those that were read already, or else read now."""
    given = inputs.train_dataset
    if isinstance(given, ImageSplits) and inputs.eval_dataset is None:
        return given
    return read_images(args, checkpoint, partial(as_splits, given, inputs.eval_dataset, inputs.data))


def load_networks(
    args: DistillationArguments, load_teacher: Callable[[], Backbone], load_student: Callable[[Backbone], Backbone]
) -> tuple[Backbone, Backbone]:
    """Load teacher and student, each seeded: weights that a checkpoint lacks are drawn, and a student may copy them."""
    set_seed(args.seed)
    teacher = load_teacher()
    set_seed(args.seed)
    return teacher, load_student(teacher)


def read_images(
    args: DistillationArguments, checkpoint: str | Path | None, read: Callable[..., ImageSplits]
) -> ImageSplits:
    """Read the images of a run: one process of each machine does, and the others find them in its cache.

    Args:
        args: of the training.
        checkpoint: that the run resumes from.
        read: called with the images ``recorded`` in the checkpoint and how images are checked.
    """
    recorded = RunImages.of_checkpoint(checkpoint)
    with Processes().first(args.local_process_index == 0):
        return read(recorded=recorded, **how_checked(args, recorded))


def _check_streamed(
    args: DistillationArguments, train_dataset, data: DataArguments, criterion: nn.Module | None
) -> None:
    """Refuse what no stream can do, before images and networks are tried."""
    read = getattr(train_dataset, "stream", None) is not None  # by load_stream
    if read or data.streaming or isinstance(train_dataset, (IterableDataset, IterableDatasetDict)):
        args.check_stream(criterion)


def view_size(args: DistillationArguments, student: Backbone, teacher: Backbone) -> int:
    """The side of a view in pixels: that of the larger network unless ``args`` give one."""
    return max(*teacher.size, *student.size) if args.view_size is None else args.view_size


def _place(teacher: Backbone, args: DistillationArguments) -> None:
    """With a cache the teacher comes to the device where it embeds: it may never have to."""
    if not args.teacher_cache:
        teacher.model.to(args.device)


def with_names(
    args: DistillationArguments, criterion: str | nn.Module | None, transform: str | Callable | None
) -> DistillationArguments:
    """A copy of ``args`` with the method and the augmentation that were given by name.

    Raises:
        ValueError: an unknown name, or something that is no loss and no transform.
    """
    args = copy.copy(args)
    if isinstance(criterion, str):
        args.method = criterion
        args._check_methods()
    elif isinstance(criterion, nn.Module):
        args.check_criterion(criterion)
    elif criterion is not None:
        raise ValueError(f"--criterion is a {type(criterion).__name__}; give a method's name or an nn.Module.")
    if isinstance(transform, str):
        if transform not in AUGMENTATIONS:
            raise ValueError(
                f"--transform={transform!r} is unknown: choose one of {', '.join(AUGMENTATIONS)}, or give a callable."
            )
        check_augmentation(args, transform)
        args.augmentation = transform
    elif not (transform is None or callable(transform)):
        raise ValueError(
            f"--transform is a {type(transform).__name__}; give one of {', '.join(AUGMENTATIONS)}, or a callable from "
            f"a PIL image to a uint8 tensor (3, h, w)."
        )
    if callable(transform):
        check_augmentation(args, transform)
        check_workers_load(args, transform)
    return args


def described(value) -> str:
    """What a network or a dataset is called in the record of a run."""
    if isinstance(value, (str, Path)):
        return str(value)
    if isinstance(value, Student):
        value = value.backbone
    found = getattr(value, "name", None) or getattr(value, "name_or_path", None)
    if isinstance(found, str) and found:
        return found
    if isinstance(value, nn.Module):
        return module_name(value)
    return hub_dataset(value) or f"{type(value).__name__} (in memory)"


def hub_dataset(images) -> str | None:
    """The name on the Hub of what ``load_dataset`` returned, as far as the dataset knows it."""
    if isinstance(images, dict):
        images = next(iter(images.values()), None)
    sources = getattr(getattr(images, "info", None), "download_checksums", None) or {}
    found = re.match(r"hf://datasets/([^@]+)@", next(iter(sources), ""))
    return found[1] if found else None


def described_input(role: str, backbone: Backbone) -> dict[str, object]:
    """Pooling, size and data type of a network, under the names that the command line has for them."""
    height, width = backbone.size
    dtype = next(backbone.model.parameters()).dtype
    found = {
        f"{role}_pooling": backbone.pooling,
        f"{role}_size": height if height == width else None,
        f"{role}_dtype": str(dtype).removeprefix("torch."),
    }
    if isinstance(backbone.model, ProjectedTower):
        found[f"{role}_space"] = "projected"
    if role == "student":  # a network in memory that was built from a name has that name at random weights, too
        found["student_init"] = "pretrained" if is_trained(backbone.model) else "random"
    return found


def as_backbone(network, argument: str, teacher: Backbone | None = None) -> Backbone:
    """A backbone of a Hub name, a folder, a ``PreTrainedModel``, any other module, a ``Backbone`` or a ``Student``.

    Args:
        network: the network.
        argument: the parameter that errors name.
        teacher: source of the image processor where the network has none.

    Raises:
        ValueError: anything else, or a network that gives no features of images.
    """
    if isinstance(network, Student):
        return _backbone_of(network, argument)
    if isinstance(network, Backbone):
        if argument == "teacher":
            refuse_untrained(network, argument)
        return network
    if isinstance(network, (str, Path)):
        return load_backbone(str(network), argument=argument, teacher=teacher)
    if isinstance(network, PreTrainedModel):
        tower = vision_tower(network, argument)
        processor = find_processor(network, teacher, argument)
        missing = missing_weights(tower, network.name_or_path, commit_in_memory(network))
        return Backbone(network, processor, missing=missing, argument=argument)
    if isinstance(network, nn.Module):
        return backbone_from_module(network, teacher=teacher, argument=argument)
    raise ValueError(
        f"--{argument} is a {type(network).__name__}; give a Hub name, a folder, a PreTrainedModel, any other "
        f"nn.Module, a Backbone or a Student without a head."
    )


def _backbone_of(student: Student, argument: str) -> Backbone:
    """The backbone of a student, whose embeddings are those of the student only where it has no head."""
    if student.head is not None:
        raise ValueError(
            f"--{argument} is a Student with a projection head, and its backbone has another embedding, of "
            f"{student.backbone.dim} dimensions; give the backbone alone ({argument}.backbone)."
        )
    return student.backbone


def check_networks(student: Backbone, teacher: Backbone) -> None:
    """Refuse a student that shares weights with its teacher, which are frozen, and one that cannot be trained.

    Raises:
        ValueError: the reason, and the remedy.
    """
    frozen = {id(parameter) for parameter in teacher.model.parameters()}
    if any(id(parameter) in frozen for parameter in student.model.parameters()):
        raise ValueError(
            "--student shares weights with --teacher, which stays as it is: give the student a copy (copy.deepcopy)."
        )
    if not student.num_parameters():
        raise ValueError(
            f"--student={student.name}: its embedding depends on none of its parameters (is it computed without "
            f"gradient?); give a network that can be trained."
        )


def how_checked(args: DistillationArguments, recorded: RunImages | None = None) -> dict:
    """What a run must know of its images beforehand, as options of ``DataArguments.load``.

    Neighbours and cached embeddings are those of each image's content. Without them images are checked as they are
    read; a run that began so is resumed so, and a cache then reads the contents for itself.
    """
    if args.dry_run:
        return {"by_content": False, "sample": DRY_RUN_SAMPLE}
    began_by_file = recorded is not None and bool(recorded.checked) and not recorded.by_content
    return {"by_content": args.neighbors_k > 0 or (bool(args.teacher_cache) and not began_by_file)}


def as_splits(
    train_dataset, eval_dataset, data: DataArguments, recorded: RunImages | None = None, **checked
) -> ImageSplits:
    """Training images, and those to evaluate on.

    Args:
        train_dataset: a name, a folder, a ``Dataset`` or a ``DatasetDict``, or, with an ``eval_dataset``, splits.
        eval_dataset: the same; None to hold some out of train where the dataset brings none.
        data: columns and sizes.
        recorded: the images of the run that is to be resumed.
        checked: of ``how_checked``.

    Raises:
        ValueError: no such dataset, or one without images.
    """
    if isinstance(train_dataset, ImageSplits):
        return with_held_out(train_dataset, eval_dataset, data, **checked)
    check_images("train_dataset", train_dataset)
    if eval_dataset is None:
        return data.load(train_dataset, hold_out_by_default=True, recorded=recorded, streams=True, **checked)
    splits = replace(data, validation_size=0)
    splits = splits.load(train_dataset, recorded=recorded, streams=True, evaluated=True, **checked)
    return with_held_out(splits, eval_dataset, data, **checked)


def check_images(argument: str, images) -> None:
    """Refuse what is no dataset."""
    if not isinstance(images, (str, Path, Dataset, DatasetDict, IterableDataset, IterableDatasetDict)):
        raise ValueError(
            f"--{argument} is a {type(images).__name__}; give a datasets.Dataset or DatasetDict with a column of "
            f"images, an IterableDataset, a Hub name, a folder or a parquet file."
        )


def with_held_out(splits: ImageSplits, eval_dataset, data: DataArguments, **checked) -> ImageSplits:
    """The splits with ``eval_dataset``, in any of its forms, as the images to evaluate on.

    Raises:
        ValueError: no such dataset, or one without images.
    """
    check_images("eval_dataset", eval_dataset)
    only = None  # a split of another name than train is all that there is
    if isinstance(eval_dataset, (DatasetDict, IterableDatasetDict)) and "train" not in eval_dataset:
        names = [name for name in ("test", "validation") if name in eval_dataset] or [*eval_dataset]
        only = names[0] if names else None
    own = replace(data, validation_size=0, train_split=only, test_split=None, max_train_samples=None, streaming=False)
    own = own.load(eval_dataset, streams=True, evaluated=True, **checked)
    held_out = own.train if only else own.test or own.validation or own.train
    labelled = splits.label_column if splits.label_column in held_out.column_names else None
    bad_images = splits.bad_images + own.bad_images
    if own.image_column != splits.image_column:
        held_out = held_out.rename_column(own.image_column, splits.image_column)
    return splits._replace(validation=held_out, test=None, label_column=labelled, bad_images=bad_images)


def make_views(
    splits: ImageSplits,
    student: Backbone,
    teacher: Backbone,
    args: DistillationArguments,
    transform: str | Callable | None = None,
    shuffle_buffer_size: int = 0,
) -> ViewDataset | StreamViews:
    """Views of the training images, of the size that the larger network takes unless ``args`` give one."""
    size = view_size(args, student, teacher)
    augmentation = transform if callable(transform) else args.augmentation
    if splits.stream is not None:
        _check_same_stream(splits.stream)
        return StreamViews(
            splits.stream,
            splits.image_column,
            augmentation,
            size,
            chunk_size=args.per_device_train_batch_size,
            seed=args.seed,
            view_seed=args.view_seed,
            reduced_decoding=args.reduced_decoding,
            on_bad_image=splits.on_bad_image,
            shuffle_buffer_size=shuffle_buffer_size,
            process=args.process_index,
            processes=args.world_size,
            workers=args.dataloader_num_workers,
        )
    return ViewDataset(
        splits.train,
        splits.image_column,
        augmentation,
        size,
        seed=args.seed if args.view_seed is None else args.view_seed,
        on_bad_image=splits.on_bad_image,
        view_epochs=args.view_epochs,
        reduced_decoding=args.reduced_decoding,
    )


def _check_same_stream(stream: Stream) -> None:
    if len(set(Processes().gather(stream.identity))) > 1:
        raise ValueError(
            "--train_dataset: the stream is not the same in all processes, so that they would not divide it: shuffle "
            "it with a seed, stream.shuffle(seed=0)."
        )


def build_evaluator(
    splits: ImageSplits,
    teacher: Backbone,
    args: DistillationArguments,
    test_images: Dataset | None,
    *,
    during_training: bool = False,
) -> Evaluator | None:
    """Build the evaluation on held-out images, against the training images; None without held-out images.

    Args:
        splits: the images.
        teacher: compared with.
        args: of the training.
        test_images: held-out images.
        during_training: with diagnostics, against a sample of the training images, instead of with retrieval.
    """
    if test_images is None:
        return None
    return Evaluator(
        teacher,
        test_images,
        splits.image_column,
        label_column=splits.label_column,
        train_images=sample(splits.train, args.eval_train_size if during_training else None),
        batch_size=args.per_device_eval_batch_size,
        num_workers=args.dataloader_num_workers or 0,  # None where it is left out
        diagnostics=during_training,
        retrieval=not during_training,
        on_bad_image=splits.on_bad_image,
    )


def evaluator_of(trainer, images, data: DataArguments) -> Evaluator:
    """Build the evaluation of a trainer on other images, all of them; against its training images where it has them.

    Args:
        trainer: a ``DistillationTrainer``.
        images: in any of the forms of ``eval_dataset``.
        data: columns.
    """
    splits = trainer.splits
    if splits is None:
        reader = trainer.train_dataset.reader
        splits = ImageSplits(reader.rows, None, None, reader.column, None, [])
    splits = with_held_out(splits, images, data, by_content=False)
    return build_evaluator(splits, trainer.teacher, trainer.args, splits.validation, during_training=True)


def find_neighbors(
    splits: ImageSplits, teacher: Backbone, data: DataArguments, args: DistillationArguments
) -> np.ndarray:
    """Return neighbour indices ``(n, K)`` of the training images: those that came with them, or the teacher's.

    All processes of a run call together. A dry run makes some up.

    Raises:
        ValueError: neighbours of other images, or more of them than there are.
    """
    train = splits.train
    if "neighbors" in train.column_names and "image_hash" in train.column_names:
        return check_neighbors(train, args.neighbors_pool)
    if args.dry_run:
        check_pool(args.neighbors_pool, len(train))
        return (np.arange(len(train))[:, None] + np.arange(1, args.neighbors_pool + 1)) % len(train)
    from coss_hf.neighbors.mining import nearest_neighbors  # with it comes faiss, of no use otherwise

    found, _ = nearest_neighbors(
        train,
        teacher,
        splits.image_column,
        k=args.neighbors_pool,
        options=data,
        cache_dir=data.neighbors_cache,
        batch_size=args.per_device_eval_batch_size,
        num_workers=args.dataloader_num_workers or 0,  # None where it is left out
        on_bad_image=splits.on_bad_image,
    )
    return found
