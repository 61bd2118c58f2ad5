"""Embed images with any vision network, and write the embeddings to one file.

    python recipes/embed.py --model my-student --dataset path/to/images --output embeddings.npy

The rows of the file follow the images of the split. `.npy` holds an array (n, d) of float32; `.parquet` holds the
columns `file_name` (where an image has one; in a folder of images its path below the folder), the label (where there
are labels) and `embedding`. A student of recipes/distill.py is embedded with its projection head, in its teacher's
space, with --head.
"""

from coss_hf.cli.help import show_help

show_help(__name__, "embed")

import os
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import PartialState

from coss_hf.cli import bad_input_exits, log_to_console, parse
from coss_hf.data.loading import ImageSplits
from coss_hf.data.processed_images import ProcessedImages
from coss_hf.models.embedding import embed_dataset
from coss_hf.models.heads import load_head
from coss_hf.models.loading import load_backbone
from coss_hf.models.towers import SPACES
from coss_hf.trainer.arguments import DataArguments
from coss_hf.utils.paths import check_output_file
from coss_hf.utils.vectors import l2_normalize

SPLITS = ("train", "validation", "test")
FILE_NAME = "file_name"
EMBEDDING = "embedding"  # columns of the parquet file


@dataclass
class EmbedArguments:
    """The network, and where its embeddings go."""

    model: str | None = field(
        default=None, metadata={"help": "Hub name or folder of the network that embeds the images."}
    )
    output: str | None = field(default=None, metadata={"help": "File to write, with the suffix .npy or .parquet."})
    split: str = field(
        default="train", metadata={"help": "Split of the dataset whose images are embedded.", "choices": list(SPLITS)}
    )
    head: bool = field(default=False, metadata={"help": "Apply the student's projection head to its embeddings."})
    normalize: bool = field(default=False, metadata={"help": "Scale each embedding to a length of 1."})
    pooling: str = field(
        default="auto",
        metadata={"help": "How features become one embedding: cls, mean, pooler, gap, or auto (by the architecture)."},
    )
    space: str = field(
        default="tower",
        metadata={
            "help": "Of a network of images and text, such as CLIP: the embedding of its vision tower, or the one "
            "that is compared with embeddings of texts (projected).",
            "choices": list(SPACES),
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Let the model's checkpoint run code of its own."})
    batch_size: int = field(default=256, metadata={"help": "Number of images per forward pass."})
    num_workers: int = field(default=0, metadata={"help": "Number of processes that decode images."})
    use_cpu: bool = field(default=False, metadata={"help": "Run on the CPU, even where there is a GPU."})


ARGUMENTS = (EmbedArguments, DataArguments)


def check(args: EmbedArguments) -> None:
    """Raise ``ValueError`` for arguments that cannot be used."""
    for name in ("model", "output"):
        if not getattr(args, name):
            raise ValueError(f"--{name} is missing; see --help.")
    if Path(args.output).suffix not in (".npy", ".parquet"):
        raise ValueError(f"--output {args.output}: give a file with the suffix .npy or .parquet.")
    check_output_file(args.output, "--output")
    if args.batch_size < 1:
        raise ValueError(f"--batch_size {args.batch_size}: give 1 or more.")


@torch.no_grad()
def embeddings(splits: ImageSplits, args: EmbedArguments) -> np.ndarray:
    """Return the embeddings ``(n, d)`` float32 of a split.

    Raises:
        ValueError: a network or head that cannot be used, no such split, or a label column that is called like one of
            the output.
    """
    rows = getattr(splits, args.split)
    if rows is None:
        raise ValueError(f"--split {args.split}: {_why_missing(splits)}")
    if Path(args.output).suffix == ".parquet" and splits.label_column in (FILE_NAME, EMBEDDING):
        raise ValueError(
            f"--label_column {splits.label_column}: --output {args.output} has another column of this name; rename the "
            f"dataset's, give another --label_column, or write an .npy file, which holds no labels."
        )
    options = {"pooling": args.pooling, "space": args.space, "trust_remote_code": args.trust_remote_code}
    backbone = load_backbone(args.model, argument="model", **options).freeze()
    head = load_head(args.model) if args.head else None
    if args.head and head is None:
        raise ValueError(f"--head: {args.model} has no projection head; leave --head out.")
    images = ProcessedImages(rows, splits.image_column, backbone.preprocess)
    device = PartialState(cpu=args.use_cpu).device
    found = embed_dataset(backbone, images, batch_size=args.batch_size, num_workers=args.num_workers, device=device)
    if head is not None:
        found = head(found)
    if args.normalize:
        found = l2_normalize(found)
    return found.numpy()


def _why_missing(splits: ImageSplits) -> str:
    """Why there is no such split, and what to give instead."""
    checked = splits.run_images.checked  # by the dataset's own names, train first
    if splits.test is not None and "validation" in list(checked)[1:]:  # test, where there is no other split for it
        return (
            "the dataset's split validation is the one called test here, since it has no test split; give --split test."
        )
    names = ", ".join(name for name in SPLITS if getattr(splits, name) is not None)
    return f"the dataset has no such split; it has {names}."


def _file_name(path: str | None, folder: str) -> str | None:
    """An image's path below the dataset's folder, since images of several classes may share a name; else its name."""
    if path and path.startswith(f"{folder}{os.sep}"):
        return os.path.relpath(path, folder)
    return Path(path).name if path else None


def write(path: Path, found: np.ndarray, splits: ImageSplits, split: str, dataset: str) -> None:
    """Write a file that is complete or not there.

    Args:
        path: of the file.
        found: the embeddings ``(n, d)``.
        splits: the images.
        split: the name of the split that was embedded.
        dataset: where the images come from, as given on the command line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    if path.suffix == ".npy":
        with unfinished.open("wb") as file:
            np.save(file, found)
    else:
        rows = getattr(splits, split)
        records = rows.cast_column(splits.image_column, datasets.Image(decode=False))[splits.image_column]
        folder = os.path.abspath(os.path.expanduser(dataset))
        columns = {FILE_NAME: [_file_name(record["path"], folder) for record in records]}
        label = splits.label_column
        if label:
            columns[label] = rows[label][:]
        table = datasets.Dataset.from_dict({**columns, EMBEDDING: found})
        if label:
            table = table.cast_column(label, rows.features[label])  # with the names of the classes
        table.to_parquet(unfinished)
    os.replace(unfinished, path)


def main() -> None:
    log_to_console()
    with bad_input_exits():
        args, data = parse(ARGUMENTS)
        check(args)
        splits = data.load()
        found = embeddings(splits, args)
    write(Path(args.output), found, splits, args.split, data.dataset)
    print(f"{args.output}: {found.shape[0]:,} embeddings of {found.shape[1]} dimensions.")


if __name__ == "__main__":
    main()
