"""Export a network to ONNX, OpenVINO or ExecuTorch, and compare it with PyTorch on real images.

    python recipes/export.py --model my-student --dataset path/to/images --quantize static
    python recipes/export.py --model my-student --dataset path/to/images --formats onnx openvino executorch

The files go to the student's own folder in the layout of the Hub: `onnx/model.onnx` (`model_int8.onnx` next to it with
--quantize), `openvino/openvino_model.xml`, `executorch/model.pte`; with --output they all go to that folder, with their
image processor. They map `pixel_values` (batch, 3, h, w) to `embedding` (batch, d) and include pooling, with --head
also the projection to the teacher's space. `dynamic` quantisation suits transformers; `static`, calibrated on training
images, suits convolutional networks. Agreement and latency are measured on the test split (without one, on images that
--validation_size, or by default the model's own run, held out of train), printed and written to export.json.
"""

from coss_hf.cli.help import show_help

show_help(__name__, "export")

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from coss_hf.cli import bad_input_exits, log_to_console, parse
from coss_hf.data.labels import class_numbers
from coss_hf.data.processed_images import ProcessedImages
from coss_hf.hub.export import FORMATS, QUANTIZATIONS, check_packages, export, int8_advice, versions_of
from coss_hf.hub.export_folders import RECORD, weights_digest
from coss_hf.hub.snippets import Subject, renewed
from coss_hf.hub.student import Student
from coss_hf.models.heads import HEAD_FILE, load_head
from coss_hf.models.loading import load_backbone
from coss_hf.reporting.run_record import command, versions, write_json
from coss_hf.study.tables import as_markdown
from coss_hf.trainer.arguments import DataArguments

logger = logging.getLogger(__name__)


