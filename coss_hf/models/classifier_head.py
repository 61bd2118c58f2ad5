"""The linear classifier that a teacher's checkpoint has on top of its embedding."""

import copy

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from coss_hf.models.backbone import Backbone, evaluating
from coss_hf.models.loading import is_checkpoint, quiet_loading
from coss_hf.models.modules import ModuleNetwork
from coss_hf.utils.messages import first_line


@torch.no_grad()
def find_classifier(backbone: Backbone) -> nn.Linear | None:
    """The layer that computes the checkpoint's logits from ``backbone``'s embedding; None where there is none.

    It is accepted only if it gives the logits of the full classification network on random images, so that a classifier
    of other features (another pooling, class token and mean concatenated) is not taken for one of the embedding.
    """
    if backbone.classifier is not None:
        return copy.deepcopy(backbone.classifier).cpu().float()
    if isinstance(backbone.model, ModuleNetwork):
        return _classifier_inside(backbone)
    revision = getattr(backbone.model.config, "_commit_hash", None)
    try:
        with quiet_loading():
            network, info = AutoModelForImageClassification.from_pretrained(
                backbone.name, revision=revision, trust_remote_code=False, output_loading_info=True
            )
    except Exception as error:  # damaged files of every format
        no_such_head = isinstance(error, ValueError)  # of this kind of network, or by code of its own
        if no_such_head or not is_checkpoint(backbone.name):
            return None
        raise ValueError(
            f"--teacher={backbone.name}: whether its checkpoint has a classifier cannot be read ({first_line(error)}); "
            f"give a complete checkpoint, or a method of embeddings (coss)."
        ) from error
    if info["missing_keys"]:
        return None
    # In one place and precision, so that both round alike.
    first = next(backbone.model.parameters())
    network.eval().to(first.device, first.dtype)
    images = torch.randn(2, 3, *backbone.size, generator=torch.Generator().manual_seed(0)).to(first)
    expected = network(pixel_values=images, **backbone.options).logits
    with evaluating(backbone.model):
        embedding = backbone.features(images).embedding
    layer = _layer_between(network, embedding, expected)
    return None if layer is None else layer.cpu().float()


def _layer_between(network: nn.Module, embedding: Tensor, logits: Tensor) -> nn.Linear | None:
    for layer in reversed([module for module in network.modules() if isinstance(module, nn.Linear)]):
        if (layer.in_features, layer.out_features) == (embedding.shape[1], logits.shape[1]):
            if torch.allclose(layer(embedding), logits, rtol=1e-3, atol=1e-3):
                return layer
    return None


def _classifier_inside(backbone: Backbone) -> nn.Linear | None:
    """The layer of a plain module between its embedding and the logits that it gives, where it gives some."""
    network = backbone.model
    first = next(network.parameters())
    images = torch.randn(2, 3, *backbone.size, generator=torch.Generator().manual_seed(0)).to(first)
    with evaluating(network):
        logits = network(images).logits
        if logits is None:
            return None
        layer = _layer_between(network, backbone.features(images).embedding, logits)
    return None if layer is None else copy.deepcopy(layer).cpu().float()
