"""The linear classifier that a teacher has on top of its embedding: in memory, or in its checkpoint."""

import copy
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from coss_hf.models.backbone import Backbone, evaluating
from coss_hf.models.loading import is_checkpoint, quiet_loading
from coss_hf.models.modules import ModuleNetwork
from coss_hf.utils.messages import first_line, get_logger

logger = get_logger(__name__)


@torch.no_grad()
def find_classifier(backbone: Backbone) -> nn.Linear | None:
    """The layer that computes a teacher's logits from ``backbone``'s embedding; None where there is none.

    It is accepted only if it gives the logits of the full classification network on random images, so that a classifier
    of other features (another pooling, class token and mean concatenated) is not taken for one of the embedding. A
    network in memory has the classifier that it carries, which may have been trained since, and never its checkpoint's.

    Raises:
        ValueError: a checkpoint that cannot be read.
    """
    if backbone.classifier is not None:
        return copy.deepcopy(backbone.classifier).cpu().float()
    if isinstance(backbone.model, ModuleNetwork):
        return _classifier_within(backbone, backbone.model)
    if backbone.checkpoint is None:
        return None if backbone.full is None else _classifier_within(backbone, _with_own_head(backbone))
    return _classifier_of_checkpoint(backbone)


def _classifier_of_checkpoint(backbone: Backbone) -> nn.Linear | None:
    try:
        with quiet_loading():
            network, info = AutoModelForImageClassification.from_pretrained(
                backbone.checkpoint, revision=backbone.revision, trust_remote_code=False, output_loading_info=True
            )
    except Exception as error:  # damaged files of every format
        no_such_head = isinstance(error, ValueError)  # of this kind of network, or by code of its own
        if no_such_head or not is_checkpoint(backbone.checkpoint, backbone.revision):
            return None
        raise ValueError(
            f"--teacher={backbone.name}: whether its checkpoint has a classifier cannot be read ({first_line(error)}); "
            f"give a complete checkpoint, or a method of embeddings (coss)."
        ) from error
    if info["missing_keys"]:
        return None
    first = next(backbone.model.parameters())
    return _classifier_within(backbone, network.to(first.device, first.dtype))


def _with_own_head(backbone: Backbone) -> nn.Module:
    """The network around the backbone, of which all but that is a copy in its place and precision.

    The teacher may have been moved since, and its network, classifier and all, is the user's.
    """
    network = copy.deepcopy(backbone.full, {id(backbone.model): backbone.model})
    first = next(backbone.model.parameters())
    shared = {id(tensor) for tensor in chain(backbone.model.parameters(), backbone.model.buffers())}
    for tensor in chain(network.parameters(), network.buffers()):
        if id(tensor) not in shared:
            tensor.data = tensor.data.to(first.device, first.dtype if tensor.is_floating_point() else None)
    return network


def _classifier_within(backbone: Backbone, network: nn.Module) -> nn.Linear | None:
    """A copy of the layer of ``network`` between ``backbone``'s embedding and its own logits, if it gives some.

    Both are in one place and precision, so that they round alike.
    """
    first = next(backbone.model.parameters())
    images = torch.randn(2, 3, *backbone.size, generator=torch.Generator().manual_seed(0)).to(first)
    options = {} if isinstance(network, ModuleNetwork) else backbone.options
    with evaluating(network), evaluating(backbone.model):
        try:
            logits = getattr(network(pixel_values=images, **options), "logits", None)
        except (TypeError, ValueError) as error:  # it reads text, too, or takes no such options
            logger.debug("no logits of %s: %s", type(network).__name__, error)
            return None
        embedding = backbone.features(images).embedding
    if not (isinstance(logits, Tensor) and logits.dim() == 2):
        return None
    layer = _layer_between(network, embedding, logits)
    return None if layer is None else copy.deepcopy(layer).cpu().float()


def _layer_between(network: nn.Module, embedding: Tensor, logits: Tensor) -> nn.Linear | None:
    for layer in reversed([module for module in network.modules() if isinstance(module, nn.Linear)]):
        if (layer.in_features, layer.out_features) == (embedding.shape[1], logits.shape[1]):
            found = layer(embedding.to(layer.weight)).to(logits)
            if torch.allclose(found, logits, rtol=1e-3, atol=1e-3):
                return layer
    return None
