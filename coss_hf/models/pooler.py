"""The pooler of a network whose embedding does not read it: what ``pooler_output`` of the saved student is.

``AutoModel`` builds the pooler of ViT, BEiT, YOLOS and others whether the checkpoint has one or not. An embedding of
the class token or of the patches never trains it, and what an untrained pooler returns looks like an embedding, and is
noise.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from coss_hf.models.backbone import Backbone, evaluating
from coss_hf.models.modules import ModuleNetwork
from coss_hf.models.pooling import pool
from coss_hf.utils.vectors import l2_normalize

MIN_COSINE = 0.9999
TIMM = "timm_wrapper"


def settle_pooler(network: PreTrainedModel | ModuleNetwork, student: Backbone) -> None:
    """Leave no untrained pooler in a network: its ``pooler_output`` is the embedding, or zeros, or nothing.

    Where the embedding is the class token, a pooler that is one layer on it becomes the identity, if the configuration
    names its activation (``pooler_act`` of ViT, DeiT and DPT). The wrapper of timm leaves a pooler out
    (``do_pooling``). All other poolers that the embedding does not read get weights of zero, and so is what they give.
    The embedding does not change, and a second call changes nothing.

    Args:
        network: of the student, or another of its architecture; changed in place.
        student: whose pooling decides.
    """
    if isinstance(network, ModuleNetwork) or student.pooling == "pooler" or not student.layout.pooled:
        return
    if network.config.model_type == TIMM:
        if not pooler_is_embedding(student):
            network.config.do_pooling = False
        return
    untrained = {name: value for name, value in network.named_parameters() if name in student.pooler_alone}
    with torch.no_grad():
        layer = _identity_layer(network, untrained) if student.pooling == "cls" else None
        for parameter in untrained.values():
            parameter.zero_()
        if layer is not None:
            layer.weight.copy_(torch.eye(len(layer.weight), dtype=layer.weight.dtype))


def _identity_layer(network: PreTrainedModel, untrained: dict[str, Tensor]) -> nn.Linear | None:
    """The layer of a pooler that can be the identity, its activation switched off; None where there is none."""
    if not hasattr(network.config, "pooler_act"):
        return None
    for name, module in network.named_modules():
        layer = getattr(module, "dense", None)
        own = {f"{name}.{key}" for key, _ in module.named_parameters()}
        is_square = isinstance(layer, nn.Linear) and layer.in_features == layer.out_features
        if is_square and own and own == untrained.keys() and hasattr(module, "activation"):
            network.config.pooler_act = "linear"
            module.activation = ACT2FN["linear"]
            return layer
    return None


@torch.no_grad()
def pooler_is_embedding(student: Backbone) -> bool:
    """Whether ``pooler_output``, as Transformers' pipeline and others read it, is the student's embedding."""
    if isinstance(student.model, ModuleNetwork):
        return False
    first = next(student.model.parameters())
    noise = torch.randn(2, 3, *student.size, generator=torch.Generator().manual_seed(0))
    with evaluating(student.model):
        output = student.model(pixel_values=noise.to(first.device, first.dtype), **student.options)
    pooled = getattr(output, "pooler_output", None)
    embedding = pool(output, student.pooling, student.layout)
    if pooled is None or pooled.flatten(1).shape != embedding.shape:
        return False
    cosines = (l2_normalize(pooled.flatten(1).float()) * l2_normalize(embedding.float())).sum(1)
    return bool((cosines >= MIN_COSINE).all())