@dataclass
class ExportArguments:
    """What is exported, and how it is measured."""

    model: str | None = field(default=None, metadata={"help": "Hub name or folder of the network to export."})
    output: str | None = field(
        default=None,
        metadata={
            "help": "Folder to which all files and export.json are written. Default: folders onnx, openvino and "
            "executorch in the model's own folder, as on the Hub."
        },
    )
    formats: list[str] = field(
        default_factory=lambda: ["onnx"],
        metadata={
            "help": f"Formats to write: one or more of {', '.join(FORMATS)}. An executorch program takes one image at "
            "a time."
        },
    )
    head: bool = field(default=False, metadata={"help": "Export the model's projection head, too."})
    quantize: str = field(
        default="none",
        metadata={
            "help": "Quantisation of a second file in int8: static suits convolutional networks, dynamic suits "
            "transformers.",
            "choices": list(QUANTIZATIONS),
        },
    )
    pooling: str = field(
        default="auto",
        metadata={"help": "How features become one embedding: cls, mean, pooler, gap, or auto (by the architecture)."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Let the model's checkpoint run code of its own."})
    num_images: int = field(default=1000, metadata={"help": "Largest number of test images to compare on."})
    num_train_images: int = field(
        default=10_000,
        metadata={
            "help": "Largest number of training images among which k-NN looks for the neighbours of the test images. "
            "Every format and PyTorch embed them, where the images have labels."
        },
    )
    calibration_images: int = field(
        default=200, metadata={"help": "Number of training images that calibrate static quantisation."}
    )
    timing_rounds: int = field(default=20, metadata={"help": "Number of timed runs of each batch size."})
    batch_size: int = field(default=50, metadata={"help": "Number of images per forward pass."})


def check(args: ExportArguments) -> None:
    """Raise ``ValueError`` for arguments that cannot be used."""
    if not args.model:
        raise ValueError("--model is missing; see --help.")
    for name in ("num_images", "num_train_images", "calibration_images", "timing_rounds", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: give 1 or more.")
    unknown = [name for name in args.formats if name not in FORMATS]
    if unknown or not args.formats:
        raise ValueError(f"--formats {' '.join(unknown)}: give one or more of {', '.join(FORMATS)}.")
    if args.quantize != "none" and "onnx" not in args.formats:
        raise ValueError(f"--quantize {args.quantize} is for the ONNX file: add onnx to --formats, or leave it out.")
    check_output(args)


def check_output(args: ExportArguments) -> None:
    """Raise ``ValueError`` where the files cannot be written."""
    if not args.output and args.pooling != "auto":
        raise ValueError(
            f"--pooling {args.pooling}: files in the model's own folder give its own embedding; leave --pooling out, "
            f"or give --output a folder."
        )
    if not args.output:
        return
    if Path(args.output).is_file():
        raise ValueError(f"--output {args.output} is a file; give the name of a folder.")
    if Path(args.output).resolve() == Path(args.model).resolve():
        raise ValueError(
            f"--output {args.output} is the model's own folder; leave it out to write folders such as "
            f"{args.model}/onnx there."
        )
    if any(Path(args.output).glob("model*.safetensors")):
        raise ValueError(
            f"--output {args.output} contains a network, whose image processor would be replaced; give another folder."
        )


def draw(rows: Dataset, count: int) -> Dataset:
    """Return ``count`` rows at most, drawn with a fixed seed, in the dataset's order."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]
    return rows.select(sorted(order.tolist()))


def run(data: DataArguments, args: ExportArguments) -> dict:
    """Export and measure.

    Returns:
        ``results`` of each network, and the number of test ``images`` and of train features, ``bank``.

    Raises:
        ValueError: any input that cannot be used.
    """
    check(args)
    check_packages(args.formats)
    options = {"pooling": args.pooling, "trust_remote_code": args.trust_remote_code}
    backbone = load_backbone(args.model, argument="model", **options).freeze()
    if not args.output and not Path(args.model).is_dir():
        raise ValueError(f"--output is missing: --model {args.model} is a name on the Hub; give a folder to write to.")
    head = load_head(args.model) if args.head else None
    if args.head and head is None:
        raise ValueError(f"--head: there is no {HEAD_FILE} in {args.model}; leave it out.")
    if not args.head and load_head(args.model) is not None:
        logger.info("%s has a head into its teacher's space: --head exports it, too.", args.model)
    student = Student(backbone, head)
    data = data.follow(args.model)
    splits = data.load()
    test = splits.test or splits.validation
    if test is None:
        raise ValueError(
            f"--dataset {data.dataset} has no test split: give images that the student was not trained on, with "
            f"--test_split or another --dataset; or, where its run held images out, as many with --validation_size."
        )

    def batches(rows: Dataset) -> DataLoader:
        return DataLoader(ProcessedImages(rows, splits.image_column, backbone.preprocess), args.batch_size)

    test = draw(test, args.num_images)
    train = draw(splits.train, args.num_train_images)
    labels = None
    column = splits.label_column
    found = class_numbers(column, train, test) if column else None
    if found is not None:
        labels = tuple(found[0])
        logger.info(
            "k-NN of %d test images among %d of %d training images (--num_train_images).",
            *(len(test), len(train), len(splits.train)),
        )
    results = export(
        student,
        Path(args.output or args.model),
        images=batches(test),
        calibration=batches(draw(splits.train, args.calibration_images)),
        train_images=batches(train),
        labels=labels,
        quantization=args.quantize,
        rounds=args.timing_rounds,
        formats=args.formats,
        hub_layout=not args.output,
    )
    return {"results": results, "images": len(test), "bank": len(train) if labels else 0}


def add_to_card(args: ExportArguments) -> None:
    """Show the exported files on the card in the model's folder, where there is one."""
    card = Path(args.model, "README.md")
    if card.is_file():
        backbone = load_backbone(args.model, argument="model", trust_remote_code=args.trust_remote_code)
        subject = Subject(args.model, backbone, load_head(args.model), Path(args.model))
        card.write_text(renewed(card.read_text(), subject))


def table(results: dict[str, dict]) -> str:
    """Return the results as a table in Markdown, one line for each network."""
    exported = next(row for name, row in results.items() if name != "pytorch")
    keys = [key for key in exported if not key.startswith("batch_")]
    lines = [["", *keys, "ms, batch 1", "images/s, batch 1", "ms, batch 64", "images/s, batch 64"]]
    for name, row in results.items():
        line = [name, *(number(key, row.get(key)) for key in keys)]
        for times in (row["batch_1"], row["batch_64"]):
            line += [f"{times['ms']:.2f}", f"{times['images_per_second']:.0f}"]
        lines.append(line)
    return as_markdown(lines)


def number(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if key == "bytes" else f"{value:.6f}"


ARGUMENTS = (DataArguments, ExportArguments)


def main() -> None:
    log_to_console()
    with bad_input_exits():
        data, args = parse(ARGUMENTS)
        record = run(data, args)
    record["versions"] = versions() | versions_of(args.formats)
    record["command"] = command()
    record["quantize"] = args.quantize
    record["head"] = args.head
    record["threads"] = torch.get_num_threads()
    record["advice"] = int8_advice(record["results"])
    record["weights"] = weights_digest(args.model)
    folders = [Path(args.output)] if args.output else [Path(args.model, name) for name in args.formats]
    for folder in folders:
        write_json(folder / RECORD, record)
    if not args.output:
        add_to_card(args)
    print(table(record["results"]))
    if record["advice"]:
        print(record["advice"])
    written = ", ".join(map(str, folders))
    print(f"{record['images']} test images, {record['threads']} threads. Written to {written}.")


if __name__ == "__main__":
    main()
