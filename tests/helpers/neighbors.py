"""A tiny teacher and tiny images for the tests of neighbours."""

import hashlib
import io

import datasets
import numpy as np
import PIL.Image
import pyarrow
import torch

from coss_hf.features import Features

N, K = 24, 5


class TinyBackbone:
    """A teacher that averages an image over a grid: what add_neighbors needs of a Backbone, and nothing learnt."""

    def __init__(self, weights="a"):
        self.weights = weights
        self.model = torch.nn.Linear(1, 1)  # only asked for its device and precision
        self.name, self.pooling, self.dim = "tiny", "gap", 12

    def preprocess(self, images):
        return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images])

    def features(self, pixel_values):
        return Features(torch.nn.functional.adaptive_avg_pool2d(pixel_values, 2).flatten(1))

    def fingerprint(self):
        return hashlib.sha256(self.weights.encode()).hexdigest()

    def code(self):
        return ""


def image_dataset(seeds, lost=()):
    """One PNG a seed, hashed as load_images does: equal seeds are equal images. Those ``lost`` went since."""
    encoded = []
    for seed in seeds:
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        PIL.Image.fromarray(pixels).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    hashes = [int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") for data in encoded]
    kept = [b"" if seed in lost else data for seed, data in zip(seeds, encoded)]
    features = datasets.Features(
        picture=datasets.Image(decode=False), image_hash=datasets.Value("uint64"), name=datasets.Value("string")
    )
    rows = [
        pyarrow.array([{"bytes": data, "path": None} for data in kept], features["picture"].pa_type),
        pyarrow.array(hashes, pyarrow.uint64()),  # Dataset.from_dict refuses integers above 2**63
        pyarrow.array([f"{seed}.png" for seed in seeds]),
    ]
    return datasets.Dataset(pyarrow.table(rows, names=list(features)), split="train").cast(features)
