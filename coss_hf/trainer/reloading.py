"""Whether the folder of a student loads, with nothing but Transformers, as the student that was trained.

That of a plain module is loaded into a copy of it at random weights: only its owner can build another.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from datasets import Dataset
from packaging.version import Version
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from coss_hf.data.decoding import decode
from coss_hf.models.backbone import Backbone, backbone_classes, evaluating
from coss_hf.models.heads import load_head
from coss_hf.models.image_processor import noise_image
from coss_hf.models.loading import quiet_loading
from coss_hf.models.modules import WEIGHTS_FILE, ModuleNetwork
from coss_hf.models.pooler import FIRST_TIMM, TIMM, PoolerOutput, pooler_output, settled
from coss_hf.models.pooling import pool
from coss_hf.models.saving import save_network
from coss_hf.utils.disk import full_disk
from coss_hf.utils.errors import RunStopped
from coss_hf.utils.messages import command_to, first_line, first_names, get_logger

logger = get_logger(__name__)

IMAGES = 4
# Largest difference to the embeddings, relative to their norm: other kernels may compute them after a reload.
TOLERANCE = 1e-2
HALF_TOLERANCE = 5e-2
# Transformers keeps code that it loads for good, by the name of the folder that it was in.
SCRATCH = "coss_hf_student"
MOST_COPIED = 50_000_000  # numbers in a student that is saved and loaded before it is trained, in half a second


class NotReloadable(RunStopped):
    """What was saved does not load as what was trained; it is left as it is.

    Attributes:
        problem: what does not load, or differs, without the folder and the remedy.
        remedy: what to do about it before the training; empty where the kind of student says it.
    """

    problem = ""
    remedy = ""


def check_processor(student: Backbone) -> None:
    """Save a student's image processor to a temporary folder, and compare its pixels after it was loaded again.

    Raises:
        ValueError: it does not load, or gives other pixels.
    """
    images = [noise_image(60, 40), noise_image(40, 60)]
    expected = student.preprocess(images)
    kind = type(student.processor).__name__
    with _scratch() as folder:
        try:
            with quiet_loading():
                student.model.config.save_pretrained(folder)
                student.processor.save_pretrained(folder)
                found = _load_processor(folder)(images, return_tensors="pt")["pixel_values"].float()
        except Exception as error:  # processors of any origin fail in any way
            if full := full_disk(error):
                raise full from error
            raise ValueError(
                f"--student: its image processor ({kind}) cannot be loaded once it is saved ({first_line(error)}); "
                f"give the student a preprocessor_config.json of a class of Transformers."
            ) from error
    if found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-5):
        raise ValueError(
            f"--student: its image processor ({kind}) gives other pixels once it was saved and loaded; give the "
            f"student a preprocessor_config.json of a class of Transformers."
        )


def check_reload(
    folder: str | Path, student: Backbone, head: torch.nn.Module | None, train: Dataset, column: str
) -> None:
    """Load a student from its folder by Transformers alone, and compare its embeddings with those of the trained one.

    Args:
        folder: where it was saved.
        student: the trained student.
        head: its projection head.
        train: training images, of which a few are embedded.
        column: their column.

    Raises:
        NotReloadable: what does not load, or differs; nothing on the disk is changed.
    """
    _check_folder(folder, student, head, _readable(train, column))


def check_before_training(student: Backbone, copies: bool = True) -> None:
    """``check_processor`` and ``check_saving``; a disk that is full is no fault of the student."""
    try:
        check_processor(student)
        check_saving(student, copies)
    except OSError as error:
        if full_disk(error) is None:
            raise
        logger.warning(
            "No space in %s (%s): whether the student loads once it is saved is not checked before the training.",
            *(tempfile.gettempdir(), first_line(error)),
        )


def check_saving(student: Backbone, copies: bool = True) -> None:
    """Save a student that is yet to be trained to a temporary folder, and check that as the run's folder at its end.

    A student of many parameters is not copied: the names of its weights are compared with those that its configuration
    gives. Its image processor is left to ``check_processor``.

    Args:
        student: its configuration gets the entries of a saved one.
        copies: whether its weights may be written and loaded again.

    Raises:
        ValueError: what would not load, or differ, and the remedy.
        OSError: the disk is full.
    """
    size = sum(tensor.numel() for tensor in student.model.state_dict().values())
    with _scratch() as folder:
        try:
            if copies and size <= MOST_COPIED and shutil.disk_usage(folder).free > 8 * size:
                with _step(folder, "saving it"):
                    save_network(student, folder)
                pixels = student.preprocess([noise_image(60, 40)])
                _check_network(folder, student, None, pixels, pixels)
            elif not isinstance(student.model, ModuleNetwork):
                _check_names_of_config(folder, student)
        except NotReloadable as error:
            if full := full_disk(error.__cause__):
                raise full from error
            raise ValueError(
                f"--student={student.name} would not load once it is saved: {error.problem}. "
                f"{error.remedy or _usual_remedy(student)}"
            ) from error


def _usual_remedy(student: Backbone) -> str:
    if isinstance(student.model, ModuleNetwork):
        return "Give a module whose state_dict() holds all that its output depends on, and takes it back."
    as_module = "give it as Backbone.from_module(student, size=, mean=, std=)."
    config = student.model.config
    if not backbone_classes(config) and not getattr(config, "auto_map", None):
        return "G" + as_module[1:]
    return f"Correct its config to the layers that it has, merge adapters into its weights, or {as_module}"


@contextmanager
def _scratch() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, SCRATCH)
        folder.mkdir()
        yield str(folder)


def _check_names_of_config(folder: str | Path, student: Backbone) -> None:
    """Compare names and shapes of the weights with those of the network that ``AutoModel`` builds, without storage."""
    with _step(folder, "saving its config"):
        student.model.config.save_pretrained(folder)
    if getattr(student.model.config, "auto_map", None):
        return  # its code is in no folder yet
    with _step(folder, "AutoConfig.from_pretrained"):
        config = AutoConfig.from_pretrained(folder)
    if not backbone_classes(config):
        raise _failed(folder, f"AutoModel does not load a {type(student.model).__name__}")
    try:
        with torch.device("meta"):
            built = AutoModel.from_config(config).state_dict()
    except Exception as error:  # code of any origin may refuse the meta device in any way
        logger.debug("no meta twin of %s: %s", student.name, error)
        return
    saved, _ = settled(student, student.model.state_dict())
    missing = {name for name in built if name not in saved or saved[name].shape != built[name].shape}
    _check_names(folder, student, missing, saved.keys() - built.keys())


def _check_names(folder: str | Path, student: Backbone, missing: set[str], unexpected: set[str]) -> None:
    """Refuse weights that no file has, and those that the embedding depends on and no configuration gives a place."""
    unexpected = unexpected - student.unused
    # A pooler that the student does without is set by its saving, or is a norm of no weights of its own.
    missing = {name for name in missing if getattr(student.model, name.partition(".")[0], None) is not None}
    if missing or unexpected:
        parts = [("lacks", missing), ("alone has", unexpected)]
        listed = " and ".join(f"{verb} {first_names(sorted(names))}" for verb, names in parts if names)
        error = _failed(folder, f"its structure is not that of its config.json: it {listed}")
        if student.pooling == "pooler" and unexpected and not missing and all("pooler" in name for name in unexpected):
            # A classifier's own, as that of Data2Vec; networks that are loaded by name have none.
            error.remedy = "AutoModel builds no such pooler: give Backbone(student, processor, pooling='mean')."
        raise error


def _check_folder(
    folder: str | Path, student: Backbone, head: torch.nn.Module | None, images: list[Image.Image]
) -> None:
    student_pixels = student.preprocess(images)
    with _step(folder, "AutoImageProcessor.from_pretrained"):
        processor = _load_processor(folder)
        pixels = processor(images, return_tensors="pt")["pixel_values"].float()
    _compare(folder, "pixels of its image processor", pixels, student_pixels, TOLERANCE)
    _check_network(folder, student, head, pixels, student_pixels)


def _check_network(
    folder: str | Path, student: Backbone, head: torch.nn.Module | None, pixels: Tensor, student_pixels: Tensor
) -> None:
    """Compare what the folder's network gives for ``pixels`` with what the student gives for its own."""
    loader = "load_state_dict" if isinstance(student.model, ModuleNetwork) else "AutoModel.from_pretrained"
    with _step(folder, loader):
        model = _load_model(folder, student)
        embeddings = _embed(model, student, pixels)
    tolerance = TOLERANCE if student.model.dtype == torch.float32 else HALF_TOLERANCE
    trained = _embed(student.model, student, student_pixels)
    _compare(folder, "embeddings", embeddings, trained, tolerance)
    if not isinstance(student.model, ModuleNetwork):
        _check_pooler(folder, model, student, pixels, trained, tolerance)
    if head is not None:
        with _step(folder, "its head"), torch.no_grad():
            found = load_head(str(folder)).to(trained.device)(trained)
            expected = head(trained.to(next(head.parameters()).dtype)).float()
        _compare(folder, "outputs of its head", found, expected, tolerance)


