"""Tiny networks and images that several tests share."""

import contextlib
import importlib.util
import io
import os
import resource
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModel,
    SwinConfig,
    SwinModel,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from coss_hf.data.loading import load_images
from coss_hf.models.cifar.configuration_cifar_resnet import CifarResNetConfig
from coss_hf.models.loading import load_backbone
from coss_hf.trainer.factory import build_trainer
from coss_hf.trainer.training_args import DistillationArguments
from coss_hf.utils.messages import command_line
from tests.helpers.processes import Program

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "recipes" / "benchmarks"
COLOURS = np.array([(200, 40, 40), (40, 180, 60), (50, 60, 210), (120, 120, 120)])


def load_benchmark(name: str, monkeypatch):
    """The module of a benchmark, which imports those beside it, as its command does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where its dataclasses look for their names
    spec.loader.exec_module(module)
    return module


def colour_images(count: int, seed: int, size: int = 16):
    """PIL images of four noisy colours, and which colour each is."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    pixels = COLOURS[labels][:, None, None] + rng.normal(0, 30, (count, size, size, 3))
    return [Image.fromarray(x.clip(0, 255).astype(np.uint8)) for x in pixels], labels.tolist()


def write_images(folder, seed: int = 0, train: int = 48):
    """Folder with train.parquet (48 images of 4 colours by default) and test.parquet (24), 16x16, labelled."""
    names = datasets.ClassLabel(names=["red", "green", "blue", "grey"])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    folder.mkdir()
    for split, count, start in (("train", train, seed), ("test", 24, seed + 1)):
        images, labels = colour_images(count, start)
        rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        rows.to_parquet(folder / f"{split}.parquet")
    return folder


def write_shards(folder: Path, kind: str, counts=(12, 12, 12, 12), start: int = 0) -> Path:
    """Shards of different labelled images 16x16, of the given sizes, as tar or parquet files."""
    folder.mkdir(parents=True)
    images, labels = colour_images(sum(counts), seed=start)
    number = 0
    names = datasets.ClassLabel(names=["red", "green", "blue", "grey"])
    for shard, count in enumerate(counts):
        rows = list(range(number, number + count))
        number += count
        if kind == "parquet":
            features = datasets.Features({"image": datasets.Image(), "label": names})
            columns = {"image": [images[row] for row in rows], "label": [labels[row] for row in rows]}
            datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{shard:02d}.parquet")
            continue
        with tarfile.open(folder / f"{shard:02d}.tar", "w") as tar:
            for row in rows:
                buffer = io.BytesIO()
                images[row].save(buffer, "png")
                for name, data in (
                    (f"{row:04d}.png", buffer.getvalue()),
                    (f"{row:04d}.cls", str(labels[row]).encode()),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def processor(size: int = 16, mean: float = 0.5):
    return ViTImageProcessor(size={"height": size, "width": size}, image_mean=[mean] * 3, image_std=[0.25] * 3)


def save_resnet(folder, seed: int = 0, hidden_sizes=(4, 8, 16)):
    torch.manual_seed(seed)
    config = CifarResNetConfig(depth=8, stem_width=hidden_sizes[0], hidden_sizes=list(hidden_sizes), image_size=16)
    AutoModel.from_config(config).save_pretrained(folder)
    processor().save_pretrained(folder)
    return str(folder)


def save_vit(folder, seed: int = 0, hidden_size: int = 16, layers: int = 2, **options):
    """A classification checkpoint: it lacks the pooler that AutoModel then invents."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        num_labels=4,
        **options,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    processor(mean=0.4).save_pretrained(folder)
    return str(folder)


def save_swin(folder, seed: int = 0, **options):
    torch.manual_seed(seed)
    sizes = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
    SwinModel(SwinConfig(image_size=16, patch_size=4, **sizes, **options)).save_pretrained(folder)
    processor(mean=0.4).save_pretrained(folder)
    return str(folder)


def distill_words(world: dict, output, *argv, processes: int, **options) -> list[str]:
    """Options of recipes/distill.py for 48 images: 16 anchors and their neighbours a step, 3 steps an epoch."""
    options = {
        "teacher": world["teacher"],
        "student": world["student"],
        "dataset": world["images"],
        "neighbors_cache": world["cache"],
        "output_dir": output,
        "settings": "paper",
        "per_device_train_batch_size": 16 // processes,
        "augmentation": "cifar",
        "learning_rate": 0.005,
        "neighbors_k": 1,
        "neighbors_pool": 4,
        "save_strategy": "steps",
        "save_steps": 4,
        "disable_tqdm": True,
    } | options
    return [*(f"--{key}={value}" for key, value in options.items()), *argv]


def start_distill(world: dict, output, *argv, processes: int, **options):
    """Starts recipes/distill.py with ``distill_words``."""
    return start_program(distill_words(world, output, *argv, processes=processes, **options), processes)


def start_program(words: list[str], processes: int, launcher: bool = False):
    """Starts recipes/distill.py; with ``launcher`` as a user does, by ``accelerate launch``."""
    words = [f"{ROOT}/recipes/distill.py", *words]
    if not launcher:
        return Program(words, processes=processes)
    launch = ("-m", "accelerate.commands.launch", "--config_file", f"{ROOT}/accelerate_configs/cpu.yaml")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *launch, *words], env=environment, start_new_session=True, **pipes)


@contextlib.contextmanager
def no_file_larger_than(size: int):
    """For this process, and those started inside: writing more fails with an error, as on a full disk.

    No bytecode is written: Python would cut it off without an error, for all later processes.
    """
    bytecode = (sys.dont_write_bytecode, os.environ.get("PYTHONDONTWRITEBYTECODE", ""))
    sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # inherited, like the limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
        sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = bytecode


@command_line()
def make_trainer(
    tmp_path, images, teacher: str, student: str, *, evaluator=None, criterion=None, neighbors=None, data=None, **args
):
    """A trainer on the tiny images; ``args`` override the defaults of a short, quiet run on the CPU."""
    options = {
        "output_dir": str(tmp_path / "out"),
        "settings": "paper",
        "per_device_train_batch_size": 8,
        "max_steps": 6,
        "learning_rate": 0.01,
        "augmentation": "cifar",
        "save_strategy": "no",
        "logging_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    args = DistillationArguments(**{**options, **args})
    splits = load_images(str(images), validation_size=0)
    teacher = load_backbone(teacher, argument="teacher")
    student = load_backbone(student, argument="student")
    evaluator = evaluator(splits, teacher) if evaluator else None
    neighbors = neighbors if args.neighbors_k else None  # which are refused where none of them are drawn
    return build_trainer(
        splits,
        args,
        teacher=teacher,
        student=student,
        data=data,
        neighbors=neighbors,
        evaluator=evaluator,
        criterion=criterion,
    )


def state(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same(a: dict, b: dict, but: str = "") -> None:
    """Bit for bit; names that contain ``but`` are left out."""
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name]) and not (but and but in name)]
    assert not different, different


# An untrained pooler, which no embedding reads, is settled in what is saved and not in memory: a ViT's differ.
UNTRAINED = "pooler.dense"


class Recorder(TrainerCallback):
    """Keeps every batch that the loss was computed from."""

    def __init__(self, trainer):
        self.batches, self.epochs = [], []
        compute = trainer.compute_loss

        def wrapped(model, inputs, **kwargs):
            self.batches.append({key: value.clone() for key, value in inputs.items()})
            self.epochs.append(trainer.train_dataset.epoch)
            return compute(model, inputs, **kwargs)

        trainer.compute_loss = wrapped


class StopAfter(TrainerCallback):
    """Ends the training after a step, as if it had been killed there."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True
