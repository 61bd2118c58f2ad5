"""What is trained: student, projection head and the learnable parts of the loss, in one forward pass."""

import copy

import numpy as np
import torch
from torch import Tensor, nn
from transformers import set_seed

from coss_hf.features import Features
from coss_hf.losses.coss import mean_cosines
from coss_hf.losses.registry import LOSSES, build_loss, read_as_declared, read_by, summands
from coss_hf.models.backbone import Backbone, forget_freezing, unfreeze
from coss_hf.models.classifier_head import find_classifier
from coss_hf.models.heads import projection_head
from coss_hf.models.pooler import pooler_output
from coss_hf.trainer.training_args import DistillationArguments
from coss_hf.utils.messages import first_line, get_logger

logger = get_logger(__name__)


class DistillationModel(nn.Module):
    """Student, head and criterion as one module, so that one forward pass reaches every trainable part.

    Attributes:
        student: the published backbone, a ``Backbone``.
        network: its network, the trained module.
        head: projection to the teacher's dimension, or None.
        criterion: the loss, with what it learns.
    """

    # Trainer would take any network that swallows keyword arguments for one that scales its loss by itself.
    accepts_loss_kwargs = False
    main_input_name = "pixel_values"

    def __init__(self, student: Backbone, criterion: nn.Module, head: nn.Module | None = None):
        super().__init__()
        self.student = student
        self.network = student.model
        self.head = head
        self.criterion = criterion
        # What the user or the network's own code has frozen stays so; a student may be a copy of a teacher, though.
        if not _is_trained(student):
            unfreeze(self.network)
        forget_freezing(self.network)
        if not _is_trained(student):
            _train_head_alone(student, head)
        for name, parameter in self.network.named_parameters():
            if name in student.unused:
                parameter.requires_grad_(False)
        pooler_output(student)  # before the network is sharded
        # DistributedDataParallel would overwrite each process's memories at every step with the first one's.
        self._ddp_params_and_buffers_to_ignore = [f"criterion.{name}" for name, _ in criterion.named_buffers()]

    @classmethod
    def from_args(
        cls,
        student: Backbone,
        teacher: Backbone,
        args: DistillationArguments,
        num_images: int | None,
        criterion: nn.Module | None = None,
    ) -> "DistillationModel":
        """Build head and loss of a run, seeded, and ask both networks for as many feature maps as the methods need.

        Args:
            student: to be trained.
            teacher: frozen.
            args: of the run: methods, head, seed.
            num_images: number of training images; None for a stream.
            criterion: a loss to take instead of ``args.method``.

        Raises:
            ValueError: what a method needs and a network does not have; a head that no method uses.
        """
        # Whatever drew random numbers before (a cold neighbour cache does), a seed gives one head and one loss.
        set_seed(args.seed)
        needs = losses_of(args, criterion)
        _share_maps(student, teacher, args, needs, built_in=criterion is None)
        head = _build_head(student, teacher, args, needs, loss_argument(args, criterion))
        if criterion is None:
            criterion = _build_criterion(student, teacher, head, args, num_images)
        read_as_declared(criterion)
        aligned = any(needs_same_dim(need) for need in needs)
        # Replaces that of an earlier run which the student may come from.
        student.model.config.teacher_space = _teacher_space(teacher, head) if aligned else None
        return cls(student, criterion, head)

    def project(self, embedding: Tensor) -> Tensor:
        """Map student embeddings ``(b, s)`` to the teacher's space ``(b, t)``."""
        if self.head is None:
            return embedding
        return self.head(embedding.to(next(self.head.parameters()).dtype))

    def activation_checkpointing_enable(self, **kwargs) -> None:
        """Called by Trainer on the module it trains."""
        self.network.activation_checkpointing_enable(**kwargs)

    def gradient_checkpointing_enable(self, **kwargs) -> None:
        """The same, as older versions of Transformers call it."""
        self.network.gradient_checkpointing_enable(**kwargs)

    def forward(
        self,
        pixel_values: Tensor,
        teacher: Features,
        index: Tensor,
        other_totals: Tensor | None = None,
        only_totals: bool = False,
    ) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            pixel_values: views ``(b, 3, H, W)``, uint8.
            teacher: its features of the same views.
            index: ``(b,)`` dataset row of each view.
            other_totals: the criterion's totals of the other micro-batches; see ``gradient_accumulation``.
            only_totals: return this batch's ``totals`` and no loss.

        Returns:
            ``loss`` and its named parts; ``finite`` ``(b,)``, whether each image's features are; ``cosine_sample`` and
            ``cosine_dimension``, the mean cosine similarity to the teacher per image and per feature dimension.
        """
        pixels = self.student.normalize(pixel_values).to(next(self.network.parameters()).dtype)
        features = self.student.features(pixels)
        student = features._replace(embedding=self.project(features.embedding))
        if only_totals:
            # As a call of the loss would be given them.
            read = [read_by(self.criterion, features) for features in (student, teacher)]
            return {"totals": self.criterion.totals(*read)}
        exact = {} if other_totals is None else {"other_totals": other_totals}
        output = as_output(self.criterion(student, teacher, index, **exact))
        output["finite"] = student.embedding.isfinite().all(1) & teacher.embedding.isfinite().all(1)
        parts = getattr(self.criterion, "cosine_parts", None)
        if parts and all(name in output for name in parts):
            cosines = tuple(-output[name].detach() for name in parts)
        elif student.embedding.shape == teacher.embedding.shape:
            with torch.no_grad():
                cosines = mean_cosines(student.embedding, teacher.embedding)
        else:
            return output
        output["cosine_sample"], output["cosine_dimension"] = cosines
        return output


def _is_trained(student: Backbone) -> bool:
    """Whether any parameter is, of those that the embedding depends on."""
    parameters = student.model.named_parameters()
    return any(value.requires_grad for name, value in parameters if name not in student.unused)


def _train_head_alone(student: Backbone, head: nn.Module | None) -> None:
    """Refuse a student of which the user froze every parameter, unless there is a head to train."""
    if head is None:
        raise ValueError(
            f"--student={student.name}: all its parameters are frozen, so that nothing would be trained; give one with "
            f"parameters that are trained (requires_grad_(True) of the network, which is backbone.model of a "
            f"Backbone), or --head linear to train a head alone."
        )
    logger.info("All parameters of the student are frozen: its projection head is trained alone.")


def as_output(output) -> dict[str, Tensor]:
    """What a loss returned, as a dictionary of scalar tensors with ``loss``.

    Raises:
        ValueError: it is none of both, or one of its parts is no number.
    """
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"it returned {shape_of(output)}; return a scalar tensor, or a dictionary with it as 'loss'")
    parts = output if isinstance(output, dict) else {"loss": output}
    return {name: _as_scalar(name, value, loss.device) for name, value in parts.items()}


def _as_scalar(name: str, value, device: torch.device) -> Tensor:
    """A part of a loss, which is logged: a number, or a tensor of one."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.reshape(())
    if isinstance(value, (int, float, np.number)):
        return torch.tensor(float(value), device=device)
    raise ValueError(f"its part {name!r} is {shape_of(value)}; return a scalar, such as its mean, or leave it out")


