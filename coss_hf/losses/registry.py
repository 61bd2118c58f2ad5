"""All losses by the name of their method, and how a run builds those that it asks for.

Nothing here knows a loss by its name: the modules of this package are found, and what a loss needs
is what its class declares (``base.DistillationLoss``).
"""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping

import torch
from torch import nn

import coss_hf.losses
from coss_hf.features import Features
from coss_hf.losses.base import REGISTERED, DistillationLoss
from coss_hf.losses.combination import Method, SumLoss

# Arguments of a loss that come from the two networks, and so are no options of its method.
SHAPES = ("student_dim", "teacher_dim", "student_size", "teacher_size", "student_dims", "teacher_dims")


class Losses(Mapping):
    """Loss classes by the name of their method: CoSS first, the others in alphabetical order.

    Includes every class that has been registered by now, of this package or not.
    """

    def __getitem__(self, name: str) -> type[DistillationLoss]:
        return REGISTERED[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(REGISTERED, key=lambda name: (name != "coss", name)))

    def __len__(self) -> int:
        return len(REGISTERED)

    def __repr__(self) -> str:
        return f"Losses({', '.join(self)})"


def import_losses() -> None:
    """Import every module of this package, so that the losses in them register themselves."""
    for module in pkgutil.iter_modules(coss_hf.losses.__path__, f"{coss_hf.losses.__name__}."):
        if module.name != __name__:
            importlib.import_module(module.name)


LOSSES = Losses()
import_losses()


def build_loss(methods: list[Method], student: Features, teacher: Features, **given) -> nn.Module:
    """Build the loss of one method, or the sum of several.

    Each loss is given what it declares to read, and nothing else, when it is called.

    Args:
        methods: Names and options of the methods.
        student: Features of a few images, for the shapes of what a loss learns.
        teacher: Features of the teacher for a few images, for the same reason.
        given: Other arguments that a loss may ask for by name: ``num_images``, ``batch_size`` and
            ``classifier``.

    Raises:
        ValueError: An option that the method does not have, a value that it rejects, or a required
            classifier that does not read the teacher's last map.
    """
    losses = {}
    for method in methods:
        kind = LOSSES[method.name]
        own = given | _shapes(kind, student, teacher)
        if kind.uses_maps and kind.classifier != "unused" and not _pools_to_embedding(teacher):
            if kind.classifier == "required":
                raise ValueError(
                    f"--method {method.name} applies the teacher's classifier to the mean of the teacher's last map, "
                    f"but the teacher's embedding is something else; choose another teacher or pooling."
                )
            own["classifier"] = None
        losses[method.name] = read_as_declared(_build(method, own))
    if len(losses) == 1:
        return losses[methods[0].name]
    return SumLoss(losses)


def papers(methods: list[str]) -> list[tuple[str, str | None, str]]:
    """Title, address and BibTeX entry of the paper of each method, once for methods of one paper.

    Args:
        methods: Names of methods. Those without a citation are left out.
    """
    keys = {}
    for method in reversed(methods):
        citation = LOSSES[method].citation
        if citation is not None:
            keys[citation] = f"{method}{citation.year}"
    return [(citation.title, citation.url, citation.bibtex(key)) for citation, key in reversed(keys.items())]


def read_as_declared(loss: nn.Module) -> nn.Module:
    """Let a loss, or each loss of a sum, be given what its class declares to read, and nothing else, from now on.

    A module that is no ``DistillationLoss`` declares nothing, and stays as it is.

    Returns:
        ``loss`` itself.
    """
    for part in summands(loss):
        if isinstance(part, DistillationLoss) and _select_features not in part._forward_pre_hooks.values():
            part.register_forward_pre_hook(_select_features, with_kwargs=True)
    return loss


def read_by(loss: nn.Module, features: Features) -> Features:
    """Keep what a loss declares to read; all of it for a module that declares nothing."""
    return loss.select(features) if isinstance(loss, DistillationLoss) else features


def summands(loss: nn.Module) -> list[nn.Module]:
    """The losses that a ``SumLoss`` adds; any other loss alone."""
    return [*loss.losses.values()] if isinstance(loss, SumLoss) else [loss]


def _select_features(loss: DistillationLoss, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Called before ``forward``. A hook and not a wrapping module: that would rename what the loss saves."""

    def select(value):
        return loss.select(value) if isinstance(value, Features) else value

    return tuple(select(value) for value in args), {name: select(value) for name, value in kwargs.items()}


def _build(method: Method, given: dict) -> nn.Module:
    kind = LOSSES[method.name]
    takes = inspect.signature(kind).parameters
    options = [name for name in takes if name not in given and name not in SHAPES]
    for name in method.options:
        if name not in options:
            raise ValueError(f"--method={method}: {method.name} has no option {name!r}; it has {', '.join(options)}.")
    arguments = {name: given[name] for name in takes if name in given}
    try:
        return kind(**arguments, **method.options)
    except (TypeError, ValueError) as error:
        message = str(error)
        if not message.startswith("--method"):
            message = f"--method={method}: {message}"
        if isinstance(error, TypeError) and "num_images" in takes and given.get("num_images", 0) is None:
            message += "; num_images is None, since nobody knows the number of images in a stream"
        raise ValueError(message) from error


def _shapes(kind: type[DistillationLoss], student: Features, teacher: Features) -> dict:
    """Channels and heights of the maps where a loss reads maps and gets them, else dimensions of the embeddings."""
    found = {}
    for side, features in (("student", student), ("teacher", teacher)):
        maps = kind.select(features).maps if kind.uses_maps and student.maps else ()
        shapes = [one.shape for one in maps] or [features.embedding.shape]
        found[f"{side}_dim"] = shapes[-1][1]
        found[f"{side}_dims"] = tuple(shape[1] for shape in shapes)
        if maps:
            found[f"{side}_size"] = shapes[-1][2]
    return found


def _pools_to_embedding(teacher: Features) -> bool:
    """Whether the mean of the last map is what a classifier of the embedding reads; a class token is not."""
    if not teacher.maps:
        return True
    pooled = teacher.maps[-1].mean((2, 3))
    return pooled.shape == teacher.embedding.shape and torch.allclose(pooled, teacher.embedding, rtol=1e-3, atol=1e-4)
