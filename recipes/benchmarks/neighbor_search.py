"""Exact and approximate neighbour search: seconds, recall@10 and peak memory.

    python recipes/benchmarks/neighbor_search.py --sizes 50000 200000 1000000 --output neighbor_search.json

Vectors are synthetic and clustered (a centre each 50 images, the noise half as long: cosine 0.8 within, 0
across), unit length, 256 numbers, on disk as the embedding stage leaves them; or real ones with --vectors FOLDER, what
recipes/neighbors.py --neighbors_keep_embeddings left. Each search runs in a process of its own,
on one thread, so that its peak memory (VmHWM, libraries and mapped files included) is its own. Exact search is timed on
all queries up to --exact_up_to vectors, beyond on 2,000, and extrapolated. Ratios: approximate against exact search of
the same size (extrapolated, see above) in CPU seconds (other programs do not count in), in turns, and memory against
vectors plus index.
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
from coss_hf.neighbors.exact_search import ExactSearch, random_rows, search_all
from coss_hf.neighbors.mining import search_vectors
from coss_hf.neighbors.options import SearchOptions
from coss_hf.utils.process_group import Processes

DIM, K, QUERIES = 256, 10, 2_000


def make(folder: Path, n: int, dtype: str) -> None:
    """Clustered unit rows in shards, a shard in memory at a time."""
    folder.mkdir()
    centres = np.random.default_rng(0).standard_normal((n // 50, DIM), dtype=np.float32)
    for number, start in enumerate(range(0, n, shard_rows(n))):
        rng = np.random.default_rng([1, number])
        rows = min(shard_rows(n), n - start)
        shard = centres[rng.integers(len(centres), size=rows)] + rng.standard_normal((rows, DIM), dtype=np.float32) / 2
        save_array(folder / f"{number:05d}.npy", (shard / np.linalg.norm(shard, axis=1, keepdims=True)).astype(dtype))


def memory(kind: str) -> int:
    """Bytes that this process holds (VmRSS) or has held at most (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def one(folder: Path, kind: str, dtype: str, exact_up_to: int) -> dict:
    """A search, in this process."""
    vectors = Vectors([np.load(path, mmap_mode="c") for path in sorted(folder.glob("[0-9]*.npy"))])
    n, dim = vectors.shape
    before, start, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    result = {
        "images": n,
        "dim": dim,
        "search": kind,
        "dtype": dtype,
        "vectors_mb": round(n * dim * np.dtype(dtype).itemsize / 1e6),
    }
    if kind == "exact" and n > exact_up_to:
        rows, exact = random_rows(n, QUERIES), ExactSearch(vectors)
        for first in range(0, len(rows), 1024):
            exact(rows[first : first + 1024], K)
        seconds = round(time.perf_counter() - start, 1)
        result |= {"queries": len(rows), "seconds": seconds, "seconds_of_all": round(seconds * n / len(rows))}
    elif kind == "exact":
        search_all(ExactSearch(vectors), K)
        result |= {"recall": 1.0, "seconds": round(time.perf_counter() - start, 1)}
    else:
        with tempfile.TemporaryDirectory(dir=folder) as work:
            options = SearchOptions(neighbors_dtype=dtype)
            found = search_vectors(vectors, K, kind, options, Path(work), processes=Processes(alone=True))[1]
            result |= (
                found
                | {"search": kind, "taken": found.get("search", kind)}
                | {"seconds": round(time.perf_counter() - start, 1)}
            )
            result["index_mb"] = round(os.path.getsize(Path(work, f"{kind}.index")) / 1e6)
    peak = memory("VmHWM")
    result |= {"peak_mb": round(peak / 1e6), "of_which_libraries_mb": round(before / 1e6)}
    result["cpu_seconds"] = round(time.process_time() - cpu, 1)
    held = result["vectors_mb"] + result.get("index_mb", 0)
    return result | {"peak_to_vectors_and_index": round(peak / 1e6 / held, 3)}


def measure(folder: Path, options: argparse.Namespace):
    """Yields the results of all searches of each size, interleaved, each in a fresh process."""
    for n in options.sizes:
        results = []
        data = Path(options.vectors) if options.vectors else folder / str(n)
        if not options.vectors:
            make(data, n, options.dtype)
        rounds = {kind: [] for kind in options.searches}
        for _ in range(options.rounds if n <= options.exact_up_to else 1):
            for kind, runs in rounds.items():
                words = [data, kind, options.dtype, options.exact_up_to]
                command = [sys.executable, __file__, "--one", *map(str, words)]
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                runs.append(json.loads(done.stdout))
                print(json.dumps(runs[-1]), flush=True)
        exact = [run["cpu_seconds"] * n / run.get("queries", n) for run in rounds.get("exact", [])]
        for runs in rounds.values():
            ratios = [run["cpu_seconds"] / other for run, other in zip(runs, exact, strict=False)]
            middle = sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]
            if runs[0]["search"] != "exact" and ratios:
                middle["cpu_seconds_to_exact"] = round(statistics.median(ratios), 4)
            results.append({"data": "real" if options.vectors else "synthetic"} | middle | {"rounds": len(runs)})
        for path in folder.glob("*/*.npy"):
            path.unlink()
        yield results


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
    if options.vectors:
        options.sizes = [sum(len(np.load(path, mmap_mode="r")) for path in Path(options.vectors).glob("[0-9]*.npy"))]
    machine = f"{platform.machine()}, 1 thread, torch {torch.__version__}"
    command = "python recipes/benchmarks/neighbor_search.py " + " ".join(sys.argv[1:]).split(" --note")[0]
    report = {"command": command, "machine": machine, "note": options.note, "k": K, "results": []}
    with tempfile.TemporaryDirectory() as folder:
        for results in measure(Path(folder), options):
            report["results"] += results
            if options.output:
                Path(options.output).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
