"""The teacher of a training whose embeddings are kept: read where they are there, else embedded and kept."""

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import PIL
import torch
import torchvision
from PIL import features as pil_features
from torch import Tensor
from transformers import TrainerCallback

from coss_hf.data.teacher_cache import TeacherCache
from coss_hf.data.transform_identity import transform_identity
from coss_hf.data.views import ViewDataset
from coss_hf.features import Features
from coss_hf.models.backbone import Backbone
from coss_hf.models.modules import ModuleNetwork
from coss_hf.trainer.training_args import DistillationArguments
from coss_hf.utils.code_identity import code_identity
from coss_hf.utils.messages import get_logger
from coss_hf.utils.process_group import Processes

logger = get_logger(__name__)

FORMAT = "1"  # raise it where decoding, drawing or pooling change: rows of before are then not read
FEW = 8  # missing rows are embedded together with others of their batch up to this number
NOT_KNOWN_YET = {"--neighbors_pool", "--dataset"}  # before neighbours are searched, and in a dry run


def cache_folder(teacher_cache: str) -> Path:
    """The folder that ``--teacher_cache`` names."""
    if teacher_cache == "auto":
        return Path(datasets.config.HF_DATASETS_CACHE) / "coss_hf" / "teachers"
    return Path(teacher_cache)


def check_cached(teacher_cache: str, method: str, *, view_epochs: int, reads_maps: bool) -> None:
    """Check that the embeddings of a teacher are all that a training reads, and that its views come back.

    Args:
        teacher_cache: folder of the cache.
        method: the loss in the message, with the argument that gave it: ``--method=at``.
        view_epochs: number of epochs after which the views come back; 0: never.
        reads_maps: whether the loss reads the teacher's feature maps.

    Raises:
        ValueError: they are not, or they do not.
    """
    if reads_maps:
        raise ValueError(
            f"--teacher_cache={teacher_cache} keeps the teacher's embeddings, and {method} reads its feature "
            f"maps, which take hundreds of times the space: leave --teacher_cache out, or choose a method of "
            f"embeddings (coss, pkt, rkd, dist, ...) or of logits (kd)."
        )
    if not view_epochs:
        raise ValueError(
            f"--teacher_cache={teacher_cache} needs views that come back: give --view_epochs (to a ViewDataset, where "
            f"the training gets one), the number of epochs with views of their own. By default no view is seen twice."
        )


def teacher_identity(teacher: Backbone) -> str:
    """What tells the embeddings of teachers apart: their fingerprint, and their code.

    Fingerprints do not cover code, and name neighbours and runs that are on disk already.
    """
    network = teacher.model
    if isinstance(network, ModuleNetwork):
        code = code_identity(network, network.embedding)
    else:
        classes = {type(module) for module in network.modules()}
        code = code_identity(*sorted(classes, key=lambda found: (found.__module__, found.__qualname__)))
    return f"{teacher.fingerprint()} {code}"


def libraries() -> str:
    """Versions of all that decides pixels and draws besides the run's own arguments."""
    jpeg = pil_features.version("libjpeg_turbo") or pil_features.version("jpg")
    torchvision_version, numpy_version, torch_version = (
        ".".join(module.__version__.split(".")[:count]) for module, count in ((torchvision, 2), (np, 2), (torch, 1))
    )
    return (
        f"{FORMAT}, Pillow {PIL.__version__}, JPEG {jpeg}, torchvision {torchvision_version}, NumPy {numpy_version}, "
        f"PyTorch {torch_version}"
    )


