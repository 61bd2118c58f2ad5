"""Random augmentation of an image to a view."""

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from coss_hf.data.decoding import Decoded, crop_long_side

AUGMENTATIONS = ("none", "cifar", "imagenet", "moco")


class Fit(torch.nn.Module):
    """Shorter side to `size` and centre crop; images of that size pass untouched."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.crop = v2.Compose([v2.Resize(size), v2.CenterCrop(size)])

    def forward(self, image: Image.Image) -> Image.Image:
        return image if image.size == (self.size, self.size) else self.crop(crop_long_side(image))

    def of_file(self, read: Callable[[Callable], Decoded], seed: Callable[[], None]) -> Image.Image:
        """The same of an image that is not decoded yet, from no more pixels than it takes; see `RandomCrop.of_file`."""
        return self(read(lambda size: min(size) / self.size).image)


class RandomCrop(torch.nn.Module):
    """`v2.RandomResizedCrop`, draw for draw, of a PIL image or of a file that is not decoded yet.

    Args:
        size: side of the crop in pixels, once it is resized.
        scale: smallest and largest share of the image's area.
        to_tensor: give a tensor uint8 (3, size, size), resized as a tensor; else a PIL image.
    """

    def __init__(self, size: int, scale: tuple[float, float] = (0.08, 1.0), to_tensor: bool = False):
        super().__init__()
        self.size = size
        self.to_tensor = to_tensor
        self.crop = v2.RandomResizedCrop(size, scale)

    def draw(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Top, left, height and width of a crop of an image of `size` (width, height)."""
        params = self.crop.make_params([torch.empty(3, *size[::-1], device="meta")])
        return params["top"], params["left"], params["height"], params["width"]

    def forward(self, image: Image.Image) -> Image.Image | Tensor:
        return self._cut(image, *self.draw(image.size))

    def of_file(self, read: Callable[[Callable], Decoded], seed: Callable[[], None]) -> Image.Image | Tensor:
        """The crop of an image that is not decoded yet: at a scale at which the crop still has `size` pixels a side.

        Args:
            read: decodes it; see `decode_reduced` for its argument.
            seed: seeds torch's global generator for this view: the crop decides the scale, so it is drawn before, and
                again for an image that takes the place of one that cannot be decoded.
        """

        def reduction(size: tuple[int, int]) -> float:
            seed()
            return min(self.draw(size)[2:]) / self.size

        image, size, scale = read(reduction)
        seed()
        top, left, height, width = self.draw(size)
        if scale == 1:
            return self._cut(image, top, left, height, width)
        right, bottom = (
            min((left + width) / scale, image.size[0]),
            min((top + height) / scale, image.size[1]),
        )
        box = (left / scale, top / scale, right, bottom)
        resized = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box)
        return F.pil_to_tensor(resized) if self.to_tensor else resized

    def _cut(self, image: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image | Tensor:
        image = F.crop(image, top, left, height, width)
        if self.to_tensor:  # the crop alone: it takes a second to make a tensor of a full photograph
            image = F.pil_to_tensor(image)
        return F.resize(image, [self.size, self.size], antialias=True)


class CropAndFlip(torch.nn.Module):
    """`v2.RandomCrop` with zero padding and `v2.RandomHorizontalFlip` of a tensor (3, h, w), draw for draw."""

    def __init__(self, padding: int):
        super().__init__()
        self.padding = padding

    def extra_repr(self) -> str:
        return f"padding={self.padding}"

    def forward(self, image: Tensor) -> Tensor:
        if self.padding:
            _, height, width = image.shape
            top = int(torch.randint(0, 2 * self.padding + 1, ()))
            left = int(torch.randint(0, 2 * self.padding + 1, ()))
            padded = torch.nn.functional.pad(image, [self.padding] * 4)
            image = padded[:, top : top + height, left : left + width]
        return image.flip(-1) if torch.rand(1) < 0.5 else image


class SeparableBlur(v2.GaussianBlur):
    """`v2.GaussianBlur` in two passes, which is five times as fast at 224 pixels (results differ by rounding)."""

    def transform(self, inpt: Tensor, params: dict) -> Tensor:
        width, height = self.kernel_size
        blurred = F.gaussian_blur(inpt.float(), [width, 1], params["sigma"])
        return F.gaussian_blur(blurred, [1, height], params["sigma"]).round_().to(inpt.dtype)


def augmentation(name: str, size: int) -> v2.Transform:
    """Random change of an RGB image to a uint8 tensor (3, size, size), drawn from torch's global generator only.

    Args:
        name: `none`: shorter side to size, centre crop. `cifar`: the same, then a crop out of size/8 zero padding and a
            flip. `imagenet`: random resized crop (8-100 % of the area) and flip. `moco`: MoCo v2 (arXiv:2003.04297),
            with SimCLR's blur kernel of a tenth of the size.
        size: the side of the tensor in pixels.

    Raises:
        ValueError: an unknown name, or a size below 1.
    """
    if name not in AUGMENTATIONS:
        raise ValueError(f"--augmentation {name}: choose one of {', '.join(AUGMENTATIONS)}.")
    if size < 1:
        raise ValueError(f"--view_size {size}: give the side of a view in pixels, 1 or more.")
    to_tensor = v2.PILToTensor()
    flip = v2.RandomHorizontalFlip()
    if name == "none":
        return v2.Compose([Fit(size), to_tensor])
    if name == "cifar":
        return v2.Compose([Fit(size), to_tensor, CropAndFlip(size // 8)])
    if name == "imagenet":
        return v2.Compose([RandomCrop(size, to_tensor=True), flip])
    # Colours on the PIL image: faster, and no sum whose rounding depends on the number of threads.
    jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    blur = v2.RandomApply([SeparableBlur(2 * (size // 20) + 1, (0.1, 2.0))], p=0.5)
    return v2.Compose([RandomCrop(size, (0.2, 1.0)), jitter, v2.RandomGrayscale(0.2), to_tensor, blur, flip])
