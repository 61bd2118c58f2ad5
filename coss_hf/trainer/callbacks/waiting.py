"""What a training waits for, and which cores wait for work: named once, with the option that mends it."""

from collections.abc import Callable

import torch
from transformers import TrainerCallback

from coss_hf.utils.cores import OtherLoad, processes_on_machine, usable_cores
from coss_hf.utils.messages import get_logger

logger = get_logger(__name__)

# Shares of the time and of a core from which on something is reported.
LONG_WAIT = 0.2
BUSY_CORE = 0.5


class WaitingCallback(TrainerCallback):
    """Say at the start that cores have no work or that other programs need them, and later that images come too slowly.

    Each is reported once. The first log entry of a training is passed over, unless it is the only one: loader workers
    were just started.

    Args:
        most_workers: returns the largest number of loader workers to advise; None where it is not known.
        streams: whether the images are a stream, whose order depends on the workers: idle cores are no reason for more.
    """

    def __init__(self, most_workers: Callable[[], int | None] = lambda: None, streams: bool = False):
        self._most_workers = most_workers
        self._streams = streams
        self._last: float | None = None
        self._load = OtherLoad()
        self._entries = 0
        self._said_wait = False
        self._asked_for_others = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._entries = 0
        self._last = None
        self._asked_for_others = not state.is_world_process_zero or args.device.type != "cpu"
        if self._asked_for_others:
            return
        cores = usable_cores()
        threads = torch.get_num_threads()
        workers = args.dataloader_num_workers
        most = workers if self._streams else self._most_workers()
        for sentence in (
            too_many_threads(cores, processes_on_machine(), threads),
            idle_cores(cores, processes_on_machine(), threads, workers, most=most),
        ):
            if sentence:
                logger.warning(sentence)
        self._ask_for_others()

    def _ask_for_others(self) -> None:
        """Name other programs on the same cores, once it is known how busy these are: a second after the trainer."""
        others = None if self._asked_for_others else self._load.cores()
        if others is None:
            return
        self._asked_for_others = True
        if sentence := shared_cores(usable_cores(), torch.get_num_threads(), others):
            logger.warning(sentence)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self._ask_for_others()
        share = (logs or {}).get("data_wait_share")
        if share is None or self._said_wait or not state.is_world_process_zero:
            return
        self._entries += 1
        self._last = share
        if self._entries > 1:
            self._say_wait(args, share)

    def on_train_end(self, args, state, control, **kwargs):
        if self._entries == 1 and not self._said_wait and state.is_world_process_zero:
            self._say_wait(args, self._last)

    def _say_wait(self, args, share: float) -> None:
        if share <= LONG_WAIT:
            return
        self._said_wait = True
        free = usable_cores() // processes_on_machine()
        threads = torch.get_num_threads()
        device = args.device.type
        logger.warning(
            slow_images(share, args.dataloader_num_workers, free, threads, device, most=self._most_workers())
        )


def too_many_threads(cores: int, processes: int, threads: int) -> str:
    """A sentence on more threads than there are cores for them, as where a container has few; empty where they fit.

    Args:
        cores: number of cores that may be used.
        processes: number of processes that train on this machine.
        threads: number of threads that each computes with.
    """
    fitting = max(1, cores // processes)
    if threads <= fitting:
        return ""
    each = f" in each of {processes} processes" if processes > 1 else ""
    return (
        f"PyTorch computes with {threads} threads{each}, on {cores} cores, where threads wait for each other: "
        f"OMP_NUM_THREADS={fitting} is faster."
    )


def idle_cores(cores: int, processes: int, threads: int, workers: int, *, most: int | None = None) -> str:
    """A sentence on cores that a training on CPUs leaves without work; empty where there are none.

    Args:
        cores: number of cores that may be used.
        processes: number of processes that train on this machine.
        threads: number of threads that each computes with.
        workers: number of loader workers of each.
        most: largest number of workers that helps or that shared memory has room for; None where it is not known.
    """
    free = cores // processes - threads - workers
    if free < 1:
        return ""
    more = workers + free if most is None else min(workers + free, most)
    loading = f"load images with --dataloader_num_workers {more}, or " if more > workers else ""
    return (
        f"{free * processes} of {cores} cores have no work: {loading}set OMP_NUM_THREADS={threads + free} to compute "
        f"with more threads."
    )


def shared_cores(cores: int, threads: int, others: float | None) -> str:
    """A sentence on other programs that need the cores that a training computes with; empty where there are none.

    Threads of one computation wait for the slowest of them, so that one that shares its core holds up all.

    Args:
        cores: number of cores that may be used.
        threads: number of threads that this process computes with.
        others: number of cores that are busy with other programs; None where it is not known.
    """
    if others is None or threads < 2 or others < BUSY_CORE or threads + others <= cores + BUSY_CORE:
        return ""
    fewer = max(1, int(cores - others))
    return (
        f"Other programs keep {others:.1f} of {cores} cores busy, and PyTorch's {threads} threads wait for each other "
        f"where they share one: OMP_NUM_THREADS={fewer} is faster until they end."
    )


def slow_images(share: float, workers: int, cores: int, threads: int, device: str, *, most: int | None = None) -> str:
    """A sentence on a training that waits for its images.

    Args:
        share: share of the time during which it waits.
        workers: number of loader workers.
        cores: number of cores of this process.
        threads: number of threads that it computes with.
        device: type of the device that trains.
        most: largest number of workers that helps or that shared memory has room for; None where it is not known.
    """
    more = cores - 1 if device != "cpu" else cores - threads
    if most is not None and most < more:
        remedy = f"--dataloader_num_workers {most} is the most that memory and images allow"
        if most <= workers:
            remedy = "more workers do not fit into shared memory, or no longer help"
    elif more > workers:
        remedy = f"--dataloader_num_workers {more} uses the {cores} cores that there are"
    elif device == "cpu" and threads > 1 and not workers:
        remedy = (
            f"OMP_NUM_THREADS={threads - 1} with --dataloader_num_workers 1 lets one core load while the others train"
        )
    else:
        remedy = "all cores are at work"
    return (
        f"The training waits {100 * share:.0f} % of its time for images: {remedy}. `coss-hf prepare` makes a copy of "
        f"large photographs that loads several times as fast."
    )
