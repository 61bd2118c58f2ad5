"""The exact global loss by three all-reduced vectors, against gathering every process's features.

    python recipes/benchmarks/all_reduce.py --output all_reduce.json

Two processes (gloo), forward and backward pass of the loss alone, interleaved pairs; the values are compared too.
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

SIZES = [(128, 64), (128, 768), (1024, 768)]


def gathered(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    s, t = torch.cat(all_gather(s)), torch.cat(all_gather(t))
    rows, columns = (torch.nn.functional.cosine_similarity(s, t, dim=dim, eps=1e-12).mean() for dim in (1, 0))
    return -50 * (rows + columns)


def timed(loss, s: torch.Tensor, t: torch.Tensor) -> tuple[float, torch.Tensor]:
    s = s.clone().requires_grad_()
    dist.barrier()
    start = time.perf_counter()
    value = loss(s, t)
    value.backward()
    return time.perf_counter() - start, value.detach()


def process(rank: int, world: int, folder: str, pairs: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/port", rank=rank, world_size=world)
    coss = LOSSES["coss"]()
    results = []
    for batch, dim in SIZES:
        generator = torch.Generator().manual_seed(rank)
        s, t = (torch.randn(batch, dim, generator=generator) for _ in range(2))
        times = []
        for _ in range(pairs + 5):
            ours, value = timed(lambda s, t: coss(Features(s), Features(t))["loss"], s, t)
            gather, same = timed(gathered, s, t)
            torch.testing.assert_close(value, same, rtol=1e-4, atol=1e-4)
            times.append((ours, gather))
        ratios = sorted(ours / gather for ours, gather in times[5:])
        results.append(
            {
                "images_a_process": batch,
                "dimensions": dim,
                "pairs": pairs,
                "all_reduce_ms": round(1e3 * statistics.median(a for a, _ in times[5:]), 3),
                "gather_ms": round(1e3 * statistics.median(b for _, b in times[5:]), 3),
                "ratio_median": round(statistics.median(ratios), 3),
                "ratio_quartiles": [round(ratios[pairs // 4], 3), round(ratios[3 * pairs // 4], 3)],
                "floats_sent_forward": {"all_reduce": 2 + 3 * dim, "gather": 2 * batch * dim},
            }
        )
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