def shape_of(value) -> str:
    """A value in a message."""
    if isinstance(value, dict):
        return "a dictionary of " + (", ".join(map(repr, value)) or "nothing")
    return f"a tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def try_criterion(model: DistillationModel, teacher: Backbone) -> None:
    """Call a loss of the user's own on two images, before hours are spent on neighbours.

    Raises:
        ValueError: it cannot be called, or does not return a loss.
    """
    criterion = copy.deepcopy(model.criterion)
    device = next(model.network.parameters()).device
    student = model.student.example()
    teacher = teacher.example()
    student = Features(model.project(student.embedding).to(device), student.maps, student.logits)
    teacher = Features(teacher.embedding.to(device), [one.to(device) for one in teacher.maps], teacher.logits)
    try:
        with torch.random.fork_rng():
            as_output(criterion.to(device)(student, teacher, torch.arange(2, device=device)))
    except Exception as error:  # of the user's code
        shapes = f"embeddings {tuple(student.embedding.shape)} and {tuple(teacher.embedding.shape)}"
        raise ValueError(
            f"--criterion={type(criterion).__name__} fails when it is called as criterion(student, teacher, index) "
            f"with Features of two images ({shapes}, {len(student.maps)} and {len(teacher.maps)} maps): "
            f"{first_line(error)}."
        ) from error


def uses_maps(need) -> bool:
    """Whether a loss, or its class, reads feature maps."""
    return getattr(need, "uses_maps", False)


