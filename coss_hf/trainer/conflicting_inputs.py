"""Inputs of a trainer of which one would take the place of another without a word; and what workers cannot load."""

import pickle
from collections.abc import Callable

from coss_hf.data.loading import ImageSplits
from coss_hf.data.views import ViewDataset
from coss_hf.trainer.arguments import DataArguments
from coss_hf.trainer.settings import start_method
from coss_hf.trainer.training_args import DistillationArguments
from coss_hf.utils.messages import first_line

# What decides which images `load_images` reads; and the columns, which images to evaluate on may have, too.
OF_LOADING = (
    "dataset",
    "dataset_name",
    "dataset_revision",
    "train_split",
    "test_split",
    "validation_size",
    "max_train_samples",
    "streaming",
)
COLUMNS = ("image_column", "label_column")


def made_views(views: ViewDataset) -> dict[str, object]:
    """What views were made with, under the names of the arguments that they take the place of."""
    return {
        "neighbors_k": views.k,
        "view_size": views.size,
        "augmentation": views.augmentation_name,
        "view_seed": views.seed,
        "view_epochs": views.view_epochs,
        "reduced_decoding": views.reduced_decoding,
    }


def check_views(args: DistillationArguments, views: ViewDataset) -> None:
    """Refuse arguments that say other than the views that were given, which are as they were made.

    Raises:
        ValueError: the argument, and both values.
    """
    for name, made in made_views(views).items():
        value = getattr(args, name)
        if value not in (made, getattr(DistillationArguments, name)):
            raise ValueError(
                f"--{name}={value}: the views of the ViewDataset were made with {made}; leave --{name} out, or make "
                f"the ViewDataset with it."
            )


def check_data(train_dataset, eval_dataset, data: DataArguments) -> None:
    """Refuse arguments about the reading of images next to images that were read already.

    Args:
        train_dataset: as it was given.
        eval_dataset: as it was given; its columns may be named.
        data: the arguments.

    Raises:
        ValueError: the argument and its value.
    """
    if not isinstance(train_dataset, (ImageSplits, ViewDataset)) or id(train_dataset) == data.loaded:
        return
    columns = COLUMNS if isinstance(train_dataset, ImageSplits) and eval_dataset is None else ()
    names = OF_LOADING
    if eval_dataset is not None:
        names = tuple(name for name in names if name not in ("dataset_name", "dataset_revision"))
    for name in (*names, *columns):
        value = getattr(data, name)
        if value != getattr(DataArguments, name) and not _agrees(train_dataset, name, value):
            call = "load_images" if isinstance(train_dataset, ImageSplits) else "the ViewDataset"
            raise ValueError(
                f"--{name}={value}: the images of --train_dataset were read already; leave --{name} out, or give it "
                f"to {call}."
            )


def _agrees(images: ImageSplits | ViewDataset, name: str, value) -> bool:
    """Whether an argument says what holds of the images that were read."""
    if not isinstance(images, ImageSplits):
        return False
    nothing_held_out = name == "validation_size" and not value and images.validation is None
    return nothing_held_out or (name in COLUMNS and value == getattr(images, name))


def check_augmentation(args: DistillationArguments, transform: str | Callable | None) -> None:
    """Refuse an augmentation by name next to another one, which makes the views.

    Raises:
        ValueError: both were given.
    """
    if transform is None or args.augmentation in (transform, DistillationArguments.augmentation):
        return
    raise ValueError(
        f"--augmentation={args.augmentation} next to --transform, which makes the views: leave one of them out."
    )


def check_workers_load(args: DistillationArguments, transform: str | Callable | None) -> None:
    """Refuse a transform that loader workers cannot load, before images are read and neighbours are searched.

    Raises:
        ValueError: workers are not forked, and the transform cannot be pickled.
    """
    context = getattr(args, "dataloader_multiprocessing_context", None)  # not in versions at the floor
    method = context or start_method()
    # Left out, their number becomes 0 where they are not forked by default.
    has_workers = args.dataloader_num_workers or (args.dataloader_num_workers is None and context)
    if not callable(transform) or method == "fork" or not has_workers:
        return
    try:
        pickle.dumps(transform)
    except Exception as error:  # of objects of any origin
        name = getattr(transform, "__qualname__", None) or type(transform).__name__
        raise ValueError(
            f"--transform={name} cannot be sent to loader workers, which this run starts by {method} "
            f"({first_line(error)}); define it at the top of a module, or set --dataloader_multiprocessing_context "
            f"fork."
        ) from error
