"""Convert a CIFAR-10 checkpoint of github.com/akamaster/pytorch_resnet_cifar10 into a transformers model.

    python recipes/convert.py FOLDER --output OUT

FOLDER holds its state dict as model.safetensors; the model, its code and the image processor are written to OUT.
"""

from coss_hf.cli.help import as_commands, show_help

show_help(__name__, "convert")

import argparse

from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from coss_hf.cli import bad_input_exits
from coss_hf.cli.paths import path
from coss_hf.models.cifar.convert import convert_akamaster
from coss_hf.models.cifar.registry import cifar_image_processor


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="coss-hf convert", description=as_commands(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=path, help="Folder that holds the checkpoint as model.safetensors.")
    parser.add_argument("--output", type=path, required=True, help="Folder to which the model is written.")
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    with bad_input_exits():
        model = convert_akamaster(args.folder)
    model.save_pretrained(args.output)
    cifar_image_processor(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD).save_pretrained(args.output)
    print(f"resnet{model.config.depth}, {model.num_parameters():,} parameters, written to {args.output}")


if __name__ == "__main__":
    main()
