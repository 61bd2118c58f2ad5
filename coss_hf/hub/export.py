"""A student as files for other runtimes, ONNX first: its graph, its int8 version, and how closely and fast they run."""

import contextlib
import logging
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from coss_hf.evaluation.agreement import neighbor_overlap
from coss_hf.evaluation.knn import knn_accuracy, unit
from coss_hf.hub.export_executorch import PROGRAM_FILE, executorch_package, open_program, write_program
from coss_hf.hub.export_folders import FILES
from coss_hf.hub.export_openvino import OPENVINO_FILE, open_openvino, openvino_package, write_openvino
from coss_hf.hub.student import Student
from coss_hf.models.embedding import BAR_DELAY
from coss_hf.models.image_processor import is_timm_processor
from coss_hf.models.modules import ModuleNetwork
from coss_hf.utils.messages import first_line
from coss_hf.utils.packages import check_extra

# In the layout of the Hub each has a folder of its name.
FORMATS = ("onnx", "openvino", "executorch")
QUANTIZATIONS = ("none", "dynamic", "static")
NO_MATRIX_PRODUCTS = "--quantize dynamic: the network has no matrix products to quantise; use --quantize static."
FLOAT_FILE = "model.onnx"
INT8_FILE = "model_int8.onnx"
INPUT = "pixel_values"
OUTPUT = "embedding"
# The embedding again, under the names that Optimum and Transformers.js read.
OTHER_OUTPUTS = ("last_hidden_state", "pooler_output")
MIN_COSINE = 0.9999
SLOWER = 1.05  # times the float file's milliseconds; less is noise of the clock
MAX_FILE_BYTES = 2**31  # of one protobuf file


def onnx_packages():
    """Import ``onnx`` and ``onnxruntime``; ValueError where they or ``onnxscript`` are not installed."""
    check_extra("onnx", "onnxruntime", "onnxscript", needed_by="The export")  # torch.onnx.export needs the last
    import onnx
    import onnxruntime

    return onnx, onnxruntime


def check_packages(formats: Iterable[str]) -> None:
    """Import what the formats need.

    Raises:
        ValueError: a package that is not installed, and the extra that installs it.
    """
    if {"onnx", "openvino"} & {*formats}:  # OpenVINO reads the ONNX graph
        onnx_packages()
    if "openvino" in formats:
        openvino_package()
    if "executorch" in formats:
        executorch_package()


