"""Views of the images of a stream: each process and each loader worker reads its own part of the shards."""

import copy
import itertools
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import get_worker_info

from coss_hf.data.decoding import Decoded, content_hash, decode_reduced, is_fault_of_image
from coss_hf.data.streams import Stream, is_shuffled, stream_bytes
from coss_hf.data.transform_identity import MAKING_VIEWS, transform_code
from coss_hf.data.views import make_view, resolve_augmentation
from coss_hf.utils.code_identity import code_entry
from coss_hf.utils.errors import UnreadableImage
from coss_hf.utils.randomness import keeping_generators

NAMES = 50_000  # images whose names are remembered, for messages
MAX_KEY = 2**63 - 1  # keys are int64, and not below 0


class Chunk(NamedTuple):
    """Views of the next images of a worker.

    Attributes:
        views: uint8 (n, 3, size, size); n may be 0.
        keys: int64 (n,), made of the content of each image.
        names: n names of images, for messages.
        left_out: names of the images in between that cannot be decoded.
        worker: number of the worker, 0 without workers.
        state: where the worker continues, see `StreamViews`; None where it has read nothing.
    """

    views: Tensor
    keys: Tensor
    names: list[str]
    left_out: list[str]
    worker: int
    state: dict | None


class _Undecodable(Exception):
    """Told apart from what a transform raises."""


