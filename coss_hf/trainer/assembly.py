"""What a run trains, put together from its networks and arguments."""

from torch import nn
from transformers import set_seed

from coss_hf.losses.registry import LOSSES, build_loss
from coss_hf.models.backbone import Backbone
from coss_hf.models.classifier_head import find_classifier
from coss_hf.models.heads import projection_head
from coss_hf.trainer.distillation_model import DistillationModel
from coss_hf.trainer.training_args import DistillationArguments


def build_model(
    student: Backbone, teacher: Backbone, args: DistillationArguments, num_images: int, criterion: nn.Module | None
) -> DistillationModel:
    """Student, head and loss of a run, seeded, with as many feature maps of both networks as the methods need.

    Args:
        num_images: of the training set.
        criterion: a loss to take instead of ``args.method``.

    Raises:
        ValueError: what a method needs and a network does not have; a head that no method uses.
    """
    # Whatever drew random numbers before (a cold neighbour cache does), a seed gives one head and one loss.
    set_seed(args.seed)
    needs = [criterion] if criterion is not None else [LOSSES[method.name] for method in args.methods]
    maps = [getattr(one, "uses_maps", False) for one in needs]
    if any(maps):
        counts = {network: len(network.example(maps=True).maps) for network in (student, teacher)}
        student.maps = teacher.maps = min(counts.values())
        for method in args.methods if criterion is None and not student.maps else ():
            if LOSSES[method.name].uses_maps and not LOSSES[method.name].embedding_as_map:
                name = min(counts, key=counts.get).name
                raise ValueError(
                    f"--method {method.name} compares feature maps, and {name} gives none that lie on a grid; choose "
                    f"another network, or a method of embeddings (coss)."
                )
        # What lies behind the last map compared gets no gradient.
        args.ddp_find_unused_parameters = True
    if criterion is None and not any(one.same_dim for one in needs) and args.head == "auto":
        head = None
    else:
        head = projection_head(args.head, student.dim, teacher.dim, args.head_hidden_size)
    if head is not None and all(maps):
        raise ValueError(f"--head={args.head}: {args.method} compares feature maps, not the head's embeddings.")
    if criterion is None:
        examples = [backbone.example() for backbone in (student, teacher)]
        if head is not None:
            examples[0] = examples[0]._replace(embedding=head(examples[0].embedding))
        given = {"num_images": num_images, "batch_size": args.images_per_batch, "classifier": None}
        if any(loss.classifier != "unused" for loss in needs):
            given["classifier"] = find_classifier(teacher)
        for method in args.methods:
            if given["classifier"] is None and LOSSES[method.name].classifier == "required":
                raise ValueError(
                    f"--method {method.name}: the checkpoint of --teacher {teacher.name} has no linear classifier on "
                    f"its embedding; give one that has (and its --teacher_pooling), or a method of embeddings (coss)."
                )
        criterion = build_loss(args.methods, *examples, **given)
    aligned = any(getattr(one, "same_dim", False) for one in needs)
    # Replaces that of an earlier run which the student may come from.
    student.model.config.teacher_space = _space(teacher, head) if aligned else None
    return DistillationModel(student, criterion, head)


def _space(teacher: Backbone, head: nn.Module | None) -> dict:
    """What ``Student.from_pretrained`` needs to know."""
    commit = getattr(teacher.model.config, "_commit_hash", None)
    return {
        "teacher": teacher.name,
        "revision": commit,
        "pooling": teacher.pooling,
        "dim": teacher.dim,
        "head": head is not None,
    }
