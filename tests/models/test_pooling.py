"""Pooling, against sums written out."""

import pytest
import torch
from transformers import SamVisionConfig, SamVisionModel, ViTMAEConfig, ViTMAEModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from coss_hf.features import Features
from coss_hf.models.backbone import Backbone
from coss_hf.models.pooling import Layout, pool

TOKENS = torch.arange(2 * 5 * 3.0).reshape(2, 5, 3) ** 1.5
MAP = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5) ** 1.5


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_tokens(prefix):
    output = BaseModelOutputWithPooling(last_hidden_state=TOKENS)
    for pooling in ("mean", "gap"):
        expected = sum(TOKENS[:, i] for i in range(prefix, 5)) / (5 - prefix)
        torch.testing.assert_close(pool(output, pooling, Layout(tokens=True, prefix=prefix)), expected)
    assert torch.equal(pool(output, "cls", Layout(tokens=True, prefix=prefix)), TOKENS[:, 0])


def test_maps():
    expected = sum(MAP[:, :, i, j] for i in range(4) for j in range(5)) / 20
    for pooling in ("mean", "gap"):
        first = pool(BaseModelOutputWithPooling(last_hidden_state=MAP), pooling, Layout(tokens=False))
        last = BaseModelOutputWithPooling(last_hidden_state=MAP.permute(0, 2, 3, 1))
        torch.testing.assert_close(first, expected)
        torch.testing.assert_close(pool(last, pooling, Layout(tokens=False, channels_last=True)), expected)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1, 1)])
def test_pooler(shape):
    output = BaseModelOutputWithPooling(last_hidden_state=MAP, pooler_output=torch.arange(6.0).reshape(shape))
    assert torch.equal(pool(output, "pooler", Layout(tokens=False)), torch.arange(6.0).reshape(2, 3))


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


@torch.no_grad()
def test_maps_of_layers_that_keep_channels_last():
    """All but the last had their rows for channels."""
    config = SamVisionConfig(**SMALL, mlp_dim=16, output_channels=8, window_size=2, global_attn_indexes=[1])
    model = SamVisionModel(config).eval()
    pixels = torch.randn(2, 3, 32, 32)
    backbone = Backbone(model, None, size=32)
    maps = backbone.example(maps=True).maps
    assert [tuple(one.shape) for one in maps] == [*[(2, 16, 4, 4)] * (len(maps) - 1), (2, 8, 4, 4)]
    backbone.maps = len(maps)
    first = model(pixel_values=pixels, output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(backbone.features(pixels).maps[0], first.permute(0, 3, 1, 2))


@torch.no_grad()
def test_maps_of_a_masked_autoencoder_have_their_patches_in_order():
    """It shuffles them also where none is hidden: each forward pass gave another permutation."""
    torch.manual_seed(0)
    model = ViTMAEModel(ViTMAEConfig(**SMALL, intermediate_size=16, mask_ratio=0.0)).eval()
    backbone = Backbone(model, None, size=32)
    backbone.maps = 1
    pixels = torch.randn(2, 3, 32, 32)
    found = backbone.features(pixels).maps[0]
    shuffled = model(pixel_values=pixels)
    restore = shuffled.ids_restore[:, :, None].expand(-1, -1, 16)
    expected = shuffled.last_hidden_state[:, 1:].gather(1, restore).transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(found, expected)


def test_features_have_no_maps_or_logits_unless_given():
    features = Features(TOKENS)
    assert features.maps == () and features.logits is None
