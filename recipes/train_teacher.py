"""Train a supervised teacher on labelled images.

    python recipes/train_teacher.py --model resnet56 --dataset path/to/labelled/images --output_dir teacher

    python recipes/train_teacher.py --model google/vit-base-patch16-224-in21k --dataset path/to/labelled/images \
        --augmentation imagenet --num_train_epochs 10 --learning_rate 0.01 --output_dir teacher

--model is a CIFAR network, at random weights, or any checkpoint, which gets a new classifier where the classes differ.
The output folder loads with AutoModelForImageClassification, and as --teacher of recipes/distill.py. Defaults are the
paper's for CIFAR-100, but for the rate: a cosine. The paper's steps are --lr_milestones 150 180 210.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import ClassLabel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, set_seed

from coss_hf.cli.parser import bad_input_exits, parse
from coss_hf.data.loading import ImageSplits
from coss_hf.data.processed_images import ProcessedImages
from coss_hf.data.transforms import AUGMENTATIONS
from coss_hf.data.views import ViewDataset, collate_views
from coss_hf.evaluation.evaluator import labelled
from coss_hf.models.backbone import Backbone
from coss_hf.models.cifar.classifier import load_classifier
from coss_hf.reporting.run_record import command, versions, write_json
from coss_hf.trainer.arguments import DataArguments
from coss_hf.trainer.callbacks.epoch import EpochCallback
from coss_hf.trainer.checkpoint_files import find_checkpoint
from coss_hf.trainer.engine import check_graphs, check_processes
from coss_hf.utils.distributed import leave


@dataclass
class TeacherArguments(TrainingArguments):
    """``transformers.TrainingArguments`` with the method's defaults."""

    output_dir: str = field(default="teacher", metadata={"help": "Folder for network and image processor."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace a network that is already there."})
    model: str | None = field(default=None, metadata={"help": "resnet56, resnet32x4, ..., or a Hub name or folder."})
    hidden_sizes: list[int] | None = field(default=None, metadata={"help": "Widths of a CIFAR network's stages."})
    image_size: int | None = field(default=None, metadata={"help": "Input side; default: 32, or the checkpoint's."})
    mean: list[float] | None = field(default=None, metadata={"help": "Of a CIFAR network's input: CIFAR-100's."})
    std: list[float] | None = field(default=None, metadata={"help": "The same."})
    augmentation: str = field(default="cifar", metadata={"help": "Of training.", "choices": list(AUGMENTATIONS)})
    num_train_epochs: float = field(default=240, metadata={"help": "Passes over the training images."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Images a device and step."})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Images a forward pass in evaluation."})
    optim: str = field(default="sgd", metadata={"help": "sgd, or any optimiser of transformers.Trainer."})
    learning_rate: float = field(default=0.05, metadata={"help": "Peak learning rate."})
    momentum: float = field(default=0.9, metadata={"help": "Of SGD."})
    weight_decay: float = field(default=5e-4, metadata={"help": "With SGD on every parameter, as in the paper."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "As in transformers; see lr_milestones."})
    lr_milestones: list[float] | None = field(default=None, metadata={"help": "Epochs where SGD's rate falls tenfold."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "0: no clipping."})
    save_strategy: str = field(default="no", metadata={"help": "Checkpoints; the result is saved in any case."})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Every batch is whole."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off."})


def class_names(splits: ImageSplits) -> list[str]:
    """Names of the classes, by number."""
    if (column := splits.label_column) is None:
        raise ValueError("--label_column: no labels found, and a supervised teacher needs them; name their column.")
    numbers, feature = splits.train[column][:], splits.train.features[column]
    if not labelled(numbers):
        raise ValueError(f"--label_column {column}: some images have no label; leave them out of the training split.")
    return feature.names if isinstance(feature, ClassLabel) else [str(i) for i in range(max(numbers) + 1)]


