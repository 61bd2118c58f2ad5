"""Losses under DistributedDataParallel, in real processes: all jobs of a test file in one launch."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from coss_hf.features import Features
from coss_hf.losses.registry import LOSSES
from coss_hf.utils.distributed import all_gather
from tests.helpers.processes import spawn


class Gathered(nn.Module):
    """Couples all embeddings of all processes."""

    def forward(self, student: Features, teacher: Features, index: Tensor) -> dict[str, Tensor]:
        whole = all_gather(student.embedding)
        return {"loss": (whole @ whole.T).tanh().sum()}


class Student(nn.Module):
    """A linear embedding of ``x`` ``(b, c)``, two maps of it, and the loss, trained together.

    Args:
        weight: ``(d, c)``.
        name: of the loss, with the options of its constructor.
        given: buffers and parameters of the loss.
    """

    def __init__(self, weight: Tensor, name: str, options: dict, given: dict[str, Tensor]):
        super().__init__()
        self.linear = nn.Linear(*weight.shape[::-1], bias=False, dtype=weight.dtype)
        self.linear.weight.data.copy_(weight)
        self.criterion = (Gathered if name == "gathered" else LOSSES[name])(**options).to(weight.dtype)
        self.criterion.load_state_dict(given)
        for part in self.criterion.modules():
            if isinstance(part, _BatchNorm):
                part.eval()  # statistics of a batch are each process's own, unless synchronised (on GPUs)
        self._ddp_params_and_buffers_to_ignore = [f"criterion.{name}" for name, _ in self.criterion.named_buffers()]

    def forward(self, x: Tensor, teacher: Features, index: Tensor) -> Tensor:
        embedding = self.linear(x)
        maps = (embedding[:, :, None, None] * torch.linspace(1, 2, 4, dtype=x.dtype).view(1, 1, 2, 2),)
        student = Features(embedding, 2 * maps if teacher.maps else ())
        return self.criterion(student, teacher, index)["loss"]


def steps(student: nn.Module, job: dict, rows: slice) -> dict:
    """Two steps on some rows of the batch, without an optimiser: losses, gradients of the second, state."""
    teacher = Features(job["t"][rows], tuple(one[rows] for one in job["maps"]))
    losses = []
    torch.manual_seed(0)  # as for a run: CRD's negatives are those that one process would draw
    for _ in range(2):
        student.zero_grad()
        loss = student(job["x"][rows], teacher, job["index"][rows])
        loss.backward()
        losses.append(loss.detach())
    module = getattr(student, "module", student)
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {"losses": torch.stack(losses), "gradients": gradients, "state": dict(module.criterion.named_buffers())}


def alone(job: dict) -> dict:
    """The whole batch in one process."""
    return steps(Student(*job["student"]), job, slice(None))


def _worker(rank: int, folder: Path, jobs: list[dict]) -> None:
    results = []
    for job in jobs:
        sizes = job["sizes"]
        rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        student = DistributedDataParallel(Student(*job["student"]))
        results.append(steps(student, job, rows))
    torch.save(results, folder / f"{rank}.pt")


def together(folder: Path, world: int, jobs: list[dict]) -> list[list[dict]]:
    """Results of every job, of every process."""
    folder = folder / str(world)
    folder.mkdir()
    spawn(_worker, folder, folder, jobs, processes=world)
    return list(zip(*(torch.load(folder / f"{rank}.pt") for rank in range(world))))