class StreamViews(torch.utils.data.IterableDataset):
    """Chunks of views of a stream, one pass at a time.

    A view is a pure function of (view seed, epoch, content of the image). The order is one of (seed, epoch, process,
    worker): images are read in blocks of `shuffle_buffer_size`, and each block is shuffled. A worker's place is the
    stream's `state_dict` at the start of a block, the number of the block, and how many of its images are done. So a
    resumed pass reads at most one block again, and no image is repeated or left out.

    Args:
        stream: the images.
        image_column: the name of their column.
        augmentation_name: see `ViewDataset`.
        size: the side of a view in pixels.
        chunk_size: number of images of a chunk.
        seed: the seed of the order.
        view_seed: the seed of the views; None for `seed`.
        reduced_decoding: see `ViewDataset`.
        on_bad_image: "error", or "skip" to leave out images that cannot be decoded.
        shuffle_buffer_size: number of images that are shuffled at a time; 0 for the order of the stream. A stream that
            shuffles by itself keeps its order.
        process: number of this process.
        processes: number of processes, each of which reads its part of the shards.
        workers: number of loader workers of a process.

    Attributes:
        left_out: names of the images that were left out so far, since they cannot be decoded.
    """

    k = 0
    neighbors = None
    short = (0, 0)

    def __init__(
        self,
        stream: Stream,
        image_column: str,
        augmentation_name: str | Callable,
        size: int,
        *,
        chunk_size: int,
        seed: int = 0,
        view_seed: int | None = None,
        reduced_decoding: bool = True,
        on_bad_image: str = "error",
        shuffle_buffer_size: int = 0,
        process: int = 0,
        processes: int = 1,
        workers: int = 0,
    ):
        self.augment, self.augmentation_name = resolve_augmentation(augmentation_name, size)
        self._built_in = isinstance(augmentation_name, str)
        self._transform_code = "" if self._built_in else transform_code(self.augment, size)
        self.size = size
        self.seed = seed
        self.view_seed = seed if view_seed is None else view_seed
        self.reduced_decoding = reduced_decoding
        self.image_column = image_column
        self.on_bad_image = on_bad_image
        self.chunk_size = chunk_size
        self.shuffles_itself = is_shuffled(stream.rows)
        self.shuffle = bool(shuffle_buffer_size) and not self.shuffles_itself
        # Of complete chunks.
        self.block_size = -(-max(shuffle_buffer_size, 1) // chunk_size) * chunk_size if self.shuffle else chunk_size
        self.process = process
        self.processes = processes
        self.workers = workers
        self._rows = stream.rows if processes == 1 else split_dataset_by_node(stream.rows, process, processes)
        self._held_out = set(stream.held_out.tolist())
        self._stream_identity = stream.identity
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._start: dict | None = None
        self._names: OrderedDict[int, str] = OrderedDict()
        self.left_out: list[str] = []
        self.set_epoch(0)

    # ---- as a dataset of views ----

    @property
    def epoch(self) -> int:
        """The current pass, in shared memory: a change reaches loader workers that are already running."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Begin another pass, in this process and its workers; only between passes."""
        self._epoch.fill_(epoch)
        # Shards are shuffled by datasets in any pass that is not 0, from its number. In memory that workers share, too:
        # two of them that set it at once would add up what they set.
        self._rows.set_epoch(self._pass_of_shards(epoch))

    def _pass_of_shards(self, epoch: int) -> int:
        """The pass for `datasets`: from an own seed, the stream's own, or always 0 where the order is to be kept."""
        if self.shuffle:
            return 1 + self._key(self.seed, epoch, 0) // 2
        return epoch if self.shuffles_itself else 0

    def identity(self) -> dict[str, str]:
        """What determines the views of a run, by command-line flag; and the parts that its places belong to."""
        order = str(self.block_size if self.shuffle else 0)
        if not (self.shuffle or self.shuffles_itself):
            order += " in the same order in each pass"  # once later passes had another one
        return {
            "--dataset": f"stream {self._stream_identity}",
            "--augmentation": self.augmentation_name,
            **code_entry("--transform", self._transform_code, MAKING_VIEWS),
            "--view_size": str(self.size),
            "--view_seed": str(self.view_seed),
            "--reduced_decoding": str(self.reduced_decoding),
            "--validation_size": f"{len(self._held_out)} images held out",
            "--shuffle_buffer_size": f"{order}, {self.chunk_size} at a time",
            # The place in a stream is that of each process and each of its workers.
            "--num_processes": f"{self.processes}, each at its place in the stream",
            "--dataloader_num_workers": f"{self.workers}, each at its place in the stream",
        }

    def names(self, keys: list[int]) -> list[str]:
        """Names of images that were seen lately."""
        return [self._names.get(key, f"image {key:016x}") for key in keys]

    def remember(self, chunk: Chunk) -> None:
        """Take note of the names in a chunk."""
        self._names.update(zip(chunk.keys.tolist(), chunk.names, strict=True))
        while len(self._names) > NAMES:
            self._names.popitem(last=False)
        for name in chunk.left_out:
            if name not in self.left_out:
                self.left_out.append(name)

    def replaced_names(self) -> list[str]:
        """Names of the images that were left out so far."""
        return self.left_out

    # ---- reading ----

    def start_at(self, position: dict | None) -> None:
        """Begin the pass `position["epoch"]` there: `states` by worker, and the worker whose turn is `next`."""
        self._start = position
        self.set_epoch(0 if position is None else position["epoch"])

    def __iter__(self) -> Iterator[Chunk]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        epoch = self.epoch
        start = self._start if self._start is not None and self._start["epoch"] == epoch else None
        if start is not None and worker < start["next"]:
            yield self._chunk([], epoch, [], worker, None)  # so that the loader begins with the worker after it
        state = None if start is None else start["states"][worker]
        done = 0 if state is None else state["rows"]
        for block, number, stream_state in self._blocks(state):
            order = self._order(len(block), epoch, worker, number)
            for first in range(done, len(block), self.chunk_size):
                rows = order[first : first + self.chunk_size]
                after = {"stream": stream_state, "block": number, "rows": min(first + self.chunk_size, len(block))}
                records = [block[row] for row in rows]
                for row in rows:
                    block[row] = None  # frees its bytes
                yield self._chunk(records, epoch, [number * self.block_size + row for row in rows], worker, after)
            done = 0

    def _blocks(self, state: dict | None) -> Iterator[tuple[list[dict | None], int, dict | None]]:
        """Blocks of images with their numbers and the stream's state before each."""
        # A state that is loaded here must not be that of the next pass; a copy made by datasets shares all attributes.
        stream = copy.copy(self._rows)
        stream.__dict__ = dict(self._rows.__dict__)
        number = 0 if state is None else state["block"]
        by_state = not self.shuffles_itself
        before = None if state is None else state["stream"]
        if before is not None:
            stream.load_state_dict(copy.deepcopy(before))
        rows = iter(stream)
        if not by_state:
            # Its buffer is not part of its state: what was read is read again, and not decoded.
            skipped = number * self.block_size
            next(itertools.islice(rows, skipped, skipped), None)
        while True:
            block = [row[self.image_column] for row in itertools.islice(rows, self.block_size)]
            if not block:
                return
            yield block, number, before
            number += 1
            before = stream.state_dict() if by_state else None

    def _order(self, count: int, epoch: int, worker: int, block: int) -> list[int]:
        if not self.shuffle:
            return list(range(count))
        key = [self.seed, epoch, self.process, worker, block]
        return np.random.default_rng(key).permutation(count).tolist()

    def _chunk(self, records: list, epoch: int, rows: list[int], worker: int, state: dict | None) -> Chunk:
        views = []
        keys = []
        names = []
        left_out = []
        with keeping_generators():
            for record, row in zip(records, rows, strict=True):
                name = (record or {}).get("path") or f"row {row} of worker {worker} of process {self.process}"
                try:
                    data = stream_bytes(record)
                except (OSError, ValueError) as error:
                    if isinstance(error, UnreadableImage) or not is_fault_of_image(error):
                        raise  # it cannot be downloaded, for instance, and may be good
                    left_out.append(self._left_out(name, error))
                    continue
                key = content_hash(data)
                if key in self._held_out:
                    continue
                key &= MAX_KEY
                try:
                    views.append(self._view(data, name, self._key(self.view_seed, epoch, key)))
                except _Undecodable as error:
                    left_out.append(self._left_out(name, error.__cause__))
                    continue
                keys.append(key)
                names.append(name)
        stacked = torch.stack(views) if views else torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        return Chunk(stacked, torch.tensor(keys, dtype=torch.int64), names, left_out, worker, state)

    def _view(self, data: bytes, name: str, key: int) -> Tensor:
        def decoded(reduction: Callable | None) -> Decoded:
            try:
                return decode_reduced({"bytes": data, "path": name}, reduction)
            except ValueError as error:
                raise _Undecodable from error

        return make_view(self.augment, decoded, key, built_in=self._built_in, reduced_decoding=self.reduced_decoding)

    def _left_out(self, name: str, error: Exception) -> str:
        if self.on_bad_image != "skip":
            text = str(error) if isinstance(error, ValueError) and name in str(error) else f"{name}: {error}"
            raise UnreadableImage(
                f"--on_bad_image error: {text}. Repair it, or give --on_bad_image skip, which leaves such images out; "
                f"with --resume_from_checkpoint, where a checkpoint was written."
            ) from error
        return name

    @staticmethod
    def _key(seed: int, epoch: int, key: int) -> int:
        """A hash, so that neighbouring keys start unrelated streams. 32 bits are all that torch's generator takes."""
        packed = struct.pack("<3q", seed, epoch, key)
        return int.from_bytes(blake2b(packed, digest_size=4).digest(), "little")
