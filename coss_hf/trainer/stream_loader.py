"""Batches of a stream without end, and the place up to which its images were used."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from coss_hf.data.stream_views import Chunk, StreamViews
from coss_hf.utils.errors import RunStopped

FILE = "stream-{}.json"  # of a checkpoint, by process


class StreamLoader:
    """Cut what loader workers read into batches; pass follows pass, and no image is dropped between them.

    Args:
        views: chunks of the stream's views.
        args: of the training.
        position: where to begin, as of `position`; None for the beginning.
    """

    def __init__(self, views: StreamViews, args: TrainingArguments, position: dict | None = None):
        self._views = views
        self._batch_size = args.per_device_train_batch_size
        self._device = args.device
        self._workers = max(1, args.dataloader_num_workers)
        position = position or {"epoch": 0, "states": [None] * self._workers, "next": 0, "used": 0}
        self._epoch = position["epoch"]
        self._states = list(position["states"])
        self._next = position["next"]
        self._already_used = position["used"]
        self._resumed = any(state is not None for state in self._states)
        views.start_at(position)
        workers = {}
        if args.dataloader_num_workers:
            workers = {"persistent_workers": True, "prefetch_factor": args.dataloader_prefetch_factor or 2}
        self._loader = DataLoader(
            views,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            generator=torch.Generator(),  # the global one is that of the training
            **workers,
        )
        self.base_dataloader = self._loader
        self.position = position

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        waiting: list[tuple[Tensor, Tensor]] = []  # views and keys of less than a batch
        while True:
            found = 0
            for chunk in self._loader:
                found += len(chunk.keys)
                self._views.remember(chunk)
                used = self._take_used(chunk)
                start = self._batch_size - sum(len(keys) for _, keys in waiting) + used
                waiting.append((chunk.views[used:], chunk.keys[used:]))
                while sum(len(keys) for _, keys in waiting) >= self._batch_size:
                    self.position = self._place(chunk, start)
                    batch, waiting = _cut(waiting, self._batch_size)
                    yield self._moved(batch)
                    start += self._batch_size
                if chunk.state is not None:
                    self._states[chunk.worker] = chunk.state
                    self._next = (chunk.worker + 1) % self._workers
            if not found and not self._resumed:
                raise RunStopped(
                    "The stream gives no images to this process in a full pass; give more images, or fewer processes."
                )
            self._start_next_epoch()

    def _take_used(self, chunk: Chunk) -> int:
        """Number of images of a chunk that were used before a resume, which concerns the first chunk that was read."""
        if chunk.state is None:
            return 0
        used = self._already_used
        self._already_used = 0
        return used

    def _start_next_epoch(self) -> None:
        self._epoch += 1
        self._states = [None] * self._workers
        self._next = 0
        self._resumed = False
        self._views.set_epoch(self._epoch)

    def _place(self, chunk: Chunk, used: int) -> dict:
        """Where to begin after the first `used` images of a chunk."""
        states = list(self._states)
        if used == len(chunk.keys):
            states[chunk.worker] = chunk.state
            return {"epoch": self._epoch, "states": states, "next": (chunk.worker + 1) % self._workers, "used": 0}
        return {"epoch": self._epoch, "states": states, "next": chunk.worker, "used": used}

    def _moved(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        views, keys = (tensor.to(self._device, non_blocking=True) for tensor in batch)
        return {"pixel_values": views, "index": keys}


def _as_it_is(chunk: Chunk) -> Chunk:
    return chunk


def _cut(parts: list[tuple[Tensor, Tensor]], size: int) -> tuple[tuple[Tensor, Tensor], list[tuple[Tensor, Tensor]]]:
    """The first `size` images of parts that hold as many, and the rest."""
    parts = [part for part in parts if len(part[1])]
    views, keys = parts[0] if len(parts) == 1 else (torch.cat(column) for column in zip(*parts, strict=True))
    rest = [(views[size:], keys[size:])] if len(keys) > size else []
    return (views[:size], keys[:size]), rest


def save_position(folder: str | Path, position: dict, process: int) -> None:
    """Write the place of a process into a checkpoint."""
    Path(folder, FILE.format(process)).write_text(json.dumps(position))


def load_position(folder: str | Path, process: int) -> dict:
    """Read what `save_position` wrote.

    Raises:
        ValueError: it did not, or the file is damaged.
    """
    path = Path(folder, FILE.format(process))
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--resume_from_checkpoint: {path}, the place of a process in the stream, cannot be read ({error}); start "
            f"afresh in another --output_dir."
        ) from error
