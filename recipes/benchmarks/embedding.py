"""Measure what embedding for the neighbour search costs beyond the teacher's bare forward passes.

    python recipes/benchmarks/embedding.py --output neighbor_embedding.json

The stage reads encoded images (PNG, of the network's own size: nothing to resize), decodes and pre-processes them,
embeds them, and writes shards; the bare loop runs the same network over tensors in memory. Both take turns over the
same images, in one process; the ratio (bare / stage; 1 if both are as fast) is the median of the pairs.
"""

import argparse
import io
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import torch
from transformers import AutoModel, ViTConfig, ViTImageProcessor

from coss_hf.data.processed_images import ProcessedImages
from coss_hf.models.cifar.modeling_cifar_resnet import CifarResNetModel
from coss_hf.models.cifar.registry import cifar_config, cifar_image_processor
from coss_hf.models.embedding import embed_batches
from coss_hf.models.loading import load_backbone
from coss_hf.neighbors.embedding_store import embed_shards

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def make_teacher(name: str, folder: str):
    """Return resnet56 for 32 pixels, or a ViT-S/16 for 224, at random weights."""
    if name == "resnet56":
        CifarResNetModel(cifar_config(name)).save_pretrained(folder)
        cifar_image_processor(*IMAGENET).save_pretrained(folder)
    else:
        config = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
        AutoModel.from_config(config).save_pretrained(folder)
        ViTImageProcessor().save_pretrained(folder)
    return load_backbone(folder).freeze()


def pictures(count: int, size: int) -> datasets.Dataset:
    """Return encoded images, smooth ones, of a photograph's size on disk."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(count):
        small = PIL.Image.fromarray(rng.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((size, size), PIL.Image.BICUBIC).save(buffer, "PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    return datasets.Dataset.from_dict({"image": encoded}, features=datasets.Features({"image": datasets.Image()}))


def measure(name: str, images: int, pairs: int, batch_size: int, num_workers: int) -> dict:
    """Return the median speed of both, and the spread of their paired ratio."""
    with tempfile.TemporaryDirectory() as folder:
        teacher = make_teacher(name, f"{folder}/{name}")
        rows = ProcessedImages(pictures(images, teacher.size[0]), "image", teacher.preprocess)
        tensors = torch.stack(rows.__getitems__(range(images))).split(batch_size)
        taken = []
        for turn in range(pairs + 1):
            start = time.perf_counter()
            embed_shards(teacher, rows, Path(folder, str(turn)), batch_size=batch_size, num_workers=num_workers)
            middle = time.perf_counter()
            for _ in embed_batches(teacher, tensors):
                pass
            taken.append((middle - start, time.perf_counter() - middle))
        taken = taken[1:]  # the first warms up
    ratios = sorted(bare / stage for stage, bare in taken)
    return {
        "teacher": name,
        "images": images,
        "batch_size": batch_size,
        "num_workers": num_workers,
        "pairs": pairs,
        "stage_images_per_second": round(images / statistics.median(stage for stage, _ in taken), 1),
        "bare_images_per_second": round(images / statistics.median(bare for _, bare in taken), 1),
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_range": [round(ratios[0], 4), round(ratios[-1], 4)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--images", type=int, nargs=2, default=[2048, 192], help="of resnet56, of ViT-S/16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--note", default="", help="on the state of the machine, kept with the figures")
    parser.add_argument("--output", help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = [
        measure(name, images, options.pairs, batch_size, options.num_workers)
        for name, images, batch_size in zip(("resnet56", "vit-s/16"), options.images, (256, 32), strict=True)
    ]
    report = {
        "command": "python recipes/benchmarks/embedding.py " + " ".join(sys.argv[1:]).split(" --note")[0],
        "machine": f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}",
        "note": options.note,
        "results": results,
    }
    print(json.dumps(report, indent=2))
    if options.output:
        Path(options.output).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
