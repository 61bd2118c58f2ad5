"""Weight decay on matrices: no norms, biases, scales, position and class tokens."""

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)

from coss_hf.trainer.weight_decay import matrices

SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SQUARE = {"image_size": 16, "patch_size": 8}


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(4)
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 8))
        self.register_tokens = nn.Parameter(torch.zeros(2, 8))
        self.gamma = nn.Parameter(torch.ones(4, 1, 1))
        self.mlp_tokens = nn.Linear(4, 4)
        self.places = nn.Embedding(5, 8)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.attention = nn.MultiheadAttention(8, 2)
        self.mixing = nn.Parameter(torch.zeros(8, 8))
        # As LeViT, DETR and others call them.
        self.attention_biases = nn.Parameter(torch.zeros(2, 9))
        self.pos_bias = nn.Parameter(torch.zeros(2, 9))
        self.cls_embed = nn.Parameter(torch.zeros(2, 8))
        self.row_embed = nn.Parameter(torch.zeros(5, 8))


@pytest.mark.parametrize(
    "network",
    [
        lambda: ViTModel(ViTConfig(**SHAPE, **SQUARE)),
        lambda: CLIPVisionModel(CLIPVisionConfig(**SHAPE, **SQUARE)),
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SHAPE, **SQUARE)),
        lambda: SwinModel(
            SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[1], num_heads=[2], window_size=2)
        ),
        lambda: ConvNextModel(ConvNextConfig(hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1])),
    ],
)
def test_networks_of_transformers(network):
    model = network()
    decayed = set(matrices(model))
    layers = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and path
    }
    assert decayed == layers


def test_networks_of_timm():
    timm = pytest.importorskip("timm")
    decayed = matrices(timm.create_model("vit_tiny_patch16_224", depth=1))
    assert "blocks.0.attn.qkv.weight" in decayed and not {"cls_token", "pos_embed", "norm.weight"} & {*decayed}
    assert not [name for name in matrices(timm.create_model("resnet10t")) if ".bn" in name or name.endswith("bias")]


def test_a_module_of_ones_own():
    assert set(matrices(Own())) == {
        "mlp_tokens.weight",
        "depthwise.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "mixing",
    }
