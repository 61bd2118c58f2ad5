"""A student with its head: images to embeddings in its teacher's space, where it can replace the teacher."""

from pathlib import Path

import torch
from torch import Tensor, nn

from coss_hf.models.backbone import Backbone
from coss_hf.models.embedding import embed
from coss_hf.models.heads import HEAD_FILE, load_head
from coss_hf.models.loading import load_backbone


class Student(nn.Module):
    """A backbone with its projection head, where it has one; frozen, in evaluation mode.

    Args:
        backbone: the network with its pooling and pre-processing.
        head: the projection head from its embeddings to the teacher's space.

    Attributes:
        backbone: the network with its pooling and pre-processing.
        model: the network alone, ``backbone.model``.
        head: the projection head, or None.
        dim: dimension of the embeddings.

    Raises:
        ValueError: a head that does not fit the backbone's embeddings.
    """

    def __init__(self, backbone: Backbone, head: nn.Module | None = None):
        super().__init__()
        if head is not None and next(head.parameters()).shape[1] != backbone.dim:
            raise ValueError(
                f"--pooling={backbone.pooling}: embeddings of {backbone.dim} dimensions do not fit the head of "
                f"{backbone.name}; use the pooling that it was trained with."
            )
        self.backbone = backbone
        self.model = backbone.model
        self.head = head
        self.dim = backbone.dim if head is None else [*head.parameters()][-1].shape[0]
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None) -> "Student":
        """Load student and head of a run of ``recipes/distill.py``.

        Its embeddings can be compared with those of the teacher (``student.backbone.model.config.teacher_space``
        names it), for instance searched in a gallery that the teacher has embedded.

        Args:
            name: folder, or name on the Hub.
            revision: branch, tag or commit on the Hub.

        Raises:
            ValueError: an unknown network, one that was not trained into a teacher's space, or a missing head.
        """
        name = str(name)
        backbone = load_backbone(name, argument="student", revision=revision).freeze()
        space = getattr(backbone.model.config, "teacher_space", None)
        if space is None:
            raise ValueError(
                f"student={name} was not trained into a teacher's space (no teacher_space in its config.json); embed "
                f"in its own with coss_hf.embed."
            )
        head = load_head(name, revision)
        if (head is None) == space["head"]:
            state = "of another run"
            if head is None:
                state = "missing, so that the teacher's space cannot be reached"
            raise ValueError(f"student={name}: {HEAD_FILE} is {state}; take the folder as the run left it.")
        return cls(backbone, head)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed processed images ``(b, 3, h, w)``: ``(b, dim)``."""
        embedding = self.backbone.features(pixel_values).embedding
        return embedding if self.head is None else self.head(embedding)

    @torch.no_grad()
    def embed(self, images, batch_size: int = 64) -> Tensor:
        """Embed images: ``(b, dim)``. Arguments and errors are those of ``coss_hf.embed``."""
        embedding = embed(self.backbone, images, batch_size=batch_size)
        return embedding if self.head is None else self.head(embedding)
