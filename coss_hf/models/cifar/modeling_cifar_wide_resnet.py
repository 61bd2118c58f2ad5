import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_cifar_wide_resnet import CifarWideResNetConfig
from .modeling_cifar import CifarForImageClassification, CifarModel, convolution


class CifarWideResNetBlock(nn.Module):
    """Batch norm and ReLU come before each convolution; a shortcut that changes the shape starts after the first."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = convolution(in_channels, out_channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = convolution(out_channels, out_channels, 3)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = None if same else convolution(in_channels, out_channels, 1, stride)

    def activate(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(x))

    def forward(self, x: Tensor, active: Tensor) -> Tensor:
        """`x` and what `activate` makes of it."""
        y = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return y + (x if self.shortcut is None else self.shortcut(active))


class CifarWideResNetModel(CifarModel):
    """The network without a classifier; its maps have 1, 1/2 and 1/4 of the input's side.

    The end of a stage counts as a map after the batch norm and ReLU that follow it.
    """

    config_class = CifarWideResNetConfig
    base_model_prefix = "wide_resnet"

    def __init__(self, config: CifarWideResNetConfig):
        super().__init__(config)
        self.conv1 = convolution(config.num_channels, config.stem_width, 3)
        blocks = (config.depth - 4) // 6
        widths = [config.stem_width, *config.hidden_sizes]
        self.stages = nn.ModuleList()
        for stage, (width, wider) in enumerate(zip(widths, widths[1:])):
            first = CifarWideResNetBlock(width, wider, 1 if stage == 0 else 2)
            rest = (CifarWideResNetBlock(wider, wider, 1) for _ in range(blocks - 1))
            self.stages.append(nn.ModuleList([first, *rest]))
        self.bn = nn.BatchNorm2d(config.hidden_sizes[-1])
        self.post_init()

    def maps(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        x = self.conv1(pixel_values)
        blocks = [block for stage in self.stages for block in stage]
        active, maps = blocks[0].activate(x), ()
        for number, block in enumerate(blocks, start=1):
            x = block(x, active)
            active = blocks[number].activate(x) if number < len(blocks) else F.relu(self.bn(x))
            if number % len(self.stages[0]) == 0:
                maps += (active,)
        return maps


class CifarWideResNetForImageClassification(CifarForImageClassification):
    """The network with a linear classifier."""

    config_class = CifarWideResNetConfig
    base_model_prefix = "wide_resnet"
    backbone_class = CifarWideResNetModel
