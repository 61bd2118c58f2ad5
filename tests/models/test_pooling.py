"""Pooling, against sums written out."""

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from coss_hf.features import Features
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


def test_features_have_no_maps_or_logits_unless_given():
    features = Features(TOKENS)
    assert features.maps == () and features.logits is None
