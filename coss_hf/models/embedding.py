"""Images to embeddings: `coss_hf.embed` by any vision network, and data sets and batches by a `Backbone`."""

import contextlib
import copy
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from coss_hf.data.decoding import decode, is_fault_of_image, upright_rgb
from coss_hf.models.backbone import Backbone, evaluating, vision_tower
from coss_hf.models.image_processor import Preprocessing
from coss_hf.models.loading import find_processor, load_network, missing_weights
from coss_hf.models.revision import commit_in_memory
from coss_hf.models.towers import check_space, without_shared_space
from coss_hf.utils.errors import NonFiniteEmbedding
from coss_hf.utils.messages import parameter_names
from coss_hf.utils.vectors import rows_not_finite

IMAGES = (
    "give PIL images, paths, uint8 arrays (h, w, 3), uint8 tensors (3, h, w), or pixel values as one float tensor "
    "(b, 3, h, w)"
)
END = object()  # of images that are handed over one by one
NAMES_SHOWN = 5  # of images, in a message

BAR_DELAY = 2  # seconds, below which no progress bar appears


@torch.no_grad()
@parameter_names()
def embed(
    model: Backbone | PreTrainedModel | str | Path,
    images,
    pooling: str = "auto",
    *,
    processor=None,
    batch_size: int = 64,
    space: str = "tower",
    trust_remote_code: bool = False,
) -> Tensor:
    """Embed images with any vision network, in evaluation mode and without gradients; the network is left unchanged.

    Args:
        model: a `Backbone` (for many calls: it is prepared once), a network in memory, a Hub name or a folder.
        images: PIL images of any mode, paths, uint8 arrays ``(h, w, 3)`` or uint8 tensors ``(3, h, w)``, one or many,
            which go through the full image processor; or a float tensor ``(b, 3, h, w)`` of pixel values, which does
            not.
        pooling: ``cls`` (class token), ``mean`` or ``gap`` (over positions), ``pooler`` (the network's own), or
            ``auto``: what was stored with the network (``config.embedding_pooling``), else by its architecture.
        processor: image processor; by default the one in the network's checkpoint.
        batch_size: number of images per forward pass.
        space: of a network of images and text, such as CLIP: ``tower``, the embedding of the vision tower; or
            ``projected``, that which is compared with embeddings of texts.
        trust_remote_code: whether a checkpoint that is given by its name may run its own code.

    Returns:
        The embeddings ``(b, d)``, of the network's dtype and on its device.

    Raises:
        ValueError: an image of another kind, or one that cannot be decoded; no image processor, a network without
            this pooling or space, or one whose embedding needs weights that its checkpoint did not contain.
    """
    check_batch_size(batch_size)
    check_space(space, pooling, "")
    are_pixels = isinstance(images, Tensor) and images.is_floating_point()
    if not are_pixels:
        images = _as_images(images)
    if not len(images) or (are_pixels and (images.dim() != 4 or images.shape[1] != 3)):
        raise ValueError(f"images: {_described(images)}; give one image or more, pixel values as (b, 3, h, w).")
    if isinstance(model, Backbone):
        if space == "projected" and model.space != space:
            raise without_shared_space(model.name, "a Backbone that was built without it", "")
        backbone = copy.copy(model)
        if pooling not in ("auto", model.pooling):
            backbone.set_pooling(pooling)
        if processor is not None:
            backbone.preprocessing = Preprocessing(processor)
    else:
        pixel_size = tuple(images.shape[2:]) if are_pixels else None
        backbone = _prepare(model, pooling, processor, pixel_size, space, trust_remote_code)
    first = next(backbone.model.parameters())
    rows = []
    with evaluating(backbone.model):
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            if not are_pixels:
                batch = backbone.preprocess(batch)
            rows.append(backbone.features(batch.to(first.device, first.dtype)).embedding)
    return torch.cat(rows)