class CachedTeacher(TrainerCallback):
    """Embeddings of a teacher, from a cache where they are there.

    As a callback it brings what was kept to the disk at the end of each epoch, with each checkpoint, and at the end.

    Args:
        args: of the training.
        teacher: frozen.
        views: of the training images, neighbours included.
        precision: in which the teacher computes: ``no``, ``bf16`` or ``fp16``.
        epochs: number of epochs of the training.

    Attributes:
        cache: the rows on disk.

    Raises:
        ValueError: views that do not come back.
    """

    def __init__(self, args: DistillationArguments, teacher: Backbone, views: ViewDataset, precision: str, epochs: int):
        self._args = args
        self._dim = teacher.dim
        self._epochs = epochs
        self._whole_batches = args.torch_compile  # else each number of missing rows would be compiled
        self._last: tuple[list[int], Tensor] | None = None
        with Processes().together():
            self._fixed = {
                "--teacher": teacher_identity(teacher),
                "precision": f"{precision} {args.tf32}",
                "--augmentation": transform_identity(views.augment, views.augmentation_name, views.size),
                "decoding and drawing": libraries(),
            }
            self._open(views, views.identity(), args.neighbors_k)

    def _open(self, views: ViewDataset, of_views: dict[str, str], k: int) -> None:
        args = self._args
        identity = of_views | self._fixed | {"--neighbors_k": str(k)}
        del identity["--view_epochs"]  # the first epochs of more are those of fewer
        identity.pop("--transform", None)  # --augmentation says more of it here
        shape = (views.view_epochs, len(views), 1 + k, self._dim)
        self.cache = TeacherCache(cache_folder(args.teacher_cache), identity, shape, dtype=args.teacher_cache_dtype)
        self._of_views: dict[str, str] | None = None

    def check_early(self) -> None:
        """Check folder and free space before neighbours are searched, on which the cache's own folder depends.

        Raises:
            ValueError: on all processes, where one cannot write or finds no space, and no cache there may be this one.
        """
        with Processes().together():
            if not self.cache.has_similar(NOT_KNOWN_YET):
                self._check_disk()

    def _check_disk(self) -> None:
        """Free space is needed only where rows are written."""
        if self.cache.check_writable(self._epochs):
            self.cache.check_free_space(self._epochs)

    def use(self, views: ViewDataset, show: bool) -> None:
        """Take the cache of these views as they are now, check it and say what is there; all processes together.

        Raises:
            ValueError: on all processes, where one cannot write or finds no space.
        """
        with Processes().together():
            of_views = views.identity()
            contents = views.know_contents()
            self._open(views, of_views | {"--dataset": contents}, views.k)
            self._of_views = of_views
            self._check_disk()
        if show:
            for line in self.description():
                logger.info("%s", line)

    def description(self) -> list[str]:
        """Where the cache is, its size and what is there; where nothing is, how the most similar other one differs."""
        lines = [f"Teacher cache {self.cache.describe()}"]
        if not self.cache.present() and self.cache.differences():
            lines.append(f"Teacher cache: {self.cache.differences()}.")
        return lines

    def start(self) -> None:
        """Make the files; all processes together.

        Raises:
            ValueError: on all processes, where one cannot write.
        """
        with Processes().together():
            self.cache.create(self._epochs)

    def knows(self, views: ViewDataset) -> bool:
        """Whether the views are still those that the cache was opened for."""
        return views.identity() == self._of_views

    def features(self, batch: dict, embed: Callable[[Tensor], Features]) -> Features:
        """Features of a batch's views: its rows of the cache; missing ones are embedded, and kept.

        What is embedded is rounded as the cache rounds it: an epoch is the same whatever was there.

        Args:
            batch: as ``collate_views`` makes it.
            embed: views ``(b, 3, H, W)`` to their features.
        """
        cached = batch["cached"]
        missing = batch["missing"]
        if not missing:
            return Features(cached)
        self._keep_last()
        views = batch["pixel_values"]
        positions = torch.tensor(missing, device=views.device)
        if len(missing) == len(views):
            embedding = embed(views).embedding
        elif self._whole_batches:
            embedding = embed(views).embedding[positions]
        else:
            embedding = embed(views[self._with_others(missing, len(views))]).embedding[: len(missing)]
        embedding = embedding.to(torch.float32, copy=True)  # the next step of a CUDA graph writes over its output
        self._last = (batch["missing_rows"], embedding)
        rounded = embedding.to(getattr(torch, self.cache.dtype.name)).float()
        rounded = torch.where(rounded.isfinite(), rounded, embedding)
        return Features(cached.index_copy(0, positions, rounded))

    @staticmethod
    def _with_others(missing: list[int], count: int) -> list[int]:
        """Positions of missing rows, filled up with others of the batch where they are few.

        One or two images alone take another path through a CPU's convolutions, and are rounded otherwise than among
        others: figures of a study that was interrupted differed. In larger groups they are rounded alike on the CPUs
        where this was compared.
        """
        others = set(range(count)).difference(missing)
        return missing + sorted(others)[: max(0, FEW - len(missing))]

    def _keep_last(self) -> None:
        """Keep the rows of the step before, which a GPU has computed by now: nothing waits for this one's."""
        if self._last is not None:
            rows, embedding = self._last
            self._last = None
            self.cache.write(rows, embedding)

    def flush(self) -> None:
        """Bring all rows to the disk."""
        self._keep_last()
        self.cache.flush()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.flush()

    def on_save(self, args, state, control, **kwargs):
        self.flush()

    def on_train_end(self, args, state, control, **kwargs):
        self.flush()
