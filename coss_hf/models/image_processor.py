"""Two uses of one image processor: in full on single images, and on the device for training views."""

import copy
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from coss_hf.data.decoding import crop_long_side
from coss_hf.utils.messages import first_line, flag

# Two shapes that a processor must bring to one size: otherwise images cannot be stacked.
_PROBES = ((300, 200), (200, 300))


def is_timm_processor(processor) -> bool:
    """Whether an image processor is timm's, by name: importing its class would import timm, which takes a second."""
    return type(processor).__name__ == "TimmWrapperImageProcessor"


def brings_code(processor) -> bool:
    """Whether an image processor is saved with code of its own, so that loading it needs ``trust_remote_code``."""
    of_package = type(processor).__module__.partition(".")[0] in ("coss_hf", "transformers")
    return not of_package and bool(getattr(processor, "auto_map", None) or getattr(processor, "_auto_class", None))


def transformers_processor(processor, argument: str = ""):
    """An image processor of Transformers with the pixels of timm's, whose class writes nothing next to other networks.

    Resampling rounds differently by one of 255 levels, and a crop that cannot be central by half a pixel lies half a
    pixel to the other side.

    Args:
        processor: timm's image processor.
        argument: the command-line flag that errors name.

    Raises:
        ValueError: no class of Transformers has these steps.
    """
    from transformers import BitImageProcessor  # imports torchvision's transforms

    config = processor.data_config
    _, height, width = config["input_size"]
    size = {"height": height, "width": width}
    if config["crop_mode"] == "center":
        size = {"shortest_edge": math.floor(min(height, width) / config["crop_pct"])}
    names = {mode.name.lower(): mode for mode in Image.Resampling}
    written = BitImageProcessor(
        size=size,
        crop_size={"height": height, "width": width},
        resample=names.get(config["interpolation"], Image.Resampling.BICUBIC),
        image_mean=list(config["mean"]),
        image_std=list(config["std"]),
    )
    # A square, of which a multiple of the input's size is left: no other side of a crop.
    image = noise_image(40, 40).resize((4 * height, 4 * width), Image.Resampling.BICUBIC)
    levels = 255 * min(config["std"])
    theirs = processor([image], return_tensors="pt")["pixel_values"]
    ours = written([image], return_tensors="pt")["pixel_values"]
    shifted = [(theirs, ours), (theirs[..., :-1, :-1], ours[..., 1:, 1:])]
    if not any(a.shape == b.shape and levels * (a - b).abs().max() < 2.5 for a, b in shifted):
        raise ValueError(
            f"{flag(argument)}: no image processor of Transformers does what timm's does "
            f"(crop_mode={config['crop_mode']}, interpolation={config['interpolation']}, "
            f"input_size={tuple(config['input_size'])}), and timm's is saved with networks of timm alone; give the "
            f"network a preprocessor_config.json of its own."
        )
    return written


