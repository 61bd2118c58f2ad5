"""What several losses share."""

import contextlib
import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from coss_hf.features import Features


def check_weights(**weights: float) -> None:
    """Raise ValueError for a weight that is negative or not finite."""
    for name, value in weights.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}={value} must be a finite number >= 0.")


def check_positive(**values: float) -> None:
    """Raise ValueError for a temperature or a count that is not positive or not finite."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}={value} must be a finite number > 0.")


def check_shares(**shares: float) -> None:
    """Raise ValueError for a share, such as a momentum, that does not lie between 0 and 1."""
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} must be a number from 0 to 1.")


def whole_numbers(**counts: float) -> list[int]:
    """Return the counts as integers. Raise ValueError for a count that is not a whole number."""
    for name, value in counts.items():
        if isinstance(value, bool) or not float(value).is_integer():
            raise ValueError(f"{name}={value} must be a whole number.")
    return [int(value) for value in counts.values()]


@contextlib.contextmanager
def full_precision(device: torch.device):
    """Switch autocast off inside: tensors in float32 or wider are computed with in their own type."""
    with torch.autocast(device.type, enabled=False):
        yield


def wide(x: Tensor) -> Tensor:
    """Convert what a layer gives to float32 where it is in half precision, as the layer then is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def widen(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Convert both tensors to their common type, float32 at least. The teacher's comes without gradient."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


class FullPrecisionBuffers(nn.Module):
    """Base of losses whose own buffers stay in float32 where the module is cast to half precision.

    Half precision would lose the small steps of running statistics, and rounds what is divided by a small temperature.
    """

    def _apply(self, fn, recurse: bool = True):
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, after in self.named_buffers(recurse=False):
            dtype = torch.promote_types(after.dtype, torch.float32)
            if after.is_floating_point() and dtype != after.dtype:
                self._buffers[name] = before[name].to(after.device, dtype)
        return self


def embeddings_of_one_shape(method: str, student: Features, teacher: Features) -> tuple[Tensor, Tensor]:
    """Return both embeddings, widened.

    Raises:
        ValueError: Embeddings that are not both ``(b, d)``.
    """
    s = student.embedding
    t = teacher.embedding
    if s.dim() != 2 or s.shape != t.shape:
        raise ValueError(
            f"--method {method} compares embeddings of one shape (b, d), got student {tuple(s.shape)} and teacher "
            f"{tuple(t.shape)}: give the student a head (--head) of the teacher's dimension."
        )
    return widen(s, t)


def pairs_of_maps(method: str, student: Features, teacher: Features) -> list[tuple[Tensor, Tensor]]:
    """Return the maps ``(b, c, h, w)`` of student and teacher that belong together, widened.

    Raises:
        ValueError: A network that gives no maps, or not as many as the other.
    """
    if not student.maps or len(student.maps) != len(teacher.maps):
        raise ValueError(
            f"--method {method} compares feature maps, but the student gives {len(student.maps)} and the teacher "
            f"{len(teacher.maps)}: choose networks with as many stages as each other, or a method of embeddings (coss)."
        )
    return [widen(s, t) for s, t in zip(student.maps, teacher.maps)]


def match_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Bring maps ``(b, c, h, w)`` to one size: the larger is averaged down to the smaller."""
    height = min(student.shape[-2], teacher.shape[-2])
    width = min(student.shape[-1], teacher.shape[-1])
    return _averaged(student, (height, width)), _averaged(teacher, (height, width))


def last_maps(
    method: str, student: Features, teacher: Features, *, student_dim: int, teacher_dim: int
) -> tuple[Tensor, Tensor]:
    """Return the last map of each network, widened. The embedding of a network without maps is a map ``(b, d, 1, 1)``.

    Raises:
        ValueError: Numbers of channels other than ``student_dim`` and ``teacher_dim``, those the
            loss was made for.
    """
    s = _last_map(student)
    t = _last_map(teacher)
    if s.shape[1] != student_dim or t.shape[1] != teacher_dim:
        raise ValueError(
            f"--method {method} was made with student_dim={student_dim} and teacher_dim={teacher_dim}, but its maps "
            f"have {s.shape[1]} and {t.shape[1]} channels: give the channels of the networks' last maps."
        )
    return widen(s, t)


def frozen(module: nn.Module) -> nn.Module:
    """Return a copy that is never trained."""
    return copy.deepcopy(module).requires_grad_(False)


def _averaged(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if x.shape[-2:] == size else adaptive_avg_pool2d(x, size)


def _last_map(features: Features) -> Tensor:
    return features.maps[-1] if features.maps else features.embedding[:, :, None, None]
