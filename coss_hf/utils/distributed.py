"""Rank and number of the processes of a run, and differentiable reductions over them."""

from datetime import timedelta
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes of the run, 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process in the run, 0 without ``torch.distributed``."""
    return dist.get_rank() if world_size() > 1 else 0


def leave() -> None:
    """End the process group of a run that has ended well.

    Call it when no process has anything left to send to another: a group that lives until the interpreter ends may
    abort the process from one of its threads.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # Every process computes the same global loss from the sum, so the gradient of the *summed* losses, which DDP
        # then averages, reaches each summand once from every process.
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of ``x`` (any shape, the same on every process) over all processes, with a gradient.

    A loss computed from the result is the global loss on every process; DistributedDataParallel's averaging of
    gradients then gives exactly the gradient of one process that sees the full batch.
    """
    return _AllReduceSum.apply(x) if world_size() > 1 else x


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        count = torch.tensor([len(x)], device=x.device)
        counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
        dist.all_gather(counts, count)
        counts = [int(c) for c in counts]
        # Backends gather tensors of one shape: pad to the longest.
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        ctx.start = sum(counts[: dist.get_rank()])
        ctx.count = len(x)
        return torch.cat([part[:c] for part, c in zip(parts, counts)])

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # As for _AllReduceSum: every process has a gradient of the same loss for every row.
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad[ctx.start : ctx.start + ctx.count]


def all_gather(x: Tensor) -> Tensor:
    """Rows of ``x`` ``(b, ...)`` of all processes, in the order of their ranks, with a gradient.

    ``b`` may differ between processes. A loss that every process computes from the result is the global loss, and
    DistributedDataParallel's averaging of gradients gives exactly that of one process that sees the full batch.
    """
    return _AllGather.apply(x) if world_size() > 1 else x


@lru_cache(maxsize=2)
def _gloo_group(default: dist.ProcessGroup, timeout: timedelta) -> dist.ProcessGroup:
    # One for each start of torch.distributed: tests start it anew.
    return dist.new_group(backend="gloo", timeout=timeout)


def patient_group() -> dist.ProcessGroup:
    """The group of all processes in which one may wait long for another, over gloo; all must call."""
    # torch's own timeout of half an hour ends a run whose first process measures or uploads for longer.
    return _gloo_group(dist.group.WORLD, timedelta(days=100))


def step_group() -> dist.ProcessGroup:
    """The group of all processes for what they agree on at each step, over gloo; all must call.

    It waits as long as the run's own group (``--ddp_timeout``): a machine that is lost does not hang the others.
    """
    from torch.distributed.constants import default_pg_timeout  # not in every build of torch

    default = dist.group.WORLD
    options = getattr(default._get_backend(default._device_types[0]), "options", None)  # not of every backend
    return _gloo_group(default, getattr(options, "_timeout", default_pg_timeout))


def any_process(flag: bool, *, patient: bool = False) -> bool:
    """Whether ``flag`` is true on any process; all must call. Over gloo, so that no GPU is waited for.

    Args:
        flag: of this process.
        patient: wait for the others as long as it takes, rather than as long as for a step.
    """
    if world_size() == 1:
        return flag
    value = torch.tensor(float(flag))
    dist.all_reduce(value, group=patient_group() if patient else step_group())
    return bool(value)
