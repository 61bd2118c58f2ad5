"""Measure exact and approximate neighbour search: seconds, recall@10 and peak memory.

    python recipes/benchmarks/neighbor_search.py --sizes 50000 200000 1000000 --output neighbor_search.json

Vectors are synthetic and clustered (one centre per 50 images, noise half as long as the centre: cosine 0.8 within a
cluster, 0 across), of unit length and 256 numbers, on disk as the embedding stage leaves them; with --vectors FOLDER
they are real ones, which recipes/neighbors.py --neighbors_keep_embeddings left. Each search runs in a process of its
own, on one thread, so that its peak memory (VmHWM, libraries and mapped files included) is its own. Exact search is
timed on all queries up to --exact_up_to vectors; of more vectors on 2,000 queries, and extrapolated. Ratios: CPU
seconds of approximate to exact search of the same size, in turns (other programs do not count), and memory to vectors
plus index.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from coss_hf.neighbors.embedding_store import Vectors, save_array, shard_rows
from coss_hf.neighbors.exact_search import ExactSearch, search_all
from coss_hf.neighbors.mining import search_vectors
from coss_hf.neighbors.options import SearchOptions
from coss_hf.neighbors.recall import random_rows
from coss_hf.utils.process_group import Processes

DIM = 256
K = 10
QUERIES = 2_000


def make(folder: Path, n: int, dtype: str) -> None:
    """Write clustered unit rows in shards, one shard in memory at a time."""
    folder.mkdir()
    centres = np.random.default_rng(0).standard_normal((n // 50, DIM), dtype=np.float32)
    for number, start in enumerate(range(0, n, shard_rows(n))):
        rng = np.random.default_rng([1, number])
        rows = min(shard_rows(n), n - start)
        shard = centres[rng.integers(len(centres), size=rows)] + rng.standard_normal((rows, DIM), dtype=np.float32) / 2
        save_array(folder / f"{number:05d}.npy", (shard / np.linalg.norm(shard, axis=1, keepdims=True)).astype(dtype))


def memory(kind: str) -> int:
    """Return the bytes that this process holds (VmRSS) or has held at most (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def one(folder: Path, kind: str, dtype: str, exact_up_to: int) -> dict:
    """Run a search in this process."""
    vectors = Vectors([np.load(path, mmap_mode="c") for path in sorted(folder.glob("[0-9]*.npy"))])
    n, dim = vectors.shape
    before = memory("VmRSS")
    start = time.perf_counter()
    cpu = time.process_time()
    result = {
        "images": n,
        "dim": dim,
        "search": kind,
        "dtype": dtype,
        "vectors_mb": round(n * dim * np.dtype(dtype).itemsize / 1e6),
    }
    if kind == "exact" and n > exact_up_to:
        rows = random_rows(n, QUERIES)
        exact = ExactSearch(vectors)
        for first in range(0, len(rows), 1024):
            exact(rows[first : first + 1024], K)
        seconds = round(time.perf_counter() - start, 1)
        result["queries"] = len(rows)
        result["seconds"] = seconds
        result["seconds_of_all"] = round(seconds * n / len(rows))
    elif kind == "exact":
        search_all(ExactSearch(vectors), K)
        result["recall"] = 1.0
        result["seconds"] = round(time.perf_counter() - start, 1)
    else:
        with tempfile.TemporaryDirectory(dir=folder) as work:
            options = SearchOptions(neighbors_dtype=dtype)
            _, found = search_vectors(vectors, K, kind, options, Path(work), processes=Processes(alone=True))
            result |= found
            result["search"] = kind
            result["taken"] = found.get("search", kind)
            result["seconds"] = round(time.perf_counter() - start, 1)
            result["index_mb"] = round(os.path.getsize(Path(work, f"{kind}.index")) / 1e6)
    peak = memory("VmHWM")
    result["peak_mb"] = round(peak / 1e6)
    result["of_which_libraries_mb"] = round(before / 1e6)
    result["cpu_seconds"] = round(time.process_time() - cpu, 1)
    needed = result["vectors_mb"] + result.get("index_mb", 0)
    result["peak_to_vectors_and_index"] = round(peak / 1e6 / needed, 3)
    return result


def run_one(data: Path, kind: str, options: argparse.Namespace) -> dict:
    """Run a search in a fresh process, on one thread."""
    command = [sys.executable, __file__, "--one", str(data), kind, options.dtype, str(options.exact_up_to)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout)
    print(json.dumps(result), flush=True)
    return result


def measure(folder: Path, options: argparse.Namespace, n: int) -> list[dict]:
    """Run all searches of one size, interleaved, and return the median run of each."""
    data = Path(options.vectors) if options.vectors else folder / str(n)
    if not options.vectors:
        make(data, n, options.dtype)
    rounds = {kind: [] for kind in options.searches}
    for _ in range(options.rounds if n <= options.exact_up_to else 1):
        for kind, runs in rounds.items():
            runs.append(run_one(data, kind, options))
    exact = [run["cpu_seconds"] * n / run.get("queries", n) for run in rounds.get("exact", [])]
    results = []
    for runs in rounds.values():
        ratios = [run["cpu_seconds"] / seconds for run, seconds in zip(runs, exact, strict=False)]
        median = sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]
        if runs[0]["search"] != "exact" and ratios:
            median["cpu_seconds_to_exact"] = round(statistics.median(ratios), 4)
        results.append({"data": "real" if options.vectors else "synthetic", **median, "rounds": len(runs)})
    for path in folder.glob("*/*.npy"):
        path.unlink()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[50_000, 200_000, 1_000_000])
    parser.add_argument("--vectors", help="folder of shards of real unit vectors, instead of synthetic ones")
    parser.add_argument("--searches", nargs="+", default=["exact", "ivf"], help="exact, ivf, hnsw")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=1, help="of each, where exact search is not extrapolated")
    parser.add_argument("--exact_up_to", type=int, default=200_000)
    parser.add_argument("--note", default="", help="on the state of the machine, kept with the figures")
    parser.add_argument("--output", help="JSON file")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        folder, kind, dtype, exact_up_to = options.one
        torch.set_num_threads(1)
        print(json.dumps(one(Path(folder), kind, dtype, int(exact_up_to))))
        return
    sizes = options.sizes
    if options.vectors:
        shards = Path(options.vectors).glob("[0-9]*.npy")
        sizes = [sum(len(np.load(path, mmap_mode="r")) for path in shards)]
    report = {
        "command": "python recipes/benchmarks/neighbor_search.py " + " ".join(sys.argv[1:]).split(" --note")[0],
        "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}",
        "note": options.note,
        "k": K,
        "results": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for n in sizes:
            report["results"] += measure(Path(folder), options, n)
            if options.output:
                Path(options.output).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