def _readable(train: Dataset, column: str) -> list[Image.Image]:
    """The first images that can be read: some may have gone while the run trained. Without any, an image of noise."""
    images = []
    for row in range(min(len(train), 4 * IMAGES)):
        try:
            images.append(decode(train[row][column]))
        except Exception:  # each format and disk fails in its own way, and others will do
            continue
        if len(images) == IMAGES:
            break
    return images or [noise_image(60, 40)]


def _load_processor(folder: str | Path):
    return AutoImageProcessor.from_pretrained(folder, trust_remote_code=_code(folder, "preprocessor_config.json"))


def _load_model(folder: str | Path, student: Backbone) -> torch.nn.Module:
    """By the code in the folder, where it has some: classes of this process would hide that it is missing."""
    if isinstance(student.model, ModuleNetwork):
        return student.model.at_random().load_weights(Path(folder, WEIGHTS_FILE)).eval()
    config = json.loads(Path(folder, "config.json").read_text())
    loader = AutoModel
    if "AutoModel" in config.get("auto_map", {}):
        loader = get_class_from_dynamic_module(config["auto_map"]["AutoModel"], str(folder))
    model, info = loader.from_pretrained(folder, dtype=student.model.dtype, output_loading_info=True)
    _check_names(folder, student, set(info["missing_keys"]), set(info["unexpected_keys"]))
    return model.to(student.model.device).eval()


