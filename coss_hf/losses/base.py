"""The contract of a loss: what it declares about itself, so that nothing else has to know its name."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from coss_hf.features import Features, as_features

READS = ("embedding", "maps", "last_map", "middle_map", "logits")
CLASSIFIER = ("unused", "optional", "required")

# Classes by the name of their method, in the order of their definition. Read it through `registry.LOSSES`.
REGISTERED: dict[str, type["DistillationLoss"]] = {}


@dataclass(frozen=True)
class Citation:
    """The paper of a method.

    Attributes:
        authors: The authors as BibTeX writes them, such as ``"Tung, F. and Mori, G."``.
        title: The title of the paper.
        year: The year of publication.
        venue: The short name of the conference or journal; None for a preprint.
        arxiv: The arXiv number, such as ``"1907.09682"``; None where the paper is not on arXiv.
    """

    authors: str
    title: str
    year: int
    venue: str | None = None
    arxiv: str | None = None

    @property
    def url(self) -> str | None:
        """The address of the paper on arXiv, or None."""
        if self.arxiv is None:
            return None
        return f"https://arxiv.org/abs/{self.arxiv}"

    def bibtex(self, key: str) -> str:
        """The BibTeX entry of the paper.

        Args:
            key: The citation key, such as ``"sp2019"``.
        """
        kind = "misc" if self.venue is None else "inproceedings"
        fields = [f"title = {{{{{self.title}}}}}", f"author = {{{self.authors}}}"]
        if self.venue is not None:
            fields.append(f"booktitle = {{{self.venue}}}")
        fields.append(f"year = {{{self.year}}}")
        if self.arxiv is not None:
            fields.append(f"eprint = {{{self.arxiv}}}")
            fields.append("archivePrefix = {arXiv}")
        body = ",\n".join(f"  {field}" for field in fields)
        return f"@{kind}{{{key},\n{body}\n}}"


class DistillationLoss(nn.Module):
    """Base class of all losses: a module that compares the features of a student with those of a teacher.

    Defining a subclass with a ``name`` makes it a method: ``--method`` accepts the name, alone or
    in a sum, as soon as the module that defines the class has been imported. Modules of
    ``coss_hf.losses`` are found and imported by themselves. A subclass without a ``name`` of its
    own is not registered.

    A loss never holds a network. Its constructor may ask for the following arguments by name, and
    gets them from the run: ``student_dim`` and ``teacher_dim`` (channels of the maps that it reads,
    or dimensions of the embeddings; of several maps the last), ``student_dims`` and ``teacher_dims`` (channels of all
    of them), ``student_size`` and ``teacher_size`` (height of the maps),
    ``num_images`` (size of the training set, None for a stream), ``batch_size`` (images of a forward pass over all
    processes) and ``classifier`` (see below). All other arguments are options of the method and
    need a default; ``beta`` is by convention the scale of the complete loss.

    Attributes:
        name: The name of the method. None for a class that is no method of its own.
        reads: What the loss reads. A loss of a run is given this and nothing else (``select``).
            ``"embedding"``: the embeddings ``(b, d)``.
            ``"maps"``: all feature maps, each ``(b, c, h, w)``.
            ``"last_map"``, ``"middle_map"``: one map, the last or that with index ``n // 2`` of
            ``n``.
            ``"logits"``: logits ``(b, classes)``, or the embedding to compute them from.
        embedding_as_map: For a loss that reads maps: whether it takes the embeddings where a
            network gives no maps. If False, such a network is rejected.
        same_dim: Whether the embeddings of student and teacher must have the same dimension. If
            True, the student gets a projection head where they differ, and the student's embeddings
            can be compared with the teacher's.
        keeps_state: Whether the value depends on earlier batches, through a memory or a queue. If
            True, the loss is not computed on held-out images. Running statistics of batch norm do
            not count.
        couples_images: Whether the images of a batch are compared with each other. Such a class must
            compute its loss from the images of all processes; others are a mean over images.
        needs_image_rows: Whether the loss keeps something for each training image under its row. A
            stream has no rows, so that such a loss is refused there.
        separable: Whether the loss of a batch can be computed from sums over its micro-batches,
            which exact gradient accumulation needs. If True, the class has a method
            ``totals(student, teacher)`` that returns these sums as one tensor, and ``forward``
            takes the totals of the other micro-batches as ``other_totals``.
        classifier: Whether the loss uses the linear classifier of the teacher: ``"unused"``,
            ``"optional"`` or ``"required"``. If it is not unused, the constructor takes
            ``classifier``, an ``nn.Linear``, or None where the teacher has none. A loss that reads
            maps applies the classifier to the mean of the last map over its positions, and gets it
            only where this mean is the teacher's embedding.
        pretraining_steps: Number of batches from which a part of the loss learns before the
            training of the student. If it is not 0, the class has the methods
            ``pretraining_module`` and ``pretraining_loss``.
        citation: The paper of the method, for the model card.
        revision: Number to raise where the value of the loss changes, so that a study does not take an earlier result
            for one of today's loss.
        optimum: The smallest value that the loss can have, where it is known and not 0.
        cosine_parts: The names of the two returned parts that are minus the mean cosine similarity
            to the teacher, per image and per feature dimension, where the loss returns such parts.
            A run then logs these instead of computing them once more.
        uses_maps: Whether the loss reads maps; follows from ``reads``.

    Raises:
        ValueError: The definition of a subclass has an unknown ``reads`` or ``classifier``, or a
            ``name`` that another class has.

    Example:
        >>> import torch
        >>> from coss_hf.features import Features, as_features
        >>> from coss_hf.losses.base import DistillationLoss
        >>> class MeanSquaredError(DistillationLoss):
        ...     reads = "embedding"
        ...     same_dim = True
        ...
        ...     def __init__(self, beta: float = 1.0):
        ...         super().__init__()
        ...         self.beta = beta
        ...
        ...     def forward(self, student, teacher, index=None):
        ...         error = (student.embedding - teacher.embedding.detach()).square().mean()
        ...         return {"loss": self.beta * error}
        >>> MeanSquaredError()(torch.ones(2, 3), torch.zeros(2, 3))
        {'loss': tensor(1.)}

        A loss is called with tensors or with ``Features``; ``forward`` always gets ``Features``. With ``name = "mse"``
        in the class, ``--method mse`` and ``--method "coss + mse(beta=2)"`` train with it.
    """

    name: str | None = None
    reads: Literal["embedding", "maps", "last_map", "middle_map", "logits"] = "embedding"
    embedding_as_map: bool = True
    same_dim: bool = False
    keeps_state: bool = False
    couples_images: bool = False
    needs_image_rows: bool = False
    separable: bool = False
    classifier: Literal["unused", "optional", "required"] = "unused"
    pretraining_steps: int = 0
    citation: Citation | None = None
    revision: int = 1
    optimum: float | None = None
    cosine_parts: tuple[str, str] | None = None
    uses_maps: bool = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.reads not in READS:
            raise ValueError(f"{cls.__qualname__}.reads={cls.reads!r} is unknown: choose one of {', '.join(READS)}.")
        if cls.classifier not in CLASSIFIER:
            raise ValueError(
                f"{cls.__qualname__}.classifier={cls.classifier!r} is unknown: choose one of {', '.join(CLASSIFIER)}."
            )
        cls.uses_maps = cls.reads in ("maps", "last_map", "middle_map")
        if cls.__dict__.get("name") is not None:
            _register(cls)

    @classmethod
    def select(cls, features: Features) -> Features:
        """Keep what this loss reads. The embedding always stays: it may stand for a map, or for logits."""
        maps = features.maps
        if cls.reads == "last_map":
            maps = maps[-1:]
        elif cls.reads == "middle_map":
            middle = len(maps) // 2
            maps = maps[middle : middle + 1]
        elif cls.reads != "maps":
            maps = ()
        logits = features.logits if cls.reads == "logits" else None
        return Features(features.embedding, maps, logits)

    @classmethod
    def is_function_of_embeddings(cls) -> bool:
        """Whether embeddings of held-out images, which have no rows of their own, are enough to compute the loss."""
        return cls.reads == "embedding" and not (cls.keeps_state or cls.needs_image_rows)

    def __call__(self, student, teacher, *args, **kwargs) -> dict[str, Tensor]:
        """Compute the loss of a batch from features or plain tensors: ``forward`` after ``features.as_features``."""
        logits = self.reads == "logits"
        student = as_features(student, logits=logits, argument="student")
        teacher = as_features(teacher, logits=logits, argument="teacher")
        return super().__call__(student, teacher, *args, **kwargs)

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            student: Features of the student, whose embedding has passed through the head where
                there is one.
            teacher: Features of the teacher for the same views. They get no gradient.
            index: Rows ``(b,)`` of the images in the training set.

        Returns:
            Scalars by name: ``"loss"``, with its gradient, and parts of it that are logged under
            their names. ``"finite"``, ``"cosine_sample"`` and ``"cosine_dimension"`` are names that
            a run gives to values of its own.
        """
        raise NotImplementedError(f"{type(self).__qualname__} must define forward().")

    def pretraining_module(self) -> nn.Module:
        """The part of the loss that is trained first, and frozen afterwards."""
        raise NotImplementedError(f"{type(self).__qualname__} must define pretraining_module().")

    def pretraining_loss(self, teacher: Features) -> Tensor:
        """What ``pretraining_module`` minimises, a scalar, for a batch of the teacher's features."""
        raise NotImplementedError(f"{type(self).__qualname__} must define pretraining_loss().")


def _register(cls: type[DistillationLoss]) -> None:
    other = REGISTERED.get(cls.name)
    # A module that is imported again defines the same class again.
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(
            f"{cls.__module__}.{cls.__qualname__}.name={cls.name!r} is the name of "
            f"{other.__module__}.{other.__qualname__}; choose another name."
        )
    REGISTERED[cls.name] = cls
