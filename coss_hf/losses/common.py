"""What several losses share."""

import contextlib
import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from coss_hf.features import Features
from coss_hf.utils.distributed import all_reduce_sum


def check_weights(**weights: float) -> None:
    """Raises ValueError for a weight that is negative or not finite."""
    for name, value in weights.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}={value} must be a finite number >= 0.")


def check_positive(**values: float) -> None:
    """Raises ValueError for a temperature or a count that is not positive or not finite."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}={value} must be a finite number > 0.")


def whole_numbers(**counts: float) -> list[int]:
    """The counts as integers. Raises ValueError for one that is none."""
    for name, value in counts.items():
        if isinstance(value, bool) or not float(value).is_integer():
            raise ValueError(f"{name}={value} must be a whole number.")
    return [int(value) for value in counts.values()]


@contextlib.contextmanager
def full_precision(device: torch.device):
    """No autocast inside: what is given in float32 or wider is computed so."""
    with torch.autocast(device.type, enabled=False):
        yield


def widen(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in their common type, float32 at least; the teacher's without gradient."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def embeddings_of_one_shape(method: str, student: Features, teacher: Features) -> tuple[Tensor, Tensor]:
    """Both embeddings, widened.

    Raises:
        ValueError: embeddings that are not both ``(b, d)``.
    """
    s, t = student.embedding, teacher.embedding
    if s.dim() != 2 or s.shape != t.shape:
        raise ValueError(
            f"--method {method} compares embeddings of one shape (b, d), got student {tuple(s.shape)} and teacher "
            f"{tuple(t.shape)}: give the student a head (--head) of the teacher's dimension."
        )
    return widen(s, t)


def mean_over_processes(values: Tensor) -> Tensor:
    """Mean of one value an image, ``(b,)``, over the images of all processes, with a gradient; ``b`` may differ."""
    total, count = all_reduce_sum(torch.stack([values.sum(), values.new_full((), len(values))]))
    return total / count


def pairs_of_maps(method: str, student: Features, teacher: Features) -> list[tuple[Tensor, Tensor]]:
    """Student and teacher maps ``(b, c, h, w)`` that belong together, widened.

    Raises:
        ValueError: a network that gives none, or not as many as the other.
    """
    if not student.maps or len(student.maps) != len(teacher.maps):
        raise ValueError(
            f"--method {method} compares feature maps, but the student gives {len(student.maps)} and the teacher "
            f"{len(teacher.maps)}: choose networks with as many stages as each other, or a method of embeddings (coss)."
        )
    return [widen(s, t) for s, t in zip(student.maps, teacher.maps)]


def match_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Maps ``(b, c, h, w)`` of one size: the larger is averaged down to the smaller."""
    size = tuple(map(min, student.shape[-2:], teacher.shape[-2:]))
    return tuple(x if x.shape[-2:] == size else adaptive_avg_pool2d(x, size) for x in (student, teacher))


def last_maps(method: str, student: Features, teacher: Features, dims: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The last map of each network, widened; where a network gives none, its embedding as a map ``(b, d, 1, 1)``.

    Raises:
        ValueError: numbers of channels other than ``dims``, those the loss was made for.
    """
    s, t = (x.maps[-1] if x.maps else x.embedding[:, :, None, None] for x in (student, teacher))
    if (s.shape[1], t.shape[1]) != tuple(dims):
        raise ValueError(
            f"--method {method} was made with student_dim={dims[0]} and teacher_dim={dims[1]}, but its maps have "
            f"{s.shape[1]} and {t.shape[1]} channels: give the channels of the networks' last maps."
        )
    return widen(s, t)


def frozen(module: nn.Module) -> nn.Module:
    """A copy that is never trained."""
    return copy.deepcopy(module).requires_grad_(False)
