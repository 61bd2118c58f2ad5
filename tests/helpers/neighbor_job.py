"""One process of a neighbour search: python -m tests.helpers.neighbor_job WORLD RANK FOLDER JOBS.

JOBS is a JSON list of what `add` below takes. Each job leaves its neighbours (the processes' own copies), or its error,
in FOLDER.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from coss_hf.neighbors import embedding_store as store
from coss_hf.neighbors import exact_search as searching
from coss_hf.neighbors import recall
from coss_hf.neighbors.mining import nearest_neighbors
from coss_hf.neighbors.options import SearchOptions
from tests.helpers.neighbors import TinyBackbone, image_dataset

COUNT = 400  # images: 100 shards of 4 rows, 13 chunks of 32 queries
SHARD, CHUNK, UNIT = 4, 32, 64


class SlowBackbone(TinyBackbone):
    """Takes its time, counts its passes, and makes NaN of one image."""

    def __init__(self, seconds=0.0, broken=None):
        super().__init__("broken" if broken is not None else "a")
        self.seconds, self.broken, self.passes = seconds, broken, 0

    def features(self, pixel_values):
        time.sleep(self.seconds)
        self.passes += 1
        features = super().features(pixel_values)
        if self.broken is not None:
            image = np.random.default_rng(self.broken).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            bad = super().features(self.preprocess([image])).embedding
            features.embedding[(features.embedding == bad).all(dim=1)] = torch.nan
        return features


def add(cache, k=5, seconds=0.0, broken=None, lost=(), on_bad_image="error", **options):
    """Neighbours, what was measured, and the number of forward passes."""
    backbone = SlowBackbone(seconds, broken)
    found = nearest_neighbors(
        image_dataset(range(COUNT), lost),
        backbone,
        "picture",
        k=k,
        options=SearchOptions(**options),
        cache_dir=cache,
        batch_size=3,
        on_bad_image=on_bad_image,
    )
    return *found, backbone.passes


def small():
    """Many small shards and chunks, in place of few large ones."""
    store.STEP = store.SHARD = SHARD
    searching.CHUNK = CHUNK
    recall.SAMPLE_UNIT = UNIT


def main():
    world, rank, folder, jobs = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
    torch.set_num_threads(1)
    small()
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    for number, job in enumerate(jobs):
        try:
            neighbors, meta, passes = add(folder / "cache", **job)
            np.save(folder / f"{number}-{rank}.npy", neighbors)
            result = {"meta": meta, "passes": passes}
        except ValueError as error:
            result = {"error": str(error)}
        (folder / f"{number}-{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
