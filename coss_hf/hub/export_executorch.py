"""A student as an ExecuTorch program, for phones and small devices."""

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from coss_hf.utils.messages import first_line
from coss_hf.utils.packages import how_to_install

PROGRAM_FILE = "model.pte"


def executorch_package() -> ModuleType:
    """Import ``executorch``'s exporter; ValueError where it is not installed."""
    try:
        return importlib.import_module("executorch.exir")
    except ImportError as error:
        raise ValueError(
            f"--formats executorch needs {error.name}, which is not installed: {how_to_install('executorch')}."
        ) from error


def write_program(student: nn.Module, path: Path) -> None:
    """Write a program for one image at a time, whose kernels are those of XNNPACK.

    Args:
        student: a ``Student``.
        path: the ``.pte`` file to write.

    Raises:
        ValueError: a network that ``torch.export`` or ExecuTorch does not support.
    """
    exir = executorch_package()
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    try:
        with warnings.catch_warnings(action="ignore"):
            image = torch.zeros(1, 3, *student.backbone.size)
            exported = torch.export.export(student, (image,))
            lowered = exir.to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
            path.write_bytes(lowered.to_executorch().buffer)
    except Exception as error:  # of each network's code, and of each operator
        raise ValueError(
            f"--formats executorch: ExecuTorch cannot export {student.backbone.name} ({first_line(error)}); leave "
            f"executorch out, or try another release of it."
        ) from error


def open_program(path: Path) -> Callable[[Tensor], Tensor]:
    """Load a program as a function from pixel values to embeddings; it takes the images one by one."""
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    method = program.load_method("forward")

    def run(pixels: Tensor) -> Tensor:
        return torch.cat([method.execute([image[None].contiguous()])[0].clone() for image in pixels])

    run.program = program  # its memory is the method's
    return run