def check_batch_size(batch_size: int) -> None:
    """Check that a batch has at least one image.

    Raises:
        ValueError: it has none.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give 1 or more.")


def _prepare(
    model: PreTrainedModel | str | Path,
    pooling: str,
    processor,
    pixel_size: tuple[int, int] | None,
    space: str,
    trust_remote_code: bool,
) -> Backbone:
    """A backbone of a network, whose configuration is left unchanged; without image processor for pixel values."""
    if isinstance(model, (str, Path)):
        network, missing = load_network(str(model), space, trust_remote_code)
    else:
        network = model
        missing = None
    if not isinstance(network, PreTrainedModel):
        raise ValueError(f"model: {_described(network)}; give a Backbone, a PreTrainedModel, a Hub name or a folder.")
    tower = vision_tower(network, "")
    if missing is None:
        missing = missing_weights(
            tower if space == "tower" else network, network.name_or_path, commit_in_memory(network)
        )
    entries = dict(vars(tower.config))
    try:
        if pixel_size is not None:
            processor = None
        elif processor is None:
            processor = find_processor(network, trust_remote_code=trust_remote_code)
        return Backbone(network, processor, pooling=pooling, missing=missing, size=pixel_size, space=space)
    finally:
        vars(tower.config).clear()
        vars(tower.config).update(entries)


def _as_images(images) -> list[Image.Image]:
    if isinstance(images, (str, Path, Image.Image)) or (isinstance(images, (np.ndarray, Tensor)) and images.ndim == 3):
        images = [images]
    if not hasattr(images, "__iter__"):
        raise ValueError(f"images: {_described(images)}; {IMAGES}.")
    found = []
    remaining = iter(images)
    while True:
        with naming_image(len(found)):  # a column of a dataset decodes an image as it hands it over
            image = next(remaining, END)
            if image is END:
                return found
            found.append(as_image(image))


@contextlib.contextmanager
def naming_image(position: int):
    """Name an image that cannot be decoded by its position.

    Raises:
        ValueError: what was raised, unless it is no fault of the image.
    """
    try:
        yield
    except Exception as error:  # Pillow's readers raise almost anything on damaged files
        if not is_fault_of_image(error):
            raise
        reason = error if isinstance(error, ValueError) else f"cannot be decoded ({type(error).__name__}: {error})"
        raise ValueError(f"images[{position}]: {reason}") from error


def as_image(image) -> Image.Image:
    """Return an image of any kind upright and in RGB.

    Raises:
        ValueError: something else, or a file that cannot be decoded.
    """
    if isinstance(image, (str, Path)):
        return decode({"bytes": None, "path": str(image)})
    if isinstance(image, Image.Image):
        return upright_rgb(image)
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.dim() == 3 and len(image) == 3:
        image = image.permute(1, 2, 0).cpu().numpy()
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return Image.fromarray(image)
    raise ValueError(f"{_described(image)}; {IMAGES}.")


def _described(value) -> str:
    if isinstance(value, (np.ndarray, Tensor)):
        return f"{type(value).__name__} {tuple(value.shape)} of {value.dtype}"
    return f"{len(value)} images" if isinstance(value, list) else type(value).__name__


def embed_dataset(
    backbone: Backbone,
    dataset: Dataset,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    description: str = "Embedding",
) -> Tensor:
    """Embed a dataset of processed images, in evaluation mode.

    Args:
        backbone: the network, on any device.
        dataset: n processed images ``(3, h, w)`` float32, such as ``ProcessedImages``.
        batch_size: number of images per forward pass.
        num_workers: number of processes that decode.
        device: the device that the network is moved to; by default its own.
        description: the label of the progress bar.

    Returns:
        The embeddings ``(n, d)``, float32 on the CPU.

    Raises:
        NonFiniteEmbedding: the network gave NaN or infinity; the message names the images.
    """
    device = torch.device(device or next(backbone.model.parameters()).device)
    backbone.model.to(device)
    loader = DataLoader(dataset, batch_size, num_workers=num_workers, pin_memory=device.type == "cuda")
    rows = torch.empty(len(dataset), backbone.dim)
    start = 0
    with tqdm(total=len(dataset), desc=description, unit="img", leave=False, delay=BAR_DELAY) as progress:
        for embedding in embed_batches(backbone, loader):
            rows[start : start + len(embedding)] = check_finite(embedding, dataset, start, description)
            start += len(embedding)
            progress.update(len(embedding))
    return rows


def check_finite(embeddings: Tensor, images, first: int = 0, whose: str = "Embedding") -> Tensor:
    """Return embeddings ``(b, d)`` as they are.

    Args:
        embeddings: of the images from number ``first`` on.
        images: dataset with ``names``; any other's images are named by their row.
        first: number of the first image.
        whose: what was embedded, for the message.

    Raises:
        NonFiniteEmbedding: some hold NaN or infinity; the message names their images.
    """
    bad = rows_not_finite(embeddings, first)
    if not bad:
        return embeddings
    shown = bad[:NAMES_SHOWN]
    named = images.names(shown) if hasattr(images, "names") else [f"row {row}" for row in shown]
    more = ", ..." if len(bad) > NAMES_SHOWN else ""
    raise NonFiniteEmbedding(
        f"{whose}: the network gives NaN or infinity for {len(bad)} of {len(embeddings)} images: "
        f"{', '.join(named)}{more}. Use float32 (--teacher_dtype), and look at these images if that does not help."
    )


@torch.no_grad()
def embed_batches(backbone: Backbone, loader: Iterable[Tensor]) -> Iterator[Tensor]:
    """Embed each batch ``(b, 3, h, w)`` in evaluation mode: ``(b, d)``, float32 on the CPU."""
    first = next(backbone.model.parameters())
    with evaluating(backbone.model):
        for pixel_values in loader:
            pixel_values = pixel_values.to(first.device, first.dtype, non_blocking=True)
            yield backbone.features(pixel_values).embedding.float().cpu()
