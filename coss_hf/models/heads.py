"""Projection heads from the student's to the teacher's dimension."""

from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from coss_hf.models.files import find_file
from coss_hf.utils.messages import first_line

HEADS = ("auto", "none", "linear", "mlp")
HEAD_FILE = "head.safetensors"


def projection_head(kind: str, student_dim: int, teacher_dim: int, hidden_size: int = 2048) -> nn.Module | None:
    """Build a head from the student's to the teacher's dimension; it is not part of the published student.

    Args:
        kind: ``linear``; ``mlp``: Linear(s, hidden) - ReLU - Linear(hidden, t), as in the paper's public code, without
            batch norm; ``none``; ``auto``: ``none`` where the dimensions are equal, else ``mlp``.
        student_dim: dimension s of the student's embedding.
        teacher_dim: dimension t of the teacher's embedding.
        hidden_size: dimension of the hidden layer of ``mlp``.

    Returns:
        The head; None for ``none``.

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
    return nn.Sequential(
        nn.Linear(student_dim, hidden_size), nn.ReLU(inplace=True), nn.Linear(hidden_size, teacher_dim)
    )


def load_head(name: str | Path, revision: str | None = None) -> nn.Module | None:
    """Load the projection head in a student's folder, in evaluation mode; None where there is none.

    Args:
        name: folder, or name on the Hub.
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: the file contains no head of ``projection_head``.
    """
    path = find_file(name, HEAD_FILE, revision)
    if path is None:
        return None
    try:
        tensors = load_file(path)
    except Exception as error:  # cut short, not readable: safetensors has an error of its own
        raise ValueError(f"{path} cannot be read ({first_line(error)}); take the folder as the run left it.") from error
    matrices = [tensor for name, tensor in sorted(tensors.items()) if name.endswith("weight")]
    if set(tensors) == {"weight", "bias"}:
        kind = "linear"
    elif set(tensors) == {"0.weight", "0.bias", "2.weight", "2.bias"}:
        kind = "mlp"
    else:
        raise ValueError(f"{path} contains {', '.join(sorted(tensors))}: no linear or mlp head; remove or replace it.")
    head = projection_head(kind, matrices[0].shape[1], matrices[-1].shape[0], matrices[0].shape[0])
    head.load_state_dict(tensors)
    return head.eval()
