"""Students against one teacher on one set of images."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import set_seed

from coss_hf.data.labels import class_numbers
from coss_hf.data.processed_images import ProcessedImages
from coss_hf.data.reading import ImageReader
from coss_hf.evaluation.agreement import duplicate_share, effective_rank
from coss_hf.evaluation.embeddings import KS, MIN_PROBE, evaluate_embeddings
from coss_hf.models.backbone import Backbone
from coss_hf.models.embedding import embed_dataset
from coss_hf.models.modules import ModuleNetwork
from coss_hf.utils.messages import first_names, get_logger

logger = get_logger(__name__)


def sample(rows: Dataset | None, size: int | None) -> Dataset | None:
    """``size`` rows at most, drawn, since folders of images are sorted by class; in the dataset's order."""
    if rows is None or size is None:
        return rows
    return rows.select(np.sort(np.random.default_rng(0).permutation(len(rows))[:size]))


class Evaluator:
    """Embeds images un-augmented, each network through its full image processor, and measures.

    The teacher's embeddings are computed once.

    Args:
        teacher: The network that students are compared with.
        test_images: Images of test or validation, as from ``load_images``.
        image_column: Column of the images in ``test_images`` and ``train_images``.
        label_column: Column of the labels, of any kind; without it or ``train_images``, only agreement is measured.
        train_images: Training images: neighbours of the k-NN classifier, training set of the probe, and gallery.
        batch_size: Images per forward pass.
        num_workers: Number of processes that decode images.
        linear: With labels also measure the paper's linear evaluation.
        diagnostics: Also measure what tells whether training works, see ``evaluate_embeddings``; and of the teacher
            its effective rank and duplicates.
        retrieval: With labels also measure retrieval, from the network's own gallery and from the teacher's.
        on_bad_image: What to do where an image can no longer be decoded, see ``ImageReader``.

    Attributes:
        train_images: as given; None where labels are missing, see ``class_numbers``.
        train_labels, test_labels: class numbers ``(n,)`` and ``(m,)``; None where labels are missing.
        class_names: names of the classes, by number; empty where labels are missing.
        test_readable, train_readable: ``(m,)`` and ``(n,)`` which images could be decoded so far; others are left out.
    """

    def __init__(
        self,
        teacher: Backbone,
        test_images: Dataset,
        image_column: str,
        *,
        label_column: str | None = None,
        train_images: Dataset | None = None,
        batch_size: int = 256,
        num_workers: int = 0,
        linear: bool = False,
        diagnostics: bool = False,
        retrieval: bool = False,
        on_bad_image: str = "error",
    ):
        self.teacher = teacher
        self.test_images = test_images
        self.image_column = image_column
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.linear = linear
        self.diagnostics = diagnostics
        self.retrieval = retrieval
        self.on_bad_image = on_bad_image
        self.train_images: Dataset | None = None
        self.train_labels: Tensor | None = None
        self.test_labels: Tensor | None = None
        self.class_names: list[str] = []
        if label_column and train_images is not None:
            found = class_numbers(label_column, train_images, test_images)
            if found is not None:
                self.train_images = train_images
                (self.train_labels, self.test_labels), self.class_names = found
        self.test_readable = torch.ones(len(test_images), dtype=torch.bool)
        self.train_readable = torch.ones(len(train_images) if train_images is not None else 0, dtype=torch.bool)
        self._teacher_test_features: Tensor | None = None
        self._teacher_train_features: Tensor | None = None
        self._teacher_diagnostics: dict[str, float] = {}

    def embed(self, backbone: Backbone, images: Dataset, description: str) -> Tensor:
        """Embeddings ``(n, d)`` of ``images``."""
        rows = ProcessedImages(images, self.image_column, backbone.preprocess, self.on_bad_image)
        if self.num_workers:
            rows.reader.share_memory()
        embeddings = embed_dataset(
            backbone,
            rows,
            description=description,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
        )
        self._note_lost(images, rows.reader)
        return embeddings

    def _note_lost(self, images: Dataset, reader: ImageReader) -> None:
        """Images that were replaced are not measured: what stands in their place has another label."""
        if images is not self.test_images and images is not self.train_images:
            return
        readable = self.test_readable if images is self.test_images else self.train_readable
        new = [row for row in reader.replaced() if readable[row]]
        readable[new] = False
        if new:
            logger.warning(
                "Evaluation: %d of %d images can no longer be decoded and are left out: %s.",
                *(int((~readable).sum()), len(readable), first_names(reader.names(new))),
            )

    def metric_names(self) -> list[str]:
        """Names of the metrics that are defined for these images, found on noise."""
        noise = torch.randn(len(self.test_images), 4, generator=torch.Generator().manual_seed(0))
        names = [
            name
            for name, value in evaluate_embeddings(noise, noise, diagnostics=self.diagnostics).items()
            if value is not None
        ]
        if self.train_labels is not None:
            names += [f"knn{k}" for k in KS if k <= len(self.train_labels)]
            names += ["probe"] if len(self.train_labels) >= MIN_PROBE else []
        return names

    @property
    def teacher_test_features(self) -> Tensor:
        """The teacher's embeddings of the test images ``(m, d_t)``."""
        if self._teacher_test_features is None:
            self._teacher_test_features = self.embed(self.teacher, self.test_images, "Teacher")
        return self._teacher_test_features

    @property
    def teacher_train_features(self) -> Tensor | None:
        """The teacher's embeddings of the train images ``(n, d_t)``; None without labels."""
        if self._teacher_train_features is None and self.train_images is not None:
            self._teacher_train_features = self.embed(self.teacher, self.train_images, "Teacher, train images")
        return self._teacher_train_features

    @property
    def teacher_diagnostics(self) -> dict[str, float]:
        """Diagnostics of the teacher's own embeddings; empty where none are measured."""
        if self.diagnostics and not self._teacher_diagnostics:
            features = _rows_of(self.test_readable)(self.teacher_test_features)
            self._teacher_diagnostics = {
                "teacher_effective_rank": effective_rank(features),
                "teacher_duplicates": duplicate_share(features),
            }
        return self._teacher_diagnostics

    def __call__(
        self, student: Backbone, project: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[dict[str, float | None], Tensor]:
        """Measure ``student``.

        Args:
            student: The network to measure, the teacher itself included.
            project: Its head, ``(m, d_s)`` to ``(m, d_t)``, where it has one.

        Returns:
            Metrics by name (see ``evaluate_embeddings``), None where one is not defined; and the embeddings of the
            test images ``(m, d)``, through ``project`` where it is given.

        Raises:
            NonFiniteEmbedding: a network gives NaN or infinity for an image.
        """
        train_features = None
        if student is self.teacher:
            test_features = self.teacher_test_features
            train_features = self.teacher_train_features
        else:
            test_features = self.embed(student, self.test_images, "Student")
            if self.train_images is not None:
                train_features = self.embed(student, self.train_images, "Student, train images")
        with torch.no_grad():
            projected = project(test_features) if project else None
        of_teacher = self.teacher_test_features, self.teacher_train_features  # before it is known what is readable
        test = _rows_of(self.test_readable)
        train = _rows_of(self.train_readable)
        metrics = evaluate_embeddings(
            test(test_features),
            test(of_teacher[0]),
            train_features=train(train_features),
            train_labels=train(self.train_labels),
            test_labels=test(self.test_labels),
            projected=test(projected),
            teacher_gallery=train(of_teacher[1]) if self.retrieval else None,
            linear=self.linear,
            diagnostics=self.diagnostics,
        )
        metrics |= self.teacher_diagnostics
        return metrics, test_features if projected is None else projected


def _rows_of(readable: Tensor) -> Callable[[Tensor | None], Tensor | None]:
    """What takes these rows of a tensor; the tensor itself where they are all."""
    if readable.all():
        return lambda rows: rows
    return lambda rows: None if rows is None else rows[readable]


def random_weights(backbone: Backbone, seed: int = 0) -> Backbone:
    """The same network before any training: the baseline of every comparison."""
    twin = copy.copy(backbone)
    set_seed(seed)
    model = backbone.model
    drawn = model.at_random() if isinstance(model, ModuleNetwork) else type(model)._from_config(model.config)
    twin.model = drawn.to(model.device)
    return twin


def compare(
    evaluator: Evaluator, student: Backbone, project: Callable[[Tensor], Tensor] | None = None, seed: int = 0
) -> dict[str, dict]:
    """Metrics and ``parameters`` of ``teacher``, ``student`` and ``random``, the student at random weights."""
    rows = {
        "teacher": (evaluator.teacher, None),
        "student": (student, project),
        "random": (random_weights(student, seed), None),
    }
    return {
        name: {"name": network.name, "parameters": network.num_parameters(), **evaluator(network, head)[0]}
        for name, (network, head) in rows.items()
    }
