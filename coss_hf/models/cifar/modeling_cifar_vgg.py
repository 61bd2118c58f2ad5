import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_cifar_vgg import CifarVGGConfig
from .modeling_cifar import CifarForImageClassification, CifarModel, convolution


class CifarVGGModel(CifarModel):
    """The network without a classifier; its maps have 1, 1/2, 1/4, 1/8 and 1/8 of a 32-pixel input's side."""

    config_class = CifarVGGConfig
    base_model_prefix = "vgg"

    def __init__(self, config: CifarVGGConfig):
        super().__init__(config)
        widths = [config.num_channels, *config.hidden_sizes]
        self.stages = nn.ModuleList()
        for width, wider in zip(widths, widths[1:]):
            layers = []
            for i in range(config.layers_per_stage):
                layers += [convolution(wider if i else width, wider, 3, bias=True), nn.BatchNorm2d(wider), nn.ReLU()]
            self.stages.append(nn.Sequential(*layers))
        self.post_init()

    def maps(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        pooled_before = (1, 2, 3, 4) if self.config.image_size >= 64 else (1, 2, 3)
        x, maps = pixel_values, ()
        for i, stage in enumerate(self.stages):
            x = stage(F.max_pool2d(x, 2) if i in pooled_before else x)
            maps += (x,)
        return maps


class CifarVGGForImageClassification(CifarForImageClassification):
    """The network with a linear classifier."""

    config_class = CifarVGGConfig
    base_model_prefix = "vgg"
    backbone_class = CifarVGGModel
