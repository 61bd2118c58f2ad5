"""Runs cells in processes of their own, side by side, and keeps what is finished."""

import contextlib
import json
import logging
import multiprocessing
import os
import queue
import tempfile
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from coss_hf.reporting.run_record import write_json
from coss_hf.study.trials import Cell, Setting, prepare, run_cell

logger = logging.getLogger(__name__)


class Sweep:
    """The cells of a study in a folder.

    ``cells/`` holds a file for each finished cell, which is never run again, and the checkpoints of unfinished ones;
    ``name.jsonl`` one line each in the order of the plan, whatever the order in which they ended, so that a sweep
    that was killed and started again leaves the same file as an unbroken one. Several studies may share the folder, and
    then the cells that they have in common.

    Args:
        folder: of the study; one sweep at a time.
        name: of its file.
        setting: what the cells share.
        jobs: cells side by side; they share the cores of the machine, and its GPUs in turn.
        header: put before each result: the command.

    Raises:
        ValueError: another sweep is at work in the folder.
    """

    def __init__(self, folder: Path, name: str, setting: Setting, jobs: int, header: dict):
        self.folder, self.setting, self.jobs, self.header = Path(folder), setting, jobs, header
        self.file = self.folder / f"{name}.jsonl"
        self.cells = self.folder / "cells"
        self.cells.mkdir(parents=True, exist_ok=True)
        self.plan: list[Cell] = []
        lock = FileLock(self.folder / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"--output_dir={folder}: another sweep is at work there; give another folder.") from None
        self._lock = lock
        self.gpus = visible_gpus()
        show_gpu(self.gpus, 0)  # one process does not take several

    def check(self, cells: list[Cell]) -> None:
        """Raises ValueError for a method that cannot run with its networks, before any training."""
        for cell in {(cell.pair, cell.method): cell for cell in cells}.values():
            with tempfile.TemporaryDirectory() as folder:
                prepare(cell, self.setting, Path(folder), [])

    def result(self, cell: Cell) -> dict | None:
        """Of a finished cell."""
        path = self.cells / f"{self.setting.key(cell)}.json"
        if not path.exists():
            return None
        # Cells that an earlier version finished name their metrics eval_...
        row = {name.removeprefix("eval_"): value for name, value in json.loads(path.read_text()).items()}
        return row | asdict(cell)

    def write(self) -> None:
        """The file of results, whole or as it was."""
        rows = [row for cell in self.plan if (row := self.result(cell))]
        # The last logged loss is a mean over the steps since a cell was last resumed.
        lines = [json.dumps(self.header | {k: v for k, v in row.items() if k != "loss"}) for row in rows]
        part = self.file.with_suffix(".part")
        part.write_text("".join(f"{line}\n" for line in lines))
        os.replace(part, self.file)

    def run(self, cells: list[Cell], later: int = 0) -> list[dict]:
        """Adds cells to the plan, runs those not finished, and returns the results of all of them, in order.

        Args:
            cells: to run.
            later: images of cells to come, for the time left that is displayed.
        """
        self.plan += [cell for cell in dict.fromkeys(cells) if cell not in self.plan]
        todo = list({self.setting.key(cell): cell for cell in cells if not self.result(cell)}.values())
        # The largest first would be quicker, the order of the plan is what a reader expects to watch.
        context = multiprocessing.get_context("spawn")
        seen, total = context.Queue(), sum(cell.num_images for cell in self.plan) + later
        progress = tqdm(total=total, initial=total - later - sum(c.num_images for c in todo), unit="img")
        threads, turns = max(1, torch.get_num_threads() // self.jobs), context.Queue()
        for turn in range(self.jobs):
            turns.put(turn)
        pool = ProcessPoolExecutor(self.jobs, context, _start, (seen, threads, self.gpus, turns))
        # Read when a process imports tqdm: those of the pool display nothing of their own.
        os.environ["TQDM_DISABLE"] = "1"
        with progress, pool, _no_new_cells_after_an_error(pool):
            counted = dict.fromkeys(todo, 0)
            running = {pool.submit(_work, cell, self.setting, self._work_folder(cell)): cell for cell in todo}
            while running:
                ended, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                with contextlib.suppress(queue.Empty):
                    while True:
                        cell, images = seen.get_nowait()
                        counted[cell] += images
                        progress.update(images)
                for future in ended:
                    cell = running.pop(future)
                    progress.update(cell.num_images - counted[cell])
                    counted[cell] = cell.num_images
                    write_json(self.cells / f"{self.setting.key(cell)}.json", future.result())
                    self.write()
                    progress.write(describe(future.result()))
        del os.environ["TQDM_DISABLE"]
        self.write()
        return [self.result(cell) for cell in cells]

    def _work_folder(self, cell: Cell) -> Path:
        return self.cells / self.setting.key(cell)


def describe(row: dict) -> str:
    """A finished cell in a line."""
    scores = {name: row[name] for name in ("linear", "knn10", "overlap10") if row.get(name)}
    words = ", ".join(f"{name} {100 * value:.1f} %" for name, value in scores.items())
    return f"{Cell(**{key: row[key] for key in Cell.__dataclass_fields__}).name}: {row.get('failed') or words}"


@contextlib.contextmanager
def _no_new_cells_after_an_error(pool: ProcessPoolExecutor):
    try:
        yield
    except BaseException:
        pool.shutdown(cancel_futures=True, wait=False)
        raise


_seen = None


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as in ``CUDA_VISIBLE_DEVICES``."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]


def show_gpu(gpus: list[str], turn: int) -> None:
    """Leaves this process, which has not used a GPU yet, one of them."""
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[turn % len(gpus)]


def _start(seen, threads: int, gpus: list[str], turns) -> None:
    global _seen
    _seen = seen
    show_gpu(gpus, turns.get())
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)  # one progress display, not one for each process
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """A sweep that is killed must not leave processes that write into its folder."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(cell: Cell, setting: Setting, folder: Path) -> dict:
    return run_cell(cell, setting, folder, lambda images: _seen.put((cell, images)))
