"""What is trained: student, projection head and the learnable parts of the loss, in one forward pass."""

import torch
from torch import Tensor, nn

from coss_hf.features import Features
from coss_hf.losses.coss import mean_cosines
from coss_hf.models.backbone import Backbone


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
