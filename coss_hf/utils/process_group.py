"""The processes of a run in a stage where one may wait long for another: over gloo, and without a timeout."""

import contextlib
from datetime import timedelta

import torch.distributed as dist


class Processes:
    """This process among those of the run; all make one together. Alone where `torch.distributed` is not initialised.

    The group of the run itself gives up after minutes (`--ddp_timeout`), and with NCCL it keeps the GPU busy waiting.

    Args:
        alone: leave the others out of it.

    Attributes:
        rank: number of this process.
        count: of processes.
    """

    def __init__(self, alone: bool = False):
        self.rank, self.count, self._group = 0, 1, None
        if not alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.rank, self.count = dist.get_rank(), dist.get_world_size()
            self._group = dist.new_group(backend="gloo", timeout=timedelta(days=100))

    def gather(self, value) -> list:
        """One value of each process, on every process; small ones, they are pickled."""
        values = [value] * self.count
        if self._group is not None:
            dist.all_gather_object(values, value, group=self._group)
        return values

    @contextlib.contextmanager
    def first(self, main: bool):
        """Lets those with ``main`` (one of each machine, whose disk the others read) through the block first."""
        if not main:
            self.gather(None)
        try:
            yield
        finally:
            if main:
                self.gather(None)

    @contextlib.contextmanager
    def together(self):
        """Leaves the block when every process has; what goes wrong on one is raised on all."""
        error = None
        try:
            yield
        except Exception as problem:
            error = problem
        problems = self.gather(error if error is None else (isinstance(error, ValueError), str(error)))
        if error is not None:
            raise error
        for rank, problem in enumerate(problems):
            if problem is not None:
                bad_input, text = problem
                raise (ValueError if bad_input else RuntimeError)(text if bad_input else f"process {rank}: {text}")
