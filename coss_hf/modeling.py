"""What is trained: student, projection head and the learnable parts of the loss, in one forward pass."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import cached_file

from coss_hf.backbones import Backbone
from coss_hf.features import Features
from coss_hf.losses.coss import mean_cosines

HEADS = ("auto", "none", "linear", "mlp")
HEAD_FILE = "head.safetensors"


def projection_head(kind: str, student_dim: int, teacher_dim: int, hidden_dim: int = 2048) -> nn.Module | None:
    """Head from the student's to the teacher's dimension; not part of the published student.

    Args:
        kind: ``linear``; ``mlp``: Linear(s, hidden) - ReLU - Linear(hidden, t), as in the paper's public code, without
            batch norm; ``none``; ``auto``: ``none`` where the dimensions are equal, else ``mlp``.

    Raises:
        ValueError: an unknown kind, or ``none`` with dimensions that differ.
    """
    if kind not in HEADS:
        raise ValueError(f"--head={kind!r} is unknown: choose one of {', '.join(HEADS)}.")
    if kind == "auto":
        kind = "none" if student_dim == teacher_dim else "mlp"
    if kind == "none":
        if student_dim != teacher_dim:
            raise ValueError(
                f"--head=none, but the student's embedding has {student_dim} dimensions and the teacher's "
                f"{teacher_dim}: use --head mlp or --head linear."
            )
        return None
    if kind == "linear":
        return nn.Linear(student_dim, teacher_dim)
    return nn.Sequential(nn.Linear(student_dim, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, teacher_dim))


def file_beside(name: str | Path, file: str, revision: str | None = None) -> str | None:
    """Path of a file that a run left beside its student, a folder or a name on the Hub; None where there is none."""
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    return cached_file(str(name), file, revision=revision, **quiet)


def load_head(name: str | Path, revision: str | None = None) -> nn.Module | None:
    """The projection head that a run left beside its student, in evaluation mode; None where there is none.

    Args:
        name: folder, or name on the Hub.
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: a file that holds no head of ``projection_head``.
    """
    path = file_beside(name, HEAD_FILE, revision)
    if path is None:
        return None
    tensors = load_file(path)
    matrices = [tensor for name, tensor in sorted(tensors.items()) if name.endswith("weight")]
    kind = {("bias", "weight"): "linear", ("0.bias", "0.weight", "2.bias", "2.weight"): "mlp"}.get(
        tuple(sorted(tensors))
    )
    if kind is None:
        raise ValueError(f"{path} holds {', '.join(sorted(tensors))}: no linear or mlp head; remove or replace it.")
    head = projection_head(kind, matrices[0].shape[1], matrices[-1].shape[0], matrices[0].shape[0])
    head.load_state_dict(tensors)
    return head.eval()


class DistillationModel(nn.Module):
    """Student, head and criterion as one module, so that every trainable part is reached by one forward pass.

    Attributes:
        student: the published network.
        head: projection to the teacher's dimension, or None.
        criterion: the loss, with what it learns.
    """

    # Trainer would take any network that swallows keyword arguments for one that scales its loss by itself.
    accepts_loss_kwargs = False
    main_input_name = "pixel_values"

    def __init__(self, student: Backbone, criterion: nn.Module, head: nn.Module | None = None):
        super().__init__()
        self.backbone = student
        self.student, self.head, self.criterion = student.model, head, criterion
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(name not in student.unused)
        # DistributedDataParallel would overwrite each process's memories at every step with the first one's.
        self._ddp_params_and_buffers_to_ignore = [f"criterion.{name}" for name, _ in criterion.named_buffers()]

    def project(self, embedding: Tensor) -> Tensor:
        """Student embeddings ``(b, s)`` in the teacher's space ``(b, t)``."""
        return embedding if self.head is None else self.head(embedding.to(next(self.head.parameters()).dtype))

    def activation_checkpointing_enable(self, **kwargs) -> None:
        """Called by Trainer on the module it trains."""
        self.student.activation_checkpointing_enable(**kwargs)

    def gradient_checkpointing_enable(self, **kwargs) -> None:
        """The same, as older versions of Transformers call it."""
        self.student.gradient_checkpointing_enable(**kwargs)

    def forward(
        self,
        pixel_values: Tensor,
        teacher: Features,
        index: Tensor,
        rest: Tensor | None = None,
        only_totals: bool = False,
    ) -> dict[str, Tensor]:
        """Loss of a batch.

        Args:
            pixel_values: views ``(b, 3, H, W)``, uint8.
            teacher: its features of the same views.
            index: ``(b,)`` dataset row of each view.
            rest: the criterion's totals of the other micro-batches; see ``accumulation``.
            only_totals: return this batch's ``totals`` and no loss.

        Returns:
            ``loss`` and its named parts; ``finite`` ``(b,)``, whether each image's features are; ``cosine_sample`` and
            ``cosine_dimension``, the mean cosine similarity to the teacher per image and per feature dimension.
        """
        pixels = self.backbone.normalize(pixel_values).to(next(self.student.parameters()).dtype)
        features = self.backbone.features(pixels)
        student = features._replace(embedding=self.project(features.embedding))
        if only_totals:
            return {"totals": self.criterion.totals(student, teacher)}
        output = self.criterion(student, teacher, index, **({} if rest is None else {"rest": rest}))
        output["finite"] = student.embedding.isfinite().all(1) & teacher.embedding.isfinite().all(1)
        if "l_co" in output:
            cosines = -output["l_co"].detach(), -output["l_ss"].detach()
        elif student.embedding.shape == teacher.embedding.shape:
            with torch.no_grad():
                cosines = mean_cosines(student.embedding, teacher.embedding)
        else:
            return output
        return output | dict(zip(("cosine_sample", "cosine_dimension"), cosines))
