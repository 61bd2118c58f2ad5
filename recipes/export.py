"""Export a network to ONNX, checked against PyTorch on real images, with its latency and, if asked, in int8.

    python recipes/export.py --model my-student --output my-student/onnx --dataset path/to/images --quantize static

The graph maps `pixel_values` (batch, 3, h, w) to `embedding` (batch, d), pooling (and with --head the projection into
the teacher's space) inside. `dynamic` quantisation suits transformers; `static`, calibrated on training images,
convolutional networks. Figures are of the test split (else what --validation_size, or by default the model's own run,
held out of train), printed and written to export.json.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from coss_hf.cli import bad_input_exits, parse
from coss_hf.data.processed_images import ProcessedImages
from coss_hf.hub.export import QUANTIZATIONS, export, onnx_packages
from coss_hf.models.heads import HEAD_FILE, load_head
from coss_hf.models.loading import load_backbone
from coss_hf.models.student import Student
from coss_hf.reporting.run_record import command, versions, write_json
from coss_hf.trainer.arguments import DataArguments


@dataclass
class ExportArguments:
    """What is exported, and how it is measured."""

    model: str | None = field(default=None, metadata={"help": "Hub name or folder."})
    output: str | None = field(default=None, metadata={"help": "Folder to write."})
    head: bool = field(default=False, metadata={"help": "With the projection head beside the model."})
    quantize: str = field(default="none", metadata={"help": "Also in int8.", "choices": list(QUANTIZATIONS)})
    pooling: str = field(default="auto", metadata={"help": "auto, cls, mean, pooler or gap."})
    num_images: int = field(default=1000, metadata={"help": "Test images to compare on, at most."})
    calibration_images: int = field(default=200, metadata={"help": "Training images for static quantisation."})
    timing_rounds: int = field(default=20, metadata={"help": "Timed runs of each batch size."})
    batch_size: int = field(default=50, metadata={"help": "Images a forward pass."})


def check(args: ExportArguments) -> None:
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


def run(data: DataArguments, args: ExportArguments) -> dict:
    check(args)
    onnx_packages()
    backbone = load_backbone(args.model, argument="model", pooling=args.pooling).freeze()
    head = load_head(args.model) if args.head else None
    if args.head and head is None:
        raise ValueError(f"--head: there is no {HEAD_FILE} in {args.model}; leave it out.")
    student = Student(backbone, head)
    data.follow(args.model)
    splits = data.load()
    test = splits.test or splits.validation
    if test is None:
        raise ValueError(
            f"--dataset {data.dataset} has no test split: name one with --test_split, or hold images out "
            f"of train with --validation_size."
        )

    def some(rows, count: int):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]
        return rows.select(sorted(order.tolist()))

    def batches(rows):
        return DataLoader(ProcessedImages(rows, splits.image_column, backbone.preprocess), args.batch_size)

    test, labels, column = some(test, args.num_images), None, splits.label_column
    if column and not {None, -1} & {*splits.train[column], *test[column]}:
        labels = torch.tensor(splits.train[column]), torch.tensor(test[column])
    results = export(
        student,
        Path(args.output),
        images=batches(test),
        calibration=batches(some(splits.train, args.calibration_images)),
        train_images=batches(splits.train),
        labels=labels,
        quantization=args.quantize,
        rounds=args.timing_rounds,
    )
    return {"results": results, "images": len(test), "bank": len(splits.train) if labels else 0}


def table(results: dict[str, dict]) -> str:
    keys = [key for key in results["onnx"] if not key.startswith("batch_")]
    header = ["", *keys, *(f"{unit}, batch {n}" for n in (1, 64) for unit in ("ms", "images/s"))]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    for name, row in results.items():
        cells = ["-" if row.get(k) is None else f"{row[k]:,}" if k == "bytes" else f"{row[k]:.6f}" for k in keys]
        for n in (1, 64):
            cells += [f"{row[f'batch_{n}']['ms']:.2f}", f"{row[f'batch_{n}']['images_per_second']:.0f}"]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with bad_input_exits():
        data, args = parse((DataArguments, ExportArguments))
        record = run(data, args)
    onnx, onnxruntime = onnx_packages()
    record["versions"] = versions() | {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    record |= {"command": command(), "quantize": args.quantize, "threads": torch.get_num_threads()}
    write_json(Path(args.output, "export.json"), record)
    print(table(record["results"]))
    print(f"{record['images']} test images, {record['threads']} threads. Written to {args.output}.")


if __name__ == "__main__":
    main()
