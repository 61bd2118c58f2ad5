"""Copy a dataset of photographs at a given shorter side, so that each epoch decodes small images instead of large ones.

    python recipes/prepare.py --dataset path/to/photos --output photos-288 --shorter_side 288
    python recipes/distill.py --dataset photos-288 --teacher facebook/dinov2-small --student timm/resnet18.a1_in1k

All splits and columns are kept, only images change: those with a larger shorter side are scaled to it, upright, and
written as JPEG. Smaller ones stay byte for byte. Take a side a little above that of the views (288 for views of 224). A
crop of a small part of a photograph (--augmentation imagenet: down to 8 % of its area) has fewer pixels in the copy
than in the original. The same command continues a call that was stopped, and repeats at
most 1,000 images per process.
"""

from coss_hf.cli.help import show_help

show_help(__name__, "prepare")

import logging
from dataclasses import dataclass, field
from pathlib import Path

from coss_hf.cli import bad_input_exits, parse
from coss_hf.data.smaller_copy import write_smaller_copy
from coss_hf.utils.units import size_in_bytes


@dataclass
class PrepareArguments:
    """Which images to copy, how large, and where to."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Images to copy: a Hub name, a folder of images, parquet files or a save_to_disk folder.",
        },
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Name of the configuration of a Hub dataset that has several."}
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the dataset on the Hub."}
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Name of the column of the images. Default: the one that holds images."}
    )
    output: str | None = field(
        default=None,
        metadata={"help": "Folder to which the copy is written; --dataset of coss-hf distill then takes it."},
    )
    shorter_side: int = field(default=288, metadata={"help": "Largest shorter side of a copied image, in pixels."})
    quality: int = field(default=95, metadata={"help": "Quality of the copies as JPEG files, from 1 to 95."})
    on_bad_image: str = field(
        default="error",
        metadata={
            "help": "What to do with images that cannot be decoded: error ends the command, skip leaves them out.",
            "choices": ["error", "skip"],
        },
    )
    num_proc: int | None = field(
        default=None, metadata={"help": "Number of processes that decode and write images. Default: one."}
    )


ARGUMENTS = (PrepareArguments,)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with bad_input_exits():
        (args,) = parse(ARGUMENTS)
        for name in ("dataset", "output"):
            if not getattr(args, name):
                raise ValueError(f"--{name} is missing; see --help.")
        found = write_smaller_copy(
            args.dataset,
            Path(args.output),
            args.shorter_side,
            name=args.dataset_name,
            revision=args.dataset_revision,
            image_column=args.image_column,
            quality=args.quality,
            on_bad_image=args.on_bad_image,
            num_proc=args.num_proc,
        )
    print(
        f"{args.output}: {found.images:,} images, {found.smaller:,} of them made smaller, {found.left_out:,} left out; "
        f"{size_in_bytes(found.bytes_before)} became {size_in_bytes(found.bytes_after)}."
    )


if __name__ == "__main__":
    main()