def needs_same_dim(need) -> bool:
    """Whether a loss, or its class, compares embeddings of one space; one that does not say is taken to."""
    return getattr(need, "same_dim", True)


def losses_of(args: DistillationArguments, criterion: nn.Module | None = None) -> list:
    """The losses of a training: those of the module that was given, else the classes of the methods."""
    if criterion is None:
        return [LOSSES[method.name] for method in args.methods]
    return summands(criterion)


def loss_argument(args: DistillationArguments, criterion: nn.Module | None = None) -> str:
    """The loss in messages, with the argument that gave it."""
    return f"--method={args.method}" if criterion is None else f"--criterion={type(criterion).__name__}"


def reads_maps(student: Backbone, teacher: Backbone, losses: list) -> bool:
    """Whether a training reads feature maps of its teacher: some methods take embeddings where there are no maps."""
    if not any(uses_maps(loss) for loss in losses):
        return False
    return min(_count_maps(student, teacher).values()) > 0


def _count_maps(*networks: Backbone) -> dict[Backbone, int]:
    return {network: len(network.example(maps=True).maps) for network in networks}


def _share_maps(student: Backbone, teacher: Backbone, args: DistillationArguments, needs: list, built_in: bool) -> None:
    """Let both networks give as many feature maps as the one with fewer has, where any loss reads maps."""
    if not any(uses_maps(need) for need in needs):
        if built_in:
            student.maps = teacher.maps = 0
        return
    counts = _count_maps(student, teacher)
    student.maps = teacher.maps = min(counts.values())
    if not built_in or student.maps:
        return
    for method in args.methods:
        loss = LOSSES[method.name]
        if loss.uses_maps and not loss.embedding_as_map:
            name = min(counts, key=counts.get).name
            raise ValueError(
                f"--method {method.name} compares feature maps, and {name} gives none that lie on a grid; choose "
                f"another network, or a method of embeddings (coss)."
            )


def _build_head(
    student: Backbone, teacher: Backbone, args: DistillationArguments, needs: list, named: str
) -> nn.Module | None:
    """The head that ``args`` ask for; none where no loss compares embeddings of one dimension."""
    if args.head == "auto" and not any(needs_same_dim(need) for need in needs):
        return None
    head = projection_head(args.head, student.dim, teacher.dim, args.head_hidden_size)
    if head is not None and all(uses_maps(need) for need in needs):
        raise ValueError(f"--head={args.head}: {named} compares feature maps, not the head's embeddings.")
    return head


def _build_criterion(
    student: Backbone, teacher: Backbone, head: nn.Module | None, args: DistillationArguments, num_images: int | None
) -> nn.Module:
    """The loss of ``args.method``, shaped by an example of both networks' features."""
    student_example = student.example()
    teacher_example = teacher.example()
    if head is not None:
        weights = next(head.parameters())  # float32, whatever the student's are
        student_example = student_example._replace(embedding=head(student_example.embedding.to(weights)))
    losses = {method.name: LOSSES[method.name] for method in args.methods}
    classifier = None
    if any(loss.classifier != "unused" for loss in losses.values()):
        classifier = find_classifier(teacher)
    for name, loss in losses.items():
        if classifier is None and loss.classifier == "optional":
            logger.warning(
                "--method %s: the teacher %s has no linear classifier on its embedding: the part of the loss that "
                "reads it is left out. Give a network or checkpoint that has its classifier.",
                name,
                teacher.name,
            )
        if classifier is None and loss.classifier == "required":
            raise ValueError(
                f"--method {name}: --teacher {teacher.name} has no linear classifier on its embedding; give a "
                f"network or checkpoint that has (and its --teacher_pooling), or a method of embeddings (coss)."
            )
    return build_loss(
        args.methods,
        student_example,
        teacher_example,
        num_images=num_images,
        batch_size=args.images_per_batch,
        classifier=classifier,
    )


def _teacher_space(teacher: Backbone, head: nn.Module | None) -> dict:
    """What ``Student.from_pretrained`` needs to know, and of a teacher of images and text which of its spaces it is."""
    space = {
        "teacher": teacher.name,
        "revision": teacher.revision,
        "pooling": teacher.pooling,
        "dim": teacher.dim,
        "head": head is not None,
    }
    return space if teacher.space is None else space | {"space": teacher.space, "texts": teacher.has_texts}
