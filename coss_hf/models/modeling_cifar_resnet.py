import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.utils import can_return_tuple

from .configuration_cifar_resnet import CifarResNetConfig


def convolution(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)


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


class CifarResNetPreTrainedModel(PreTrainedModel):
    config_class = CifarResNetConfig
    base_model_prefix = "resnet"
    main_input_name = "pixel_values"

    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        else:
            super()._init_weights(module)


class CifarResNetModel(CifarResNetPreTrainedModel):
    """The network without a classifier; `config.hidden_sizes[-1]` is the dimension of `pooler_output`."""

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
        self.pooler = nn.AdaptiveAvgPool2d(1)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """`pixel_values` (b, num_channels, h, w), normalised.

        Returns `last_hidden_state` (b, C, h/4, w/4), `pooler_output` (b, C, 1, 1), its average over the map, and, where
        asked for, `hidden_states`: the maps at the end of the three stages, after the ReLU.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x = F.relu(self.bn1(self.conv1(pixel_values)))
        maps = ()
        for stage in self.stages:
            x = stage(x)
            maps += (x,)
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=x,
            pooler_output=self.pooler(x),
            hidden_states=maps if output_hidden_states else None,
        )


class CifarResNetForImageClassification(CifarResNetPreTrainedModel):
    """The network with a linear classifier of `config.num_labels` outputs on the pooled map."""

    def __init__(self, config: CifarResNetConfig):
        super().__init__(config)
        self.resnet = CifarResNetModel(config)
        self.classifier = nn.Linear(config.hidden_sizes[-1], config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> ImageClassifierOutputWithNoAttention:
        """`pixel_values` (b, num_channels, h, w), normalised; `labels` (b,), for which the cross-entropy is returned.

        `logits` are (b, num_labels); `hidden_states` as those of `CifarResNetModel`.
        """
        outputs = self.resnet(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
        logits = self.classifier(outputs.pooler_output.flatten(1))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=outputs.hidden_states)
