"""Export a network to ONNX, in int8 as well on request, and compare it with PyTorch on real images.

    python recipes/export.py --model my-student --output my-student/onnx --dataset path/to/images --quantize static

The graph maps `pixel_values` (batch, 3, h, w) to `embedding` (batch, d); it includes pooling, and with --head the
projection to the teacher's space. `dynamic` quantisation suits transformers; `static`, calibrated on training images,
suits convolutional networks. Agreement and latency are measured on the test split (without one, on images that
--validation_size, or by default the model's own run, held out of train), printed and written to export.json.
"""

from coss_hf.cli.help import show_help

show_help(__name__, "export")

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from coss_hf.cli import bad_input_exits, log_to_console, parse
from coss_hf.data.labels import class_numbers
from coss_hf.data.processed_images import ProcessedImages
from coss_hf.hub.export import QUANTIZATIONS, export, int8_advice, onnx_packages
from coss_hf.hub.student import Student
from coss_hf.models.heads import HEAD_FILE, load_head
from coss_hf.models.loading import load_backbone
from coss_hf.reporting.run_record import command, versions, write_json
from coss_hf.study.tables import as_markdown
from coss_hf.trainer.arguments import DataArguments


@dataclass
class ExportArguments:
    """What is exported, and how it is measured."""

    model: str | None = field(default=None, metadata={"help": "Hub name or folder of the network to export."})
    output: str | None = field(
        default=None, metadata={"help": "Folder to which the ONNX files and export.json are written."}
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
    num_images: int = field(default=1000, metadata={"help": "Largest number of test images to compare on."})
    calibration_images: int = field(
        default=200, metadata={"help": "Number of training images that calibrate static quantisation."}
    )
    timing_rounds: int = field(default=20, metadata={"help": "Number of timed runs of each batch size."})
    batch_size: int = field(default=50, metadata={"help": "Number of images per forward pass."})


def check(args: ExportArguments) -> None:
    """Raise ``ValueError`` for arguments that cannot be used."""
    for name in ("model", "output"):
        if not getattr(args, name):
            raise ValueError(f"--{name} is missing; see --help.")
    for name in ("num_images", "calibration_images", "timing_rounds", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: give 1 or more.")
    if Path(args.output).is_file():
        raise ValueError(f"--output {args.output} is a file; give the name of a folder.")
    if args.output and Path(args.output).resolve() == Path(args.model).resolve():
        raise ValueError(f"--output {args.output} is the model's own folder; give another, such as {args.model}/onnx.")


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
    onnx_packages()
    backbone = load_backbone(args.model, argument="model", pooling=args.pooling).freeze()
    head = load_head(args.model) if args.head else None
    if args.head and head is None:
        raise ValueError(f"--head: there is no {HEAD_FILE} in {args.model}; leave it out.")
    student = Student(backbone, head)
    data = data.follow(args.model)
    splits = data.load()
    test = splits.test or splits.validation
    if test is None:
        raise ValueError(
            f"--dataset {data.dataset} has no test split: name one with --test_split, or hold images out "
            f"of train with --validation_size."
        )

    def batches(rows: Dataset) -> DataLoader:
        return DataLoader(ProcessedImages(rows, splits.image_column, backbone.preprocess), args.batch_size)

    test = draw(test, args.num_images)
    labels = None
    column = splits.label_column
    found = class_numbers(column, splits.train, test) if column else None
    if found is not None:
        labels = tuple(found[0])
    results = export(
        student,
        Path(args.output),
        images=batches(test),
        calibration=batches(draw(splits.train, args.calibration_images)),
        train_images=batches(splits.train),
        labels=labels,
        quantization=args.quantize,
        rounds=args.timing_rounds,
    )
    return {"results": results, "images": len(test), "bank": len(splits.train) if labels else 0}


def table(results: dict[str, dict]) -> str:
    """Return the results as a table in Markdown, one line for each network."""
    keys = [key for key in results["onnx"] if not key.startswith("batch_")]
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
    onnx, onnxruntime = onnx_packages()
    record["versions"] = versions() | {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    record["command"] = command()
    record["quantize"] = args.quantize
    record["threads"] = torch.get_num_threads()
    record["advice"] = int8_advice(record["results"])
    write_json(Path(args.output, "export.json"), record)
    print(table(record["results"]))
    if record["advice"]:
        print(record["advice"])
    print(f"{record['images']} test images, {record['threads']} threads. Written to {args.output}.")


if __name__ == "__main__":
    main()
