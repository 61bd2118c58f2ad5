"""Compare the exact global loss by three all-reduced vectors with gathering every process's features.

    python recipes/benchmarks/all_reduce.py --output all_reduce.json

Two processes (gloo) time the forward and backward pass of the loss alone, in interleaved pairs, and compare the values.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.nn.functional import all_gather

from coss_hf.features import Features
from coss_hf.losses.registry import LOSSES

SIZES = [(128, 64), (128, 768), (1024, 768)]  # images of a process, dimensions
WARM_UP = 5


def gathered_loss(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return CoSS of the features of all processes, ``(b, d)`` each."""
    s = torch.cat(all_gather(s))
    t = torch.cat(all_gather(t))
    rows, columns = (torch.nn.functional.cosine_similarity(s, t, dim=dim, eps=1e-12).mean() for dim in (1, 0))
    return -50 * (rows + columns)


def timed(loss, s: torch.Tensor, t: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Return the seconds of a forward and a backward pass, and the loss."""
    s = s.clone().requires_grad_()
    dist.barrier()
    start = time.perf_counter()
    value = loss(s, t)
    value.backward()
    return time.perf_counter() - start, value.detach()


def measure(rank: int, batch: int, dim: int, pairs: int) -> dict:
    """Return the median times of both, and the spread of their paired ratio."""
    coss = LOSSES["coss"]()
    generator = torch.Generator().manual_seed(rank)
    s, t = (torch.randn(batch, dim, generator=generator) for _ in range(2))
    times = []
    for _ in range(pairs + WARM_UP):
        ours, value = timed(lambda s, t: coss(Features(s), Features(t))["loss"], s, t)
        gather, same = timed(gathered_loss, s, t)
        torch.testing.assert_close(value, same, rtol=1e-4, atol=1e-4)
        times.append((ours, gather))
    times = times[WARM_UP:]
    ratios = sorted(ours / gather for ours, gather in times)
    return {
        "images_a_process": batch,
        "dimensions": dim,
        "pairs": pairs,
        "all_reduce_ms": round(1e3 * statistics.median(ours for ours, _ in times), 3),
        "gather_ms": round(1e3 * statistics.median(gather for _, gather in times), 3),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(ratios[pairs // 4], 3), round(ratios[3 * pairs // 4], 3)],
        "floats_sent_forward": {"all_reduce": 2 + 3 * dim, "gather": 2 * batch * dim},
    }


def process(rank: int, world: int, folder: str, pairs: int) -> None:
    """Measure all sizes in one of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/port", rank=rank, world_size=world)
    results = [measure(rank, batch, dim, pairs) for batch, dim in SIZES]
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--output", help="JSON file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(process, (2, folder, options.pairs), nprocs=2)
        sizes = json.loads(Path(folder, "results.json").read_text())
    result = {
        "command": f"python recipes/benchmarks/all_reduce.py --pairs {options.pairs}",
        "machine": f"{platform.machine()}, 2 processes of 1 thread, gloo, torch {torch.__version__}",
        "sizes": sizes,
    }
    print(json.dumps(result, indent=2))
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
