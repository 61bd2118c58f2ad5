"""The family of a network, and whether it was trained, whoever built it."""

import pytest
import torch
import torchvision
from torch import nn
from transformers import (
    BeitConfig,
    BeitModel,
    BitConfig,
    BitModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    CvtConfig,
    CvtModel,
    Dinov2Config,
    Dinov2Model,
    EfficientNetConfig,
    EfficientNetModel,
    HieraConfig,
    HieraModel,
    LevitConfig,
    LevitModel,
    MobileNetV2Config,
    MobileNetV2Model,
    MobileViTConfig,
    MobileViTModel,
    PoolFormerConfig,
    PoolFormerModel,
    PvtV2Config,
    PvtV2Model,
    RegNetConfig,
    RegNetModel,
    ResNetConfig,
    ResNetModel,
    SegformerConfig,
    SegformerModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)

from coss_hf.models.architecture import BATCH_NORM, LAYER_NORM, TRANSFORMER, family, is_trained
from tests.helpers.modules import Encoder

OF_TRANSFORMERS = {
    TRANSFORMER: [
        (BeitModel, BeitConfig),
        (CLIPVisionModel, CLIPVisionConfig),
        (CvtModel, CvtConfig),
        (Dinov2Model, Dinov2Config),
        (HieraModel, HieraConfig),
        (LevitModel, LevitConfig),
        (MobileViTModel, MobileViTConfig),
        (PvtV2Model, PvtV2Config),
        (SegformerModel, SegformerConfig),
        (SiglipVisionModel, SiglipVisionConfig),
        (SwinModel, SwinConfig),
        (ViTModel, ViTConfig),
    ],
    BATCH_NORM: [
        (EfficientNetModel, EfficientNetConfig),
        (MobileNetV2Model, MobileNetV2Config),
        (RegNetModel, RegNetConfig),
        (ResNetModel, ResNetConfig),
    ],
    LAYER_NORM: [(BitModel, BitConfig), (ConvNextModel, ConvNextConfig), (PoolFormerModel, PoolFormerConfig)],
}
OF_TIMM = {
    TRANSFORMER: [
        "vit_tiny_patch16_224",
        "deit_tiny_patch16_224",
        "swin_tiny_patch4_window7_224",
        "eva02_tiny_patch14_224",
    ],
    # Squeeze-and-excite, split attention and a pool with attention do not make a network a transformer.
    BATCH_NORM: [
        "resnet10t",
        "seresnet18",
        "resnest14d",
        "resnet50_clip",
        "resnext50_32x4d",
        "repvgg_a0",
        "vgg11_bn",
        "mobilenetv3_small_100",
        "mobilenetv4_conv_small",
        "efficientnet_lite0",
        "mnasnet_100",
        "tinynet_e",
        "ghostnet_100",
    ],
    LAYER_NORM: ["convnext_atto", "nf_resnet26", "mixer_s32_224"],
}
OF_TORCHVISION = {
    TRANSFORMER: ["vit_b_32", "swin_t", "maxvit_t"],
    BATCH_NORM: ["resnet18", "mobilenet_v3_small", "efficientnet_b0", "densenet121", "shufflenet_v2_x0_5", "vgg11_bn"],
    LAYER_NORM: ["convnext_tiny", "vgg11"],
}


def cases(by_family: dict) -> list[tuple]:
    return [(expected, one) for expected, found in by_family.items() for one in found]


def on_meta(build) -> nn.Module:
    with torch.device("meta"):
        return build()


@pytest.mark.parametrize(
    ("expected", "network"), cases(OF_TRANSFORMERS), ids=lambda one: getattr(one, "__name__", None)
)
def test_networks_of_transformers(expected, network):
    kind, config = network
    assert family(on_meta(lambda: kind(config()))) == expected


@pytest.mark.parametrize(("expected", "name"), cases(OF_TIMM))
def test_networks_of_timm(expected, name):
    timm = pytest.importorskip("timm")
    assert family(on_meta(lambda: timm.create_model(name))) == expected


@pytest.mark.parametrize(("expected", "name"), cases(OF_TORCHVISION))
def test_networks_of_torchvision(expected, name):
    # Some draw their weights by numbers that meta tensors do not have.
    assert (
        family(
            torchvision.models.get_model(name)
            if name == "maxvit_t"
            else on_meta(lambda: torchvision.models.get_model(name))
        )
        == expected
    )


