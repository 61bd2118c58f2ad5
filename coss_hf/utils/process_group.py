"""The processes of a run where one may wait long for another: over gloo, and without a timeout."""

import contextlib
import os
import secrets
import time
from pathlib import Path

import torch.distributed as dist

from coss_hf.utils.distributed import patient_group

# Seconds within which a file of another machine is seen in a folder that both share.
SEEN_WITHIN = 10.0


class Processes:
    """This process and the others of the run, one alone without `torch.distributed`; all must create it together.

    The group of the run itself gives up after minutes (`--ddp_timeout`), and with NCCL it keeps the GPU busy waiting.

    Args:
        alone: ignore the other processes.

    Attributes:
        rank: rank of this process.
        count: number of processes.
    """

    def __init__(self, alone: bool = False):
        self.rank = 0
        self.count = 1
        self._group = None
        if not alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.rank = dist.get_rank()
            self.count = dist.get_world_size()
            self._group = patient_group()

    def gather(self, value) -> list:
        """The values of all processes by rank, on every process. They are pickled: keep them small."""
        values = [value] * self.count
        if self._group is not None:
            dist.all_gather_object(values, value, group=self._group)
        return values

    @contextlib.contextmanager
    def first(self, main: bool):
        """Run the block first on processes with ``main`` (one of each machine, whose disk the others read)."""
        if not main:
            self.gather(None)
        try:
            yield
        finally:
            if main:
                self.gather(None)

    def check_shared(self, folder: Path, given: str) -> None:
        """Check that all processes see what the first one writes into a folder, which is there; all must call.

        Args:
            folder: the folder.
            given: how messages name it.

        Raises:
            ValueError: on all processes, where another machine has a folder of its own under this name.
        """
        if self.count == 1:
            return
        name = self.gather(f".seen-{secrets.token_hex(8)}")[0]
        with self.together():
            if self.rank == 0:
                try:
                    (folder / name).touch()
                except OSError as error:
                    raise ValueError(f"{given} cannot be written ({error}); give another folder.") from error
        seen = self.gather(_appears(folder, name))
        if self.rank == 0:
            (folder / name).unlink(missing_ok=True)
        blind = [str(rank) for rank, sees in enumerate(seen) if not sees]
        if blind:
            raise ValueError(
                f"{given}: process {', '.join(blind)} does not see what the first one writes there; give a folder that "
                f"all machines share."
            )

    @contextlib.contextmanager
    def together(self):
        """Leave the block when every process has left it; an error of one is raised on all."""
        error = None
        try:
            yield
        except Exception as raised:
            error = raised
        problem = None if error is None else (isinstance(error, ValueError), str(error))
        problems = self.gather(problem)
        if error is not None:
            raise error
        for rank, problem in enumerate(problems):
            if problem is not None:
                bad_input, text = problem
                if bad_input:
                    raise ValueError(text)
                raise RuntimeError(f"process {rank}: {text}")


def _appears(folder: Path, name: str) -> bool:
    """Whether a file is there within a while: what other machines write may come late."""
    end = time.monotonic() + SEEN_WITHIN
    while True:
        with contextlib.suppress(OSError):  # there is no such folder here
            if name in os.listdir(folder):  # which asks the server of a network disk
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