class Preprocessing:
    """The steps of an image processor, split for evaluation and for training.

    Evaluation and neighbour search run the processor itself (resize, crop, scale, normalise) on each image. Training
    augments an image once for both networks, so a view only needs the processor's arithmetic: to the network's input
    size, scale, channel order, mean and std, on the device.

    Args:
        processor: an image processor.
        size: side of its output in pixels; by default its own.
        argument: the command-line flag that errors name.

    Attributes:
        processor: the image processor, at ``size``.
        size: ``(h, w)`` of its output, in pixels.

    Raises:
        ValueError: a processor that does anything else, gives images of several sizes, or does not support ``size``.
    """

    def __init__(self, processor, size: int | None = None, argument: str = ""):
        if size is not None and size < 1:
            raise ValueError(f"{flag(argument, 'size')}={size}: give a number of pixels, or leave it out.")
        kind = type(processor).__name__
        try:
            self.processor = processor if size is None else _resized(processor, size)
            shapes = {tuple(self.full([noise_image(*shape)]).shape[1:]) for shape in _PROBES}
        except Exception as error:  # processors of any origin fail in any way
            at = f" at {size}x{size} pixels" if size else ""
            raise ValueError(
                f"{flag(argument)}: its image processor ({kind}) fails on an RGB image{at} ({first_line(error)}); "
                f"correct its preprocessor_config.json."
            ) from error
        if any(len(shape) != 3 or shape[0] != 3 for shape in shapes):
            raise ValueError(
                f"{flag(argument)}: its image processor ({kind}) gives arrays of shape {sorted(shapes)[0]}, not RGB "
                f"images (3, h, w); give the network a processor of images (preprocessor_config.json)."
            )
        sizes = sorted(shape[1:] for shape in shapes)
        if len(sizes) > 1 or (size and sizes[0] != (size, size)):
            found = " and ".join(f"{h}x{w}" for h, w in sizes)
            if size:
                remedy = f" ({size}x{size}); correct its preprocessor_config.json."
            else:
                remedy = f"; set {flag(argument, 'size')}."
            raise ValueError(
                f"{flag(argument)}: its image processor ({kind}) gives images of {found} pixels, where one size is "
                f"needed{remedy}"
            )
        self.size = sizes[0]
        self._measure(argument)

    def full(self, images: list[Image.Image]) -> Tensor:
        """Process RGB images of any sizes to ``(b, 3, h, w)`` float32."""
        images = [crop_long_side(image) for image in images]
        return self.processor(images, return_tensors="pt")["pixel_values"].float()

    def normalize(self, views: Tensor) -> Tensor:
        """Normalise views ``(b, 3, H, W)``, uint8 on any device, to ``(b, 3, h, w)`` float32."""
        pixels = views.float()
        if pixels.shape[-2:] != self.size:
            pixels = interpolate(pixels, self.size, mode="bilinear", antialias=True, align_corners=False)
        if self._flip:
            pixels = pixels.flip(1)
        if self._slope.device != pixels.device:
            self._slope = self._slope.to(pixels.device)
            self._offset = self._offset.to(pixels.device)
        return torch.addcmul(self._offset, pixels, self._slope)

    def _measure(self, argument: str) -> None:
        """Measure slope and offset of pixel -> slope * pixel + offset on two plain images, and verify them on noise."""
        black = self._processed_color(0)
        white = self._processed_color(255)
        red = self._processed_color((255, 0, 0))
        self._slope = ((white - black) / 255).float().reshape(1, 3, 1, 1)
        self._offset = black.float().reshape(1, 3, 1, 1)
        self._flip = bool((red[2] - black[2]).abs() > (red[0] - black[0]).abs())
        if is_timm_processor(self.processor):  # cannot leave resize and crop out
            image = _plain((200, 100, 50), self.size)
            options = {}
        else:
            image = noise_image(self.size[1], self.size[0])
            options = {"do_resize": False, "do_center_crop": False}
        expected = self.processor([image], return_tensors="pt", **options)["pixel_values"].float()
        views = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        if expected.shape[-2:] != self.size or (self.normalize(views) - expected).abs().max() > 1e-5:
            raise ValueError(
                f"{flag(argument)}: its image processor ({type(self.processor).__name__}) does more than resize, crop, "
                f"scale and normalise; give the network a processor of these steps (preprocessor_config.json)."
            )

    def _processed_color(self, color) -> Tensor:
        """The processed channels (3,) of a plain image."""
        return self.full([_plain(color, self.size)])[0, :, 0, 0].double()


def _plain(color, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.full((*size, 3), color, dtype=np.uint8))


def noise_image(width: int, height: int) -> Image.Image:
    """An RGB image of noise, always the same."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _resized(processor, size: int):
    """A copy of ``processor`` whose output is ``size`` x ``size``, its resize-to-crop proportion kept."""
    if is_timm_processor(processor):
        config = {**processor.data_config, "input_size": (3, size, size)}
        return type(processor)(pretrained_cfg=config, architecture=processor.architecture)
    processor = copy.deepcopy(processor)
    edges = dict(getattr(processor, "size", None) or {})
    crop = dict(processor.crop_size) if getattr(processor, "do_center_crop", False) else None
    if crop:
        processor.size = {key: round(edge * size / crop["height"]) for key, edge in edges.items()}
        processor.crop_size = {"height": size, "width": size}
    elif getattr(processor, "crop_pct", None) and "shortest_edge" in edges:
        processor.size = {"shortest_edge": size}  # ConvNeXt: resizes by crop_pct and crops by itself
    else:
        processor.size = {"height": size, "width": size}
    processor.do_resize = True
    return processor