class OwnAttention(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.to_q = nn.Linear(dim, dim)
        self.to_kv = nn.Linear(dim, 2 * dim)


class FrozenBatchNorm(nn.Module):
    """As detectors have: no subclass of PyTorch's."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))


@pytest.mark.parametrize(
    ("expected", "network"),
    [
        (TRANSFORMER, nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, batch_first=True), 2)),
        (TRANSFORMER, nn.Sequential(nn.Conv2d(3, 16, 8, 8), OwnAttention(16), nn.LayerNorm(16))),
        (BATCH_NORM, Encoder()),
        (BATCH_NORM, nn.Sequential(nn.Conv2d(3, 8, 3), FrozenBatchNorm(8))),
        (BATCH_NORM, nn.Sequential(nn.Conv2d(3, 8, 3), nn.SyncBatchNorm(8), nn.Flatten(), nn.LayerNorm(4))),
        (LAYER_NORM, nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(4))),
        (LAYER_NORM, nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Linear(8, 2))),
        (LAYER_NORM, nn.Sequential(nn.Conv2d(3, 8, 3), nn.RMSNorm(8))),
    ],
)
def test_modules_of_ones_own(expected, network):
    assert family(network) == expected


def small(kind: str) -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    builders = {
        "vit": lambda: ViTModel(ViTConfig(image_size=16, patch_size=8, **shape)),
        "resnet": lambda: ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1])),
        "convnext": lambda: ConvNextModel(ConvNextConfig(hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1])),
        "zero scales": lambda: torchvision.models.ResNet(
            torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], zero_init_residual=True
        ),
        "module": Encoder,
    }
    return builders[kind]()


@pytest.mark.parametrize("kind", ["vit", "resnet", "convnext", "zero scales", "module"])
def test_a_step_of_training_tells_trained_weights_from_random_ones(kind):
    """Names tell nothing: a configuration has that of the checkpoint it was read from."""
    network = small(kind)
    assert not is_trained(network)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    size = 32 if kind in ("convnext", "zero scales", "resnet") else 16
    found = network(torch.randn(2, 3, size, size))
    found = getattr(found, "last_hidden_state", found)
    (found * torch.randn_like(found)).sum().backward()
    optimizer.step()
    assert is_trained(network)


def test_timm_networks_at_random_weights():
    timm = pytest.importorskip("timm")
    for name in ("resnet10t", "convnext_atto", "mobilenetv3_small_050", "vit_tiny_patch16_224"):
        assert not is_trained(timm.create_model(name)), name


def test_scales_that_were_drawn_are_not_trained():
    """Some networks draw the scales of their norms around 1; a batch norm that has seen images has a mean."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    nn.init.normal_(network[1].weight, 1.0, 0.02)
    assert not is_trained(network)
    network(torch.randn(2, 3, 8, 8))
    assert is_trained(network)


@pytest.mark.parametrize("norm", [nn.Identity(), nn.GroupNorm(2, 8, affine=False)])
@pytest.mark.parametrize("drawn", ["by PyTorch", "zero biases", "a prior in the last bias"])
def test_biases_tell_where_there_are_no_norms(drawn, norm):
    """The published weights of VGG counted as random: their rate was five times too large."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 4))
    if drawn == "zero biases":
        for layer in (network[0], network[-1]):
            nn.init.zeros_(layer.bias)
    if drawn == "a prior in the last bias":  # as detectors do
        nn.init.constant_(network[-1].bias, -4.6)
    assert not is_trained(network)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(5):
        optimizer.zero_grad()
        found = network(torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
        (found - torch.tensor([1.0, 0.0, -1.0, 2.0])).square().sum(1).mean().backward()
        optimizer.step()
    assert is_trained(network)


def test_networks_without_norms_and_biases_count_as_random():
    assert not is_trained(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU()))


def test_networks_without_norms_at_random_weights():
    timm = pytest.importorskip("timm")
    torchvision = pytest.importorskip("torchvision")
    assert not is_trained(torchvision.models.squeezenet1_1())
    assert not is_trained(timm.create_model("nf_resnet26"))


def draw_biases(network: nn.Module) -> None:
    """As training leaves them, larger than PyTorch draws them."""
    torch.manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is not None:
            nn.init.normal_(layer.bias)


@pytest.mark.parametrize("skipinit", [False, True])
def test_blocks_named_after_norms_do_not_hide_trained_biases(skipinit):
    """`dm_nfnet_f0` counted as random: its NormFreeBlock, which has a gain of its own, was taken for a norm."""
    nfnet = pytest.importorskip("timm.models.nfnet")
    config = nfnet.NfCfg(depths=(1, 1), channels=(16, 16), stem_chs=8, skipinit=skipinit)
    network = nfnet.NormFreeNet(config)
    assert not is_trained(network) and family(network) == LAYER_NORM
    draw_biases(network)
    assert is_trained(network)


class BatchNormBlock(nn.Module):
    """A block with a gain of its own."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        self.convolution = nn.Conv2d(3, 8, 3)


class NormConv2d(nn.Conv2d):
    """With normalised weights."""


class OwnNorm(nn.Module):
    """A norm whose parameters have other names."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))


@pytest.mark.parametrize(
    "layer", [BatchNormBlock(), NormConv2d(3, 8, 3), nn.Sequential(nn.Conv2d(3, 8, 3), OwnNorm(8))]
)
def test_layers_and_blocks_are_no_norms_whatever_their_name(layer):
    network = nn.Sequential(layer, nn.ReLU())
    assert not is_trained(network) and family(network) == LAYER_NORM
    draw_biases(network)
    assert is_trained(network)


@pytest.mark.parametrize("name", ["BatchNormAct2d", "FrozenBatchNormAct2d", "GroupNormAct", "FilterResponseNormAct2d"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.PReLU])
def test_norms_with_an_activation_inside_are_norms(name, activation):
    layers = pytest.importorskip("timm.layers")
    options = {"num_groups": 2} if name == "GroupNormAct" else {}
    norm = getattr(layers, name)(8, act_layer=activation, **options)
    assert [*norm.children()]
    network = nn.Sequential(nn.Conv2d(3, 8, 3), norm)
    assert family(network) == (BATCH_NORM if "Batch" in name else LAYER_NORM)
    nn.init.constant_(network[0].bias, 7.0)
    network[0].bias.data[0] = -7.0
    assert not is_trained(network), "its norm is as it was made"
    norm.bias.data[0] = 1.0
    if "Batch" in name:
        norm.running_mean[0] = 1.0
    assert is_trained(network)
