"""Measure how many views a second one core makes of photographs, decoded in full, at a reduced scale, and from a copy.

    python recipes/benchmarks/decoding.py --output decoding.json

JPEGs of 4000 x 3000 and of 500 x 375 pixels, of made-up textures; views of 224 pixels. Ways:

    former   the full photograph is decoded and, for `imagenet`, made a tensor before it is cropped
    full     --reduced_decoding False: only the crop is made a tensor; the same pixels as `former`
    reduced  the default: decoded at the smallest scale at which the crop has the pixels of the view
    copy     from a copy with a shorter side of 288 pixels, as coss-hf prepare writes it

Rounds run all ways one after another; the medians over rounds are kept, with the mean difference of pixels between
`reduced` and `full`. (Crops of a copy are other ones: their corners are drawn at integer pixels.)
"""

import argparse
import json
import statistics
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from torchvision.transforms import v2
from trainer_step import machine

from coss_hf.data.decoding import decode
from coss_hf.data.smaller_copy import smaller_image
from coss_hf.data.views import ViewDataset

VIEW = 224
COPY = 288
SIZES = {"4000x3000": (4000, 3000, 4), "500x375": (500, 375, 32)}  # and number of images
QUALITY = 90


def photograph(seed: int, width: int, height: int) -> dict:
    """Return a JPEG of textures at all scales, down to two pixels."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for octave in range(3, 1 + int(np.log2(width))):
        cells = rng.normal(0, 1, (2**octave, 2**octave, 3)).astype(np.float32)
        bands = [Image.fromarray(cells[..., band]).resize((width, height), Image.BICUBIC) for band in range(3)]
        pixels += np.stack(bands, 2) * 60 / (octave - 1)
    buffer = BytesIO()
    Image.fromarray((128 + pixels).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
    return {"bytes": buffer.getvalue(), "path": None}


def rows_of(records: list[dict]) -> Dataset:
    features = Features({"image": ImageFeature(decode=False), "image_hash": Value("uint64")})
    return Dataset.from_dict({"image": records, "image_hash": range(len(records))}, features=features)


def former(views: ViewDataset) -> v2.Transform:
    """Return the augmentation of earlier versions."""
    if views.augmentation_name == "imagenet":
        return v2.Compose([v2.PILToTensor(), v2.RandomResizedCrop(VIEW), v2.RandomHorizontalFlip()])
    return v2.Compose([v2.RandomResizedCrop(VIEW, (0.2, 1.0)), *views.augment.transforms[1:]])


def measure(records: list[dict], augmentation: str, rounds: int) -> dict:
    """Return views a second by the way they are made, and how much reduced views differ."""
    copies = [{"bytes": smaller_image(record, COPY, 95), "path": None} for record in records]
    ways = {
        "full": ViewDataset(rows_of(records), "image", augmentation, VIEW, reduced_decoding=False),
        "reduced": ViewDataset(rows_of(records), "image", augmentation, VIEW),
        "copy": ViewDataset(rows_of(copies), "image", augmentation, VIEW),
    }
    transform = former(ways["full"])
    rates: dict[str, list[float]] = {"former": [], **{way: [] for way in ways}}
    differences = []
    for epoch in range(rounds):
        start = time.perf_counter()
        for record in records:
            transform(decode(record))
        rates["former"].append(len(records) / (time.perf_counter() - start))
        found = {}
        for way, views in ways.items():
            views.set_epoch(epoch)
            start = time.perf_counter()
            items = views.__getitems__(list(range(len(records))))
            rates[way].append(len(records) / (time.perf_counter() - start))
            found[way] = torch.stack([item["pixel_values"][0] for item in items]).float()
        differences.append((found["reduced"] - found["full"]).abs().mean().item())
    return {
        "views_per_second": {way: round(statistics.median(values), 1) for way, values in rates.items()},
        "mean_difference_of_255": round(statistics.fmean(differences), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "command": f"python recipes/benchmarks/decoding.py --rounds {options.rounds}",
        "machine": machine(),
    }
    for name, (width, height, count) in SIZES.items():
        records = [photograph(seed, width, height) for seed in range(count)]
        size = round(statistics.fmean(len(record["bytes"]) for record in records) / 1000)
        result[name] = {"kilobytes": size}
        for augmentation in ("imagenet", "moco"):
            result[name][augmentation] = measure(records, augmentation, options.rounds)
            print(name, augmentation, result[name][augmentation], flush=True)
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