def prepare(data: DataArguments, args: TeacherArguments) -> tuple[Trainer, Backbone, ImageSplits]:
    """Everything up to the first step; all bad input is found here."""
    check_processes(args)
    check_graphs(args)
    if not args.model:
        raise ValueError("--model is missing; see --help.")
    if Path(args.output_dir, "model.safetensors").exists() and not args.overwrite_output_dir:
        raise ValueError(f"--output_dir={args.output_dir} holds a network: replace it with --overwrite_output_dir.")
    with args.main_process_first(desc="images"):
        splits = data.load()
    set_seed(args.seed)
    shape = {"size": args.image_size, "mean": args.mean, "std": args.std, "hidden_sizes": args.hidden_sizes}
    model, processor = load_classifier(args.model, class_names(splits), **shape)
    backbone = Backbone(model, processor, size=args.image_size, argument="image")  # refuses sizes it cannot take
    views = ViewDataset(splits.train, splits.image_column, args.augmentation, max(backbone.size), seed=args.seed)
    labels = torch.as_tensor(splits.train[splits.label_column][:])
    return build_trainer(model, backbone, labels, args, views), backbone, splits


def build_trainer(model, backbone: Backbone, labels: torch.Tensor, args: TeacherArguments, views) -> Trainer:
    """``labels`` ``(n,)`` are those of the images that ``views`` shows; ``backbone`` is the one within ``model``."""
    step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    if len(views) < step:
        raise ValueError(f"--per_device_train_batch_size: a step takes {step} images, of {len(views)}; lower it.")
    optimizer = scheduler = None
    if args.optim == "sgd":
        parameters = model.to(args.device).parameters()
        optimizer = torch.optim.SGD(parameters, args.learning_rate, args.momentum, weight_decay=args.weight_decay)
    if args.lr_milestones:
        if optimizer is None or max(args.lr_milestones) >= args.num_train_epochs:
            raise ValueError(f"--lr_milestones {args.lr_milestones}: needs --optim sgd, and epochs of this run.")
        drops = [round(epoch * (len(views) // step)) for epoch in args.lr_milestones]
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops)

    def collate(items: list[dict]) -> dict[str, torch.Tensor]:
        batch = collate_views(items)
        return {"pixel_values": backbone.normalize(batch["pixel_values"]), "labels": labels[batch["index"]]}

    options = {"data_collator": collate, "train_dataset": views, "processing_class": backbone.processor}
    trainer = Trainer(model, args, optimizers=(optimizer, scheduler), callbacks=[EpochCallback(views)], **options)
    # Networks that swallow keyword arguments are taken for ones that scale an accumulated loss by themselves.
    trainer.model_accepts_loss_kwargs = False
    return trainer


@torch.no_grad()
def accuracy(model, images: ProcessedImages, labels: torch.Tensor, args: TeacherArguments) -> float:
    """Share of un-augmented images that the classifier gets right."""
    model.eval()
    loader = DataLoader(images, args.per_device_eval_batch_size, num_workers=args.dataloader_num_workers)
    predicted = torch.cat([model(pixel_values=pixels.to(args.device)).logits.argmax(1).cpu() for pixels in loader])
    return (predicted == labels).double().mean().item()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with bad_input_exits():
        data, args = parse((DataArguments, TeacherArguments))
        checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint, files=("config.json",))
        trainer, backbone, splits = prepare(data, args)
    print(f"{backbone!r}, {len(splits.train):,} images", flush=True)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    leave()
    result = {"command": command(), "seed": args.seed, "versions": versions()}
    queries, name = (splits.test, "test") if splits.test else (splits.validation, "validation")
    if not trainer.is_world_process_zero():
        return
    if queries is not None and labelled(queries[splits.label_column][:]):
        images = ProcessedImages(queries, splits.image_column, backbone.preprocess)
        result["accuracy"] = accuracy(trainer.model, images, torch.as_tensor(queries[splits.label_column][:]), args)
        print(f"accuracy on {len(queries):,} {name} images: {100 * result['accuracy']:.1f} %")
    write_json(Path(args.output_dir, "run.json"), result)
    print(f"Teacher written to {args.output_dir}.")


if __name__ == "__main__":
    main()
