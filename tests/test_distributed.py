"""The loss and gradient of several processes equal those of one that sees the whole batch."""

import json

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from coss_hf.distributed import all_gather, all_reduce_sum
from coss_hf.features import Features
from coss_hf.losses import LOSSES


def start(rank: int, world: int, port_file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=world)


def ddp_step(rank: int, sizes: list[int], port_file: str, x, t, weight, lambda_ss: float, results: str) -> None:
    start(rank, len(sizes), port_file)
    student = nn.Linear(*weight.shape[::-1], bias=False, dtype=torch.float64)
    student.weight.data.copy_(weight)
    student = DistributedDataParallel(student)
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    loss = LOSSES["coss"](beta=1.0, lambda_ss=lambda_ss)(Features(student(x[rows])), Features(t[rows]))["loss"]
    loss.backward()
    torch.save((loss.detach(), student.module.weight.grad), f"{results}/{rank}.pt")
    dist.destroy_process_group()


def run(tmp_path, sizes, x, t, weight, lambda_ss=1.0):
    folder = tmp_path / "-".join(map(str, sizes))
    folder.mkdir()
    mp.spawn(ddp_step, (sizes, str(folder / "port"), x, t, weight, lambda_ss, str(folder)), nprocs=len(sizes))
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(sizes))]


@pytest.mark.parametrize("sizes", [[6, 6], [3, 5, 1, 3]])
def test_ddp_equals_one_process(tmp_path, sizes):
    g = torch.Generator().manual_seed(0)
    x, t = (torch.randn(12, n, generator=g, dtype=torch.float64) for n in (7, 5))
    weight = torch.randn(5, 7, generator=g, dtype=torch.float64).requires_grad_()
    whole = LOSSES["coss"](beta=1.0)(Features(x @ weight.T), Features(t))["loss"]
    whole.backward()
    for loss, gradient in run(tmp_path, sizes, x, t, weight.detach()):
        torch.testing.assert_close(loss, whole.detach(), rtol=1e-10, atol=0)
        torch.testing.assert_close(gradient, weight.grad, rtol=0, atol=1e-10 * weight.grad.abs().max().item())


def test_fixture_splits(tmp_path, shared):
    with safe_open(shared / "fixtures" / "coss-a.safetensors", "pt") as f:
        cases = json.loads(f.metadata()["cases"])
        name = "c0_b_gt_d"
        s, t = f.get_tensor(f"{name}.in.A_s"), f.get_tensor(f"{name}.in.A_t")
        sizes = f.get_tensor(f"{name}.out.split4_uneven.sizes").tolist()
        expected = f.get_tensor(f"{name}.out.split4_uneven.global_loss")
    identity = torch.eye(s.shape[1], dtype=torch.float64)
    for loss, _ in run(tmp_path, sizes, s, t, identity, cases[name]["splits_lambda"]):
        torch.testing.assert_close(loss, expected.reshape(()), rtol=1e-10, atol=0)


def test_one_process_needs_no_group():
    x = torch.randn(3, requires_grad=True)
    assert all_reduce_sum(x) is x


def gather_step(rank: int, sizes: list[int], port_file: str, x, weight, results: str) -> None:
    start(rank, len(sizes), port_file)
    student = nn.Linear(*weight.shape[::-1], bias=False, dtype=torch.float64)
    student.weight.data.copy_(weight)
    student = DistributedDataParallel(student)
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    whole = all_gather(student(x[rows]))
    loss = (whole @ whole.T).tanh().sum()
    loss.backward()
    torch.save((loss.detach(), student.module.weight.grad), f"{results}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("sizes", [[4, 4], [3, 5]])
def test_gathered_features_have_the_gradient_of_the_whole_batch(tmp_path, sizes):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, generator=g, dtype=torch.float64)
    weight = torch.randn(2, 3, generator=g, dtype=torch.float64).requires_grad_()
    whole = x @ weight.T
    loss = (whole @ whole.T).tanh().sum()
    loss.backward()
    mp.spawn(gather_step, (sizes, str(tmp_path / "port"), x, weight.detach(), str(tmp_path)), nprocs=2)
    for rank in range(2):
        value, gradient = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(value, loss.detach(), rtol=1e-10, atol=0)
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-10, atol=1e-12)