def versions_of(formats: Iterable[str]) -> dict[str, str]:
    """Versions of the packages that write and run the formats."""
    names = {"onnx": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino"), "executorch": ("executorch",)}
    return {package: version(package) for name in formats for package in names[name]}


@contextlib.contextmanager
def _quiet():
    """Silence the reports of exporter and quantiser on each node."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)


def write_graph(student: Student, path: Path) -> None:
    """Write an ONNX file for batches of any size; each of its outputs is the embedding ``(b, d)``.

    Raises:
        ValueError: weights of 2 GB or more, or a network that the exporter does not support.
    """
    size = sum(parameter.nbytes for parameter in student.parameters())
    if size >= MAX_FILE_BYTES:
        raise ValueError(f"--model: {size:,} bytes of weights; one ONNX file contains less than {MAX_FILE_BYTES:,}.")
    try:
        with _quiet(), warnings.catch_warnings(action="ignore"):
            program = torch.onnx.export(
                student,
                (torch.zeros(2, 3, *student.backbone.size),),
                dynamo=True,
                input_names=[INPUT],
                dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
                verbose=False,
            )
    except Exception as error:  # the exporter lets through the errors of every network's code
        raise ValueError(
            f"--model {student.backbone.name}: torch.onnx cannot export this network ({first_line(error)}); another "
            f"release of torch or of the network's code may."
        ) from error
    _name_outputs(program.model.graph)
    program.save(str(path), external_data=False)


def _name_outputs(graph) -> None:
    """Give the graph's one output all of its names; ONNX has no value of several."""
    import onnx_ir  # with onnxscript

    names = (OUTPUT, *OTHER_OUTPUTS)
    # CLIP and SigLIP have values of such a name inside.
    for value in [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]:
        if value.name in names:
            value.name = f"inner_{value.name}"
    embedding = graph.outputs[0]
    embedding.name = OUTPUT
    for name in OTHER_OUTPUTS:
        same = onnx_ir.Node("", "Identity", [embedding])
        output = same.outputs[0]
        output.name = name
        output.type = embedding.type
        output.shape = embedding.shape
        graph.append(same)
        graph.outputs.append(output)


class _Batches:
    """Calibration images in the form that onnxruntime reads."""

    def __init__(self, batches: Iterable[Tensor]):
        self.batches = iter(batches)

    def get_next(self) -> dict | None:
        batch = next(self.batches, None)
        return None if batch is None else {INPUT: batch.numpy()}


def quantize(source: Path, target: Path, kind: str, batches: Iterable[Tensor] = ()) -> None:
    """Write the int8 version of an ONNX file.

    Args:
        source: the ONNX file.
        target: the file to write.
        kind: ``dynamic``: matrix products alone, activations scaled at run time, for transformers; ``static``:
            convolutions too, per output channel, activations scaled as calibrated.
        batches: batches of calibration images ``(b, 3, h, w)``, for ``static``.

    Raises:
        ValueError: the network has nothing to quantise.
    """
    onnx, _ = onnx_packages()
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = target.with_name(f"{target.name}.prepared")
    with _quiet():
        # Folds batch norm into convolutions.
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        if kind == "dynamic":
            quantization.quantize_dynamic(
                str(prepared),
                str(target),
                op_types_to_quantize=["MatMul", "Gemm"],
                weight_type=quantization.QuantType.QInt8,
                per_channel=True,
            )
        else:
            quantization.quantize_static(
                str(prepared),
                str(target),
                _Batches(batches),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
            )
    prepared.unlink()
    if kind == "dynamic":
        found = {node.op_type for node in onnx.load(str(target)).graph.node}
        if not found & {"MatMulInteger", "DynamicQuantizeLinear"}:
            raise ValueError(NO_MATRIX_PRODUCTS)


def open_file(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    """Load an ONNX file as a function from pixel values to embeddings, on this number of CPU threads."""
    _, onnxruntime = onnx_packages()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run([OUTPUT], {INPUT: pixels.numpy()})[0])


@torch.inference_mode()
def embed_by_all(
    runners: dict[str, Callable], batches: Iterable[Tensor], description: str = "Images"
) -> dict[str, Tensor]:
    """Embed the same images by every runner: ``(n, d)`` each; each image is decoded once.

    Args:
        runners: functions from pixel values to embeddings, by name.
        batches: batches of processed images ``(b, 3, h, w)``.
        description: label of the progress bar.
    """
    rows = {name: [] for name in runners}
    for batch in tqdm(batches, description, unit="batch", leave=False, delay=BAR_DELAY):
        for name, run in runners.items():
            rows[name].append(run(batch))
    return {name: torch.cat(parts) for name, parts in rows.items()}


def agreement(embeddings: Tensor, reference: Tensor) -> dict[str, float | None]:
    """Minimum and mean cosine to the reference's embeddings, and the overlap of 10 nearest neighbours with it."""
    cosines = (unit(embeddings.double()) * unit(reference.double())).sum(1)
    overlap = neighbor_overlap(embeddings, reference, 10) if len(reference) > 10 else None
    return {"cosine_min": cosines.min().item(), "cosine_mean": cosines.mean().item(), "overlap10": overlap}


@torch.inference_mode()
def latency(runners: dict[str, Callable], images: Tensor, batch_size: int, rounds: int) -> dict[str, dict]:
    """Median time of a batch by each runner, in turns, so that other load on the machine affects all alike."""
    pixels = images.repeat(-(-batch_size // len(images)), 1, 1, 1)[:batch_size].contiguous()
    times = {name: [] for name in runners}
    for turn in range(rounds + 1):
        for name, run in runners.items():
            start = time.perf_counter()
            run(pixels)
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {name: {"ms": 1000 * s, "images_per_second": batch_size / s} for name, s in medians.items()}


def int8_advice(results: dict[str, dict]) -> str:
    """Say whether the int8 file is worth shipping on this machine; empty where there is none.

    Args:
        results: of ``export``.
    """
    if "int8" not in results:
        return ""
    times = {}
    for batch, what in (("batch_1", "one image"), ("batch_64", "64 images")):
        times[what] = results["int8"][batch]["ms"] / results["onnx"][batch]["ms"]
    slower = [f"{ratio:.1f} times slower for {what}" for what, ratio in times.items() if ratio > SLOWER]
    faster = [f"{1 / ratio:.1f} times faster for {what}" for what, ratio in times.items() if ratio < 1]
    if not slower:
        return f"On this machine int8 is {' and '.join(faster)}." if faster else "On this machine int8 is as fast."
    smaller = results["onnx"]["bytes"] / results["int8"]["bytes"]
    text = f"On this machine int8 is {' and '.join(slower)} than float32"
    if faster:
        return f"{text}, and {faster[0]}: ship {INT8_FILE} only for the batches that it is faster with."
    return (
        f"{text}: do not ship {INT8_FILE}, though it is {smaller:.1f} times smaller; ship {FLOAT_FILE}, or try the "
        f"other --quantize."
    )


def export(
    student: Student,
    output: Path,
    *,
    images: Iterable[Tensor],
    calibration: Iterable[Tensor] = (),
    train_images: Iterable[Tensor] = (),
    labels: tuple[Tensor, Tensor] | None = None,
    quantization: str = "none",
    rounds: int = 20,
    formats: Iterable[str] = ("onnx",),
    hub_layout: bool = False,
) -> dict[str, dict]:
    """Write and measure the files of a network; they are moved into place once each is verified.

    Args:
        student: the network.
        output: folder for ``model.onnx``, ``model_int8.onnx``, ``openvino_model.xml`` and ``.bin``, ``model.pte``, and
            ``preprocessor_config.json`` (timm: ``config.json``).
        images: batches of processed test images ``(b, 3, h, w)``.
        calibration: batches of processed training images, for ``static``.
        train_images: batches of processed training images, for k-NN.
        labels: class numbers of training and of test images, for k-NN.
        quantization: ``none``, ``dynamic`` or ``static``; of the ONNX file.
        rounds: number of timed runs of each batch size.
        formats: of ``FORMATS``.
        hub_layout: whether ``output`` is the folder of a student, with its image processor, in which each format gets
            a folder of its name, as on the Hub.

    Returns:
        For ``pytorch``, ``onnx``, ``int8``, ``openvino`` and ``executorch``: bytes, agreement, k-NN, ``batch_1`` and
        ``batch_64``.

    Raises:
        ValueError: a cosine to PyTorch below 0.9999, or the errors of ``write_graph``, ``quantize``, ``write_openvino``
            and ``write_program``.
    """
    if quantization == "dynamic" and not _has_matrix_products(student):
        raise ValueError(NO_MATRIX_PRODUCTS)
    output.mkdir(parents=True, exist_ok=True)
    staged = output / ".unfinished"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    try:
        folders = {name: staged / name if hub_layout else staged for name in formats}
        files = _write_files(student, staged, folders, quantization, calibration)
        results = _measure(student, files, images, train_images, labels, rounds)
        if not hub_layout:
            _save_processor(student, staged)
        if not hub_layout:  # of an earlier export, which the new record does not describe
            for file in [file for names in FILES.values() for file in names]:
                (output / file).unlink(missing_ok=True)
        elif "onnx" in folders:
            (output / folders["onnx"].relative_to(staged) / INT8_FILE).unlink(missing_ok=True)
        for path in sorted(path for path in staged.rglob("*") if path.is_file()):
            target = output / path.relative_to(staged)
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return results


def _has_matrix_products(student: Student) -> bool:
    """Before the graph is written, which takes minutes; the graph of a plain module alone shows what it computes."""
    is_plain = isinstance(student.backbone.model, ModuleNetwork)
    return is_plain or any(isinstance(part, nn.Linear) for part in student.modules())


def _write_files(
    student: Student, staged: Path, folders: dict[str, Path], quantization: str, calibration: Iterable[Tensor]
) -> dict[str, Path]:
    """Write the files of each format to its folder; the first file of each, which a runtime is given."""
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    files = {}
    graph = folders.get("onnx", staged) / FLOAT_FILE
    if {"onnx", "openvino"} & {*folders}:
        write_graph(student, graph)
    if "onnx" in folders:
        files["onnx"] = graph
        if quantization != "none":
            files["int8"] = graph.with_name(INT8_FILE)
            quantize(graph, files["int8"], quantization, calibration)
    if "openvino" in folders:
        files["openvino"] = folders["openvino"] / OPENVINO_FILE
        write_openvino(graph, files["openvino"])
        if "onnx" not in folders:
            graph.unlink()
    if "executorch" in folders:
        files["executorch"] = folders["executorch"] / PROGRAM_FILE
        write_program(student, files["executorch"])
    return files


def _open(name: str, path: Path) -> Callable[[Tensor], Tensor]:
    """A file of ``_write_files`` as a function from pixel values to embeddings."""
    if name == "executorch":
        return open_program(path)
    load = open_openvino if name == "openvino" else open_file
    return load(path, torch.get_num_threads())


def _measure(
    student: Student,
    files: dict[str, Path],
    images: Iterable[Tensor],
    train_images: Iterable[Tensor],
    labels: tuple[Tensor, Tensor] | None,
    rounds: int,
) -> dict[str, dict]:
    runners = {"pytorch": student}
    for name, path in files.items():
        runners[name] = _open(name, path)
    embeddings = embed_by_all(runners, images, "Test images")
    results = {name: agreement(rows, embeddings["pytorch"]) for name, rows in embeddings.items()}
    for name in FORMATS:
        if name in results:
            _check_agreement(name, student, results[name]["cosine_min"])
    for name, path in files.items():
        results[name]["bytes"] = sum(part.stat().st_size for part in (path, *path.parent.glob(f"{path.stem}.bin")))
    if labels is not None:
        train_labels, test_labels = labels
        ks = tuple(k for k in (10, 20) if k <= len(train_labels))
        train_embeddings = embed_by_all(runners, train_images, "Training images")
        for name, rows in embeddings.items():
            results[name] |= knn_accuracy(train_embeddings[name], train_labels, rows, test_labels, ks)
    for batch_size in (1, 64):
        for name, times in latency(runners, next(iter(images)), batch_size, rounds).items():
            results[name][f"batch_{batch_size}"] = times
    return results


def _check_agreement(name: str, student: Student, lowest: float) -> None:
    kind = {"onnx": "ONNX graph", "openvino": "OpenVINO model", "executorch": "ExecuTorch program"}[name]
    if not lowest >= MIN_COSINE:
        raise ValueError(
            f"--model {student.backbone.name}: the {kind}'s embeddings have a cosine of {lowest:.6f} to PyTorch's, "
            f"below {MIN_COSINE}; nothing was written. Another release of torch or of the runtime may do."
        )


def _save_processor(student: Student, folder: Path) -> None:
    if is_timm_processor(student.backbone.processor):  # saved in the configuration
        student.model.config.to_json_file(folder / "config.json")
    else:
        student.backbone.processor.save_pretrained(folder)
