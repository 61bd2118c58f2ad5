import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_cifar_resnet import CifarResNetConfig
from .modeling_cifar import CifarForImageClassification, CifarModel, convolution


class PaddingShortcut(nn.Module):
    """Option A: every `stride`-th row and column, the new channels zero, half before and half after the old ones."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.padding = (out_channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))


class CifarResNetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: str):
        super().__init__()
        self.conv1 = convolution(in_channels, out_channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = convolution(out_channels, out_channels, 3)
        self.bn2 = nn.BatchNorm2d(out_channels)
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        elif shortcut == "padding":
            self.shortcut = PaddingShortcut(in_channels, out_channels, stride)
        else:
            self.shortcut = nn.Sequential(
                convolution(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNetModel(CifarModel):
    """The network without a classifier; its maps have 1, 1/2 and 1/4 of the input's side."""

    config_class = CifarResNetConfig
    base_model_prefix = "resnet"

    def __init__(self, config: CifarResNetConfig):
        super().__init__(config)
        self.conv1 = convolution(config.num_channels, config.stem_width, 3)
        self.bn1 = nn.BatchNorm2d(config.stem_width)
        blocks = (config.depth - 2) // 6
        widths = [config.stem_width, *config.hidden_sizes]
        self.stages = nn.ModuleList()
        for stage, (width, wider) in enumerate(zip(widths, widths[1:])):
            first = CifarResNetBlock(width, wider, 1 if stage == 0 else 2, config.shortcut)
            rest = (CifarResNetBlock(wider, wider, 1, config.shortcut) for _ in range(blocks - 1))
            self.stages.append(nn.Sequential(first, *rest))
        self.post_init()

    def maps(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        x = F.relu(self.bn1(self.conv1(pixel_values)))
        maps = ()
        for stage in self.stages:
            x = stage(x)
            maps += (x,)
        return maps


class CifarResNetForImageClassification(CifarForImageClassification):
    """The network with a linear classifier."""

    config_class = CifarResNetConfig
    base_model_prefix = "resnet"
    backbone_class = CifarResNetModel
