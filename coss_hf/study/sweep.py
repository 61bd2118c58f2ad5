"""Run the trials of a study in processes of their own, several in parallel, and keep the finished ones."""

import contextlib
import functools
import json
import logging
import multiprocessing
import os
import queue
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from coss_hf.reporting.run_record import write_json
from coss_hf.study.trials import (
    StudyConfig,
    Trial,
    build_trial_trainer,
    evaluations_path,
    rehearse_trial,
    run_trial,
)
from coss_hf.utils.errors import RunStopped
from coss_hf.utils.messages import command_line, get_logger

logger = get_logger(__name__)


class Sweep:
    """The trials of a study in a folder.

    ``trials/`` holds a file for each finished trial, which is never repeated, its evaluations during training with
    ``eval_at`` of the ``StudyConfig``, and the checkpoints of unfinished ones;
    ``name.jsonl`` has one line for each trial in the order of the plan, whatever the order in which they ended, so that
    a sweep that was killed and started again leaves the same file as an uninterrupted one (but for ``teacher_images``,
    which depends on what parallel trials have left in a shared cache). Evaluations during training
    are lines of their own before that of their trial: they have a ``share`` and the split ``validation``. Several
    studies may share the folder, and then the trials that they have in common.

    Args:
        folder: folder of the study; one sweep at a time can use it.
        name: name of the file of results, without its ending.
        jobs: number of trials that run in parallel; they share the cores of the machine, and its GPUs in turn.
        header: entries put before each result: the command. A trial that an earlier command has run keeps that one.

    Raises:
        ValueError: another sweep is using the folder, it cannot be made or written, or a launcher has started several
            processes.
    """

    def __init__(self, folder: Path, name: str, jobs: int, header: dict):
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(
                f"--output_dir={folder}: several processes were started for one sweep; start one, and give --jobs for "
                f"the number of trials that run in parallel, on all GPUs in turn."
            )
        self.folder = Path(folder)
        self.file = self.folder / f"{name}.jsonl"
        self.trials = self.folder / "trials"
        self.jobs = jobs
        self.header = header
        # Trials with the keys of their results, in the order in which they were planned.
        self.plan: list[tuple[Trial, str]] = []
        self._lock = FileLock(self.folder / "lock")
        try:
            self.trials.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"--output_dir={folder}: another sweep is using it; give another folder.") from None
        except OSError as error:
            raise ValueError(f"--output_dir={folder} cannot be used ({error}); give another folder.") from error
        self._earlier = self._rows_of_file()
        self.gpus = take_one_gpu()

    def check(self, trials: list[Trial], config: StudyConfig) -> None:
        """Try the arguments of each pair, and build the trainer of each method, without training it.

        Raises:
            ValueError: arguments that cannot work, or a method that cannot run with its networks.
        """
        for trial in {trial.pair: trial for trial in trials}.values():
            with tempfile.TemporaryDirectory() as folder:
                rehearse_trial(trial, config, Path(folder))
        for trial in {(trial.pair, trial.method): trial for trial in trials}.values():
            with tempfile.TemporaryDirectory() as folder:
                build_trial_trainer(trial, config, Path(folder))

    def result(self, trial: Trial, key: str) -> dict | None:
        """Return the result of a finished trial; None for any other."""
        path = self._path(key)
        if not path.exists():
            return None
        return json.loads(path.read_text()) | asdict(trial)

    def write(self) -> None:
        """Replace the file of results, atomically."""
        part = self.file.with_suffix(".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in self._rows()))
        os.replace(part, self.file)

    def _rows(self) -> list[dict]:
        """Return the rows of the file of results: of the planned trials that are finished, and their evaluations."""
        rows = []
        for trial, key in self.plan:
            row = self.result(trial, key)
            rows += self._evaluations(trial, key, row)
            if row:
                row.pop("loss", None)  # a mean over the steps since a trial was last resumed
                rows.append(self.header | row)
        return rows

    def _rows_of_file(self) -> list[dict]:
        """Return the rows of the file of results as it is."""
        return [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []

    def _warn_of_rows_that_leave(self) -> None:
        """Name the rows of another study that this one takes out of the file of results, once its plan is complete."""
        rows = self._rows()
        # The path of a teacher may be spelled in another way; several pairs are told apart by it.
        several = any(len({row["pair"] for row in found}) > 1 for found in (rows, self._earlier))
        left_out = ("command", "loss") if several else ("command", "loss", "pair")
        kept = {_without(row, left_out) for row in rows}
        leaving = Counter(row["method"] for row in self._earlier if _without(row, left_out) not in kept)
        self._earlier = []
        if leaving:
            named = ", ".join(f"{count} of {method}" for method, count in leaving.items())
            logger.warning(
                "--output_dir=%s: %s of another study leave %s (%s), and page and plot are replaced. Its trials "
                "stay in %s, and its command brings the rows back; to keep the results of both, give another folder.",
                *(
                    self.folder,
                    "1 row" if leaving.total() == 1 else f"{leaving.total()} rows",
                    self.file,
                    named,
                    self.trials,
                ),
            )

    def _evaluations(self, trial: Trial, key: str, row: dict | None) -> list[dict]:
        """Return the rows of a trial's evaluations during training, also of one that is not finished."""
        path = evaluations_path(self.trials / key)
        found = json.loads(path.read_text()) if path.exists() else []
        ran_by = {"command": row["command"]} if row and "command" in row else {}
        return [self.header | asdict(trial) | {"split": "validation"} | one | ran_by for one in found]

    def run(self, trials: list[Trial], config: StudyConfig, later: int = 0) -> list[dict]:
        """Add trials to the plan, run the unfinished ones, and return the results of all of them, in order.

        Args:
            trials: the trials.
            config: what they share.
            later: number of images of trials still to come, for the remaining time that is displayed.
        """
        keyed = [(trial, config.key(trial)) for trial in trials]
        self.plan += [one for one in dict.fromkeys(keyed) if one not in self.plan]
        if not later:
            self._warn_of_rows_that_leave()
        # In the order of the plan, which is what a reader expects to see, though the largest first would be quicker.
        todo = {key: trial for trial, key in keyed if not self.result(trial, key)}
        remaining = sum(trial.num_images for trial in todo.values()) + later
        total = sum(trial.num_images for trial, _ in self.plan) + later
        with tqdm(total=total, initial=total - remaining, unit="img") as progress:
            self._run_in_processes(todo, config, progress)
        self.write()
        return [self.result(trial, key) for trial, key in keyed]

    def _run_in_processes(self, todo: dict[str, Trial], config: StudyConfig, progress: tqdm) -> None:
        context = multiprocessing.get_context("spawn")
        seen = context.Queue()  # (key, images) of each step
        turns = context.Queue()
        for turn in range(self.jobs):
            turns.put(turn)
        threads = max(1, torch.get_num_threads() // self.jobs)
        counted = dict.fromkeys(todo, 0)
        stopped = context.Event()
        pool = ProcessPoolExecutor(self.jobs, context, _start_worker, (seen, threads, self.gpus, turns, stopped))
        running: dict[Future, str] = {}
        with _silent_progress_in_children(), pool, _stop_after_an_error(running, stopped):
            for key, trial in todo.items():
                keep = partial(_keep, self._path(key), self.header.get("command"))
                running[pool.submit(_run_in_worker, trial, config, self.trials / key, keep)] = key
            while running:
                ended, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                for key, images in _drain(seen):
                    counted[key] += images
                    progress.update(images)
                for future in ended:
                    key = running.pop(future)
                    progress.update(todo[key].num_images - counted[key])
                    counted[key] = todo[key].num_images
                    result = _result(future)
                    self.write()
                    progress.write(describe(result))

    def _path(self, key: str) -> Path:
        return self.trials / f"{key}.json"


def _without(row: dict, names: Sequence[str]) -> str:
    """Return a row as text without some of its entries, such as that which says which command has run it."""
    return json.dumps({name: value for name, value in row.items() if name not in names}, sort_keys=True)


def describe(row: dict) -> str:
    """Return a finished trial as one line of text."""
    scores = {name: row[name] for name in ("linear", "knn10", "overlap10") if row.get(name)}
    words = ", ".join(f"{name} {100 * value:.1f} %" for name, value in scores.items())
    trial = Trial(**{name: row[name] for name in Trial.__dataclass_fields__})
    return f"{trial.name}: {row.get('failed') or words}"


def _result(future: Future) -> dict:
    """Return the result of a trial; where its process has died, say so in words."""
    try:
        return future.result()
    except (BrokenProcessPool, SystemExit) as error:
        raise RunStopped(
            "A process that trains a trial ended before its time, perhaps by a signal or for want of memory: finished "
            "trials are kept, and the same command continues the others; fewer --jobs need less memory."
        ) from error


@functools.cache
def take_one_gpu() -> list[str]:
    """Leave one GPU visible to this process, in which a study plans its trials.

    Returns:
        The names of all GPUs that were visible before the first call, for the processes that train.
    """
    gpus = visible_gpus()
    show_gpu(gpus, 0)
    return gpus


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that this process may use, as in ``CUDA_VISIBLE_DEVICES``."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given:
        return given.split(",")
    return [str(number) for number in range(torch.cuda.device_count())]


def show_gpu(gpus: list[str], turn: int) -> None:
    """Leave one GPU visible to this process, which has not used any yet.

    Args:
        gpus: names of all GPUs; empty for none.
        turn: number of the process.
    """
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[turn % len(gpus)]


def _drain(items: multiprocessing.Queue) -> list:
    """Return what is in the queue now."""
    found = []
    with contextlib.suppress(queue.Empty):
        while True:
            found.append(items.get_nowait())
    return found


@contextlib.contextmanager
def _silent_progress_in_children():
    """Switch off the progress bars of processes that are started meanwhile: tqdm reads this when it is imported."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        del os.environ["TQDM_DISABLE"]
        if before is not None:
            os.environ["TQDM_DISABLE"] = before


@contextlib.contextmanager
def _stop_after_an_error(running: dict[Future, str], stopped):
    """After an error or Ctrl-C no trial begins, and each that runs saves its step, from which it resumes, and ends."""
    others = set(multiprocessing.active_children())
    try:
        yield
    except BaseException:
        stopped.set()
        for future in running:
            future.cancel()
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise


# In a worker: the queue of the images that its steps have seen, and whether the sweep has stopped.
_seen = None
_stopped = None


def _start_worker(seen, threads: int, gpus: list[str], turns, stopped) -> None:
    global _seen, _stopped
    _seen = seen
    _stopped = stopped
    seen.cancel_join_thread()  # a parent that has left its loop reads no more of it
    # Ctrl-C in a terminal reaches all processes; the parent passes it on once, and a second signal would end at once.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    show_gpu(gpus, turns.get())
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)  # one progress display, not one for each process
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """End this process with its parent: those of a sweep that is killed must not write into its folder."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _run_in_worker(trial: Trial, config: StudyConfig, folder: Path, keep: Callable[[dict], None]) -> dict:
    if _stopped.is_set():  # a pool hands out one trial ahead, which cannot be cancelled any more
        raise RuntimeError("the sweep has stopped")
    with command_line():  # the process that a command has started does not know it
        return run_trial(trial, config, folder, lambda images: _seen.put((folder.name, images)), keep)


def _keep(path: Path, command: str | None, result: dict) -> None:
    """Write the file of a finished trial."""
    write_json(path, result | ({"command": command} if command else {}))
