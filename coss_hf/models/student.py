"""A student with its head: images to embeddings in its teacher's space, where it can stand in for the teacher."""

from pathlib import Path

import torch
from torch import Tensor, nn

from coss_hf.models.backbone import Backbone
from coss_hf.models.embedding import embed
from coss_hf.models.heads import HEAD_FILE, load_head
from coss_hf.models.loading import load_backbone


class Student(nn.Module):
    """A backbone, its pooling, and its projection head where it has one.

    Attributes:
        backbone: the network.
        head: from its embeddings to the teacher's space, or None.
        dim: dimension of what comes out.

    Raises:
        ValueError: a head that does not fit the backbone's embeddings.
    """

    def __init__(self, backbone: Backbone, head: nn.Module | None = None):
        super().__init__()
        if head is not None and next(head.parameters()).shape[1] != backbone.dim:
            raise ValueError(
                f"--pooling={backbone.pooling}: embeddings of {backbone.dim} dimensions do not fit the head beside "
                f"{backbone.name}; use the pooling that it was trained with."
            )
        self.backbone, self.model, self.head = backbone, backbone.model, head
        self.dim = backbone.dim if head is None else [*head.parameters()][-1].shape[0]
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None) -> "Student":
        """Loads student and head of a run of ``recipes/distill.py``.

        Its embeddings can be compared with those of the teacher (``student.backbone.model.config.teacher_space``
        names it), for instance searched in a gallery that the teacher has embedded.

        Args:
            name: folder, or name on the Hub.
            revision: branch, tag or commit on the Hub.

        Raises:
            ValueError: no such network, one that was not trained into a teacher's space, or a head that is missing.
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
            state = "missing, so that the teacher's space cannot be reached" if head is None else "of another run"
            raise ValueError(f"student={name}: {HEAD_FILE} is {state}; take the folder as the run left it.")
        return cls(backbone, head)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Processed images ``(b, 3, h, w)`` to embeddings ``(b, dim)``."""
        embedding = self.backbone.features(pixel_values).embedding
        return embedding if self.head is None else self.head(embedding)

    @torch.no_grad()
    def embed(self, images, batch_size: int = 64) -> Tensor:
        """Images to embeddings ``(b, dim)``; arguments and errors as of ``coss_hf.embed``."""
        embedding = embed(self.backbone, images, batch_size=batch_size)
        return embedding if self.head is None else self.head(embedding)
