"""Modules of one's own, as nobody's library knows them."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from coss_hf import Features

FORMS = ("vector", "map", "tokens", "class token", "object", "dict", "maps", "features")
INPUT = {"size": 16, "mean": (0.4, 0.5, 0.6), "std": 0.25}


class Encoder(nn.Module):
    """Two convolutions; its output has the form that is asked for. Its parameter is not called ``pixel_values``."""

    def __init__(self, form: str = "vector", dim: int = 16):
        super().__init__()
        self.form = form
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Conv2d(8, dim, 3, 2, 1)
        self.classifier = nn.Linear(dim, 5)
        self.cls = nn.Parameter(torch.randn(1, 1, dim))

    def forward(self, images: Tensor):
        first = self.stem(images)
        last = self.body(first)
        pooled = last.mean((2, 3))
        tokens = last.flatten(2).transpose(1, 2)
        logits = self.classifier(pooled)
        with_class = torch.cat([self.cls.expand(images.shape[0], -1, -1) + tokens.mean(1, True), tokens], 1)
        return {
            "vector": pooled,
            "map": last,
            "tokens": tokens,
            "class token": with_class,
            "object": SimpleNamespace(last_hidden_state=last, pooler_output=pooled.relu(), logits=logits),
            "dict": {"pooler_output": pooled[:, :, None, None], "last_hidden_state": None},
            "maps": [first, last],
            "features": Features(pooled, (first, last), logits),
            "scores": (logits, pooled),
            "strange": {"scores": logits, "features": pooled},
            "nothing": None,
            "integers": last.long(),
            "detached": pooled.detach(),
        }[self.form]


def encoder(form: str = "vector", dim: int = 16, seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(form, dim)


def torchvision_resnet(seed: int = 0) -> ResNet:
    """Of torchvision's class, but small."""
    torch.manual_seed(seed)
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)
