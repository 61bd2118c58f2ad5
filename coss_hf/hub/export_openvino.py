"""A student as an OpenVINO model, from its ONNX graph."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from coss_hf.utils.messages import first_line
from coss_hf.utils.packages import how_to_install

# The name that Optimum Intel looks for; the weights are next to it, with the suffix .bin.
OPENVINO_FILE = "openvino_model.xml"


def openvino_package() -> ModuleType:
    """Import ``openvino``; ValueError where it is not installed."""
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise ValueError(
            f"--formats openvino needs {error.name}, which is not installed: {how_to_install('openvino')}."
        ) from error


def write_openvino(graph: Path, path: Path) -> None:
    """Convert an ONNX file; weights stay float32.

    Args:
        graph: the ONNX file.
        path: the ``.xml`` file to write.

    Raises:
        ValueError: a graph that OpenVINO does not support.
    """
    openvino = openvino_package()
    try:
        model = openvino.convert_model(graph)
        openvino.save_model(model, path, compress_to_fp16=False)
    except Exception as error:  # its own kinds of errors, for each operator
        raise ValueError(
            f"--formats openvino: OpenVINO cannot convert this network ({first_line(error)}); leave openvino out, or "
            f"try another release of it."
        ) from error


def open_openvino(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    """Load an OpenVINO model as a function from pixel values to embeddings, on this number of CPU threads.

    It computes in float32: on some processors OpenVINO takes bfloat16 unless it is told otherwise.
    """
    openvino = openvino_package()
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", options)
    return lambda pixels: torch.from_numpy(compiled(pixels.numpy())["embedding"].copy())
