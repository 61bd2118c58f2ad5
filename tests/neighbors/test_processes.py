"""The neighbour stage on real processes: the same result on any number, errors on all, and SIGKILL costs a shard."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from coss_hf.neighbors import embedding_store as store
from coss_hf.neighbors import exact_search as searching
from coss_hf.neighbors import recall
from tests.helpers.neighbor_job import CHUNK, COUNT, SHARD, UNIT, add
from tests.helpers.processes import Program

ROOT = Path(__file__).resolve().parents[2]
JOBS = [
    {"k": 7},
    {"neighbors_search": "ivf", "neighbors_recall": 0.999},
    {"neighbors_search": "hnsw", "neighbors_dtype": "float16", "neighbors_keep_embeddings": True},
    {"neighbors_max_similarity": 0.94},
]
LOST = {"lost": [6], "on_bad_image": "skip"}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(store, "SHARD", SHARD)
    monkeypatch.setattr(store, "STEP", SHARD)
    monkeypatch.setattr(searching, "CHUNK", CHUNK)
    monkeypatch.setattr(recall, "SAMPLE_UNIT", UNIT)


def start(folder, jobs, world=2):
    program = ROOT / "tests" / "helpers" / "neighbor_job.py"
    return [Program([program, world, rank, folder, json.dumps(jobs)]) for rank in range(world)]


def test_two_processes_find_what_one_finds(tmp_path):
    processes = start(tmp_path, [*JOBS, {"broken": 6}, {"k": COUNT}, LOST])
    assert [process.wait(timeout=200) for process in processes] == [0, 0]
    for number, job in enumerate(JOBS):
        neighbors, meta, passes = add(tmp_path / "alone", **job)
        both = [json.loads((tmp_path / f"{number}-{rank}.json").read_text()) for rank in range(2)]
        for rank in range(2):
            assert (np.load(tmp_path / f"{number}-{rank}.npy") == neighbors).all()
            assert {key: value for key, value in both[rank]["meta"].items() if key != "processes"}.keys() <= meta.keys()
        shared = ("recall", "probes", "lists", "fewer", "none")
        assert all(both[0]["meta"].get(key) == meta.get(key) for key in shared)
        # 100 shards of 4 rows, each in batches of 3 and 1, shared evenly.
        assert passes == 200 and [result["passes"] for result in both] == [100, 100], number
    assert (meta["fewer"] > 0) and (neighbors < 0).any(), "the last job leaves images out"
    # One process found the bad row, in the second shard; both say so. What finished stays.
    broken = [json.loads((tmp_path / f"{len(JOBS)}-{rank}.json").read_text())["error"] for rank in range(2)]
    assert broken[0] == broken[1] and ": row 6." in broken[0]
    late = [json.loads((tmp_path / f"{len(JOBS) + 1}-{rank}.json").read_text())["error"] for rank in range(2)]
    assert late[0] == late[1] and f"k={COUNT}" in late[0]
    left = sorted(path.name for path in (tmp_path / "cache").iterdir() if path.name.startswith("embeddings-"))
    assert len(left) == 3  # those kept on purpose, those of the broken job, and those next to the lost image
    # An image that is gone is replaced for all by the same other one, next to which it then lies.
    neighbors, _, _ = add(tmp_path / "lost alone", **LOST)
    assert all((np.load(tmp_path / f"{len(JOBS) + 2}-{rank}.npy") == neighbors).all() for rank in range(2))
    assert neighbors[neighbors[6, 0], 0] == 6
    assert not list((tmp_path / "cache").glob("*.lock"))


def test_killed_while_embedding(tmp_path):
    """SIGKILL to two processes when some shards are there; one does the rest, and finds the same."""
    processes = start(tmp_path, [{"seconds": 0.03}])
    some = np.random.default_rng().uniform(0.05, 0.7) * COUNT / SHARD
    deadline = time.time() + 120
    while len(done := list((tmp_path / "cache").glob("embeddings-*/[0-9]*.npy"))) < some:
        assert time.time() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.01)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    assert [process.wait() for process in processes] == [-signal.SIGKILL] * 2
    (folder,) = (path for path in (tmp_path / "cache").glob("embeddings-*") if path.is_dir())
    done = {path.name: path.stat().st_mtime_ns for path in folder.glob("[0-9]*.npy")}
    assert 0 < len(done) < COUNT / SHARD
    resumed, _, passes = add(tmp_path / "cache", neighbors_keep_embeddings=True)
    assert passes == 2 * (COUNT / SHARD - len(done)), "finished shards are not embedded again"
    assert all((folder / name).stat().st_mtime_ns == written for name, written in done.items())
    uninterrupted, _, passes = add(tmp_path / "alone", neighbors_keep_embeddings=True)
    assert passes == 2 * COUNT / SHARD and (resumed == uninterrupted).all()
    (other,) = (tmp_path / "alone").glob("embeddings-*")
    for path in other.glob("*.npy"):
        assert (folder / path.name).read_bytes() == path.read_bytes()
