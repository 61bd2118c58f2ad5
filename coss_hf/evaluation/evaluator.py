"""Students against one teacher on one set of images."""

import copy
import logging
from collections.abc import Callable

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import set_seed

from coss_hf.data.processed_images import ProcessedImages
from coss_hf.evaluation.agreement import duplicate_share, effective_rank
from coss_hf.evaluation.embeddings import evaluate_embeddings
from coss_hf.models.backbone import Backbone
from coss_hf.models.embedding import embed_dataset

logger = logging.getLogger(__name__)


def labelled(numbers: list[int | None]) -> bool:
    """Whether every image has its class. The Hub keeps test labels back as -1; a folder without classes gives None."""
    return all(number is not None and number >= 0 for number in numbers)


def sample(rows: Dataset | None, size: int | None) -> Dataset | None:
    """``size`` rows at most, drawn, since folders of images are sorted by class; in the dataset's order."""
    if rows is None or size is None:
        return rows
    return rows.select(np.sort(np.random.default_rng(0).permutation(len(rows))[:size]))


class Evaluator:
    """Embeds images un-augmented, each network through its full image processor, and measures.

    The teacher's embeddings are computed once.

    Args:
        teacher: compared with.
        queries: images of test or validation, as from ``load_images``.
        image_column: of ``queries`` and ``bank``.
        label_column: class numbers for k-NN and probe; without it, or without a bank, only agreement is measured.
        bank: training images, the k-NN bank and the probe's training set.
        batch_size: images a forward pass.
        num_workers: processes that decode.
        linear, panel: see ``evaluate_embeddings``; a panel also has the teacher's effective rank and duplicates.
        retrieval: with labels also retrieval, from the network's own gallery and from the teacher's.
    """

    def __init__(
        self,
        teacher: Backbone,
        queries: Dataset,
        image_column: str,
        *,
        label_column: str | None = None,
        bank: Dataset | None = None,
        batch_size: int = 256,
        num_workers: int = 0,
        linear: bool = False,
        panel: bool = False,
        retrieval: bool = False,
    ):
        self.teacher, self.queries, self.image_column = teacher, queries, image_column
        self.options = {"batch_size": batch_size, "num_workers": num_workers}
        self.bank, self.labels, self.linear, self.panel, self.retrieval = None, {}, linear, panel, retrieval
        if label_column and bank is not None:
            splits = {"test_labels": queries, "bank_labels": bank}
            labels = {name: rows[label_column][:] for name, rows in splits.items()}
            if all(labelled(numbers) for numbers in labels.values()):
                self.bank, self.labels = bank, {name: torch.as_tensor(numbers) for name, numbers in labels.items()}
            else:
                logger.warning("Column %s lacks labels: only agreement is measured.", label_column)
        self._teacher_queries, self._teacher_bank, self._teacher_panel = None, None, {}

    def embed(self, backbone: Backbone, images: Dataset, description: str) -> Tensor:
        """Embeddings ``(n, d)`` of ``images``."""
        rows = ProcessedImages(images, self.image_column, backbone.preprocess)
        return embed_dataset(backbone, rows, description=description, **self.options)

    @property
    def teacher_queries(self) -> Tensor:
        """The teacher's embeddings of the queries ``(m, d)``."""
        if self._teacher_queries is None:
            self._teacher_queries = self.embed(self.teacher, self.queries, "Teacher")
        return self._teacher_queries

    @property
    def teacher_bank(self) -> Tensor | None:
        """The teacher's embeddings of the bank ``(n, d_t)``; None without labels."""
        if self._teacher_bank is None and self.bank is not None:
            self._teacher_bank = self.embed(self.teacher, self.bank, "Teacher's bank")
        return self._teacher_bank

    @property
    def teacher_panel(self) -> dict[str, float]:
        """The teacher's own side of a panel."""
        if self.panel and not self._teacher_panel:
            self._teacher_panel = {
                "eval_teacher_effective_rank": effective_rank(self.teacher_queries),
                "eval_teacher_duplicates": duplicate_share(self.teacher_queries),
            }
        return self._teacher_panel

    def __call__(
        self, student: Backbone, project: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[dict[str, float | None], Tensor]:
        """Metrics of ``student`` (see ``evaluate_embeddings``) and its embeddings of the queries.

        Args:
            student: the network, the teacher itself included.
            project: its head, ``(m, d_s)`` to ``(m, d_t)``, where it has one.
        """
        if student is self.teacher:
            queries, bank = self.teacher_queries, self.teacher_bank
        else:
            queries = self.embed(student, self.queries, "Student")
            bank = self.embed(student, self.bank, "Bank") if self.bank is not None else None
        with torch.no_grad():
            projected = project(queries) if project else None
        metrics = evaluate_embeddings(
            queries,
            self.teacher_queries,
            student_bank=bank,
            projected=projected,
            teacher_bank=self.teacher_bank if self.retrieval else None,
            linear=self.linear,
            panel=self.panel,
            **self.labels,
        )
        metrics |= self.teacher_panel
        return metrics, queries if projected is None else projected


def random_weights(backbone: Backbone, seed: int = 0) -> Backbone:
    """The same network before any training: the control of every comparison."""
    twin = copy.copy(backbone)
    set_seed(seed)
    twin.model = type(backbone.model)._from_config(backbone.model.config).to(backbone.model.device)
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