def _code(folder: str | Path, file: str) -> bool:
    path = Path(folder, file)
    return path.is_file() and "auto_map" in json.loads(path.read_text())


@torch.no_grad()
def _embed(model: torch.nn.Module, student: Backbone, pixels: Tensor) -> Tensor:
    first = next(model.parameters())
    with evaluating(model):
        output = model(pixel_values=pixels.to(first.device, first.dtype), **student.options)
    return pool(output, student.pooling, student.layout).float()


@torch.no_grad()
def _check_pooler(
    folder: str | Path, model: torch.nn.Module, student: Backbone, pixels: Tensor, trained: Tensor, tolerance: float
) -> None:
    """Compare what pipelines and timm read with the embeddings, where the card says that it is the same."""
    first = next(model.parameters())
    kind = pooler_output(student)
    if kind in (PoolerOutput.EMBEDDING, PoolerOutput.ZEROS):
        with _step(folder, "its pooler_output"), evaluating(model):
            output = model(pixel_values=pixels.to(first.device, first.dtype), **student.options)
            pooled = output.pooler_output.flatten(1).float()
        if kind is PoolerOutput.EMBEDDING:
            _compare(folder, "values of pooler_output", pooled, trained, tolerance)
        elif pooled.any():
            raise _failed(folder, "it has a pooler that was not trained")
    if model.config.model_type == TIMM and kind is PoolerOutput.EMBEDDING:
        import timm

        if Version(timm.__version__) < Version(FIRST_TIMM):  # a good student must not fail by it
            logger.warning(
                "timm %s cannot load the student's folder, which is not checked: install timm>=%s.",
                *(timm.__version__, FIRST_TIMM),
            )
            return
        with _step(folder, "timm.create_model"):
            network = timm.create_model(f"local-dir:{folder}", pretrained=True).to(first.device, first.dtype).eval()
            pooled = network(pixels.to(first.device, first.dtype)).float()
        _compare(folder, "embeddings by timm", pooled, trained, tolerance)


@contextmanager
def _step(folder: str | Path, what: str) -> Iterator[None]:
    try:
        with quiet_loading():
            yield
    except NotReloadable:
        raise
    except Exception as error:  # damaged files, code of any origin
        raise _failed(folder, f"{what} fails ({first_line(error)})") from error


def _compare(folder: str | Path, what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    if found.shape != expected.shape:
        raise _failed(folder, f"the {what} have the shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    # Whether they are finite is told elsewhere, and in other words.
    found, expected = (values.nan_to_num(0, 0, 0) for values in (found, expected))
    difference = ((found - expected).norm() / expected.norm().clamp_min(1e-12)).item()
    if not difference <= tolerance:
        raise _failed(folder, f"the {what} differ from those of the trained student by {100 * difference:.2g} %")


def _failed(folder: str | Path, problem: str) -> NotReloadable:
    error = NotReloadable(
        f"The student is trained, but its folder {folder} does not load as what was trained: {problem}. Everything is "
        f"kept there, the weights in model.safetensors; correct or complete its files, then measure it with "
        f"{command_to('evaluate')}."
    )
    error.problem = problem
    return error
