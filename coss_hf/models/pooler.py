"""The pooler of a network whose embedding does not read it: what ``pooler_output`` of the saved student is.

``AutoModel`` builds the pooler of ViT, BEiT, YOLOS and others whether the checkpoint has one or not. An embedding of
the class token or of the patches never trains it, and what an untrained pooler returns looks like an embedding, and is
noise.
"""

import copy
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coss_hf.models.backbone import Backbone, evaluating
from coss_hf.models.modules import ModuleNetwork
from coss_hf.models.pooling import pool
from coss_hf.utils.messages import get_logger
from coss_hf.utils.vectors import l2_normalize

logger = get_logger(__name__)

MIN_COSINE = 0.9999
TIMM = "timm_wrapper"
FIRST_TIMM = "1.0.16"  # that loads a folder: local-dir


class PoolerOutput(Enum):
    """What ``pooler_output`` of a saved student is: the embedding, zeros, nothing, or a vector of another meaning."""

    EMBEDDING = "the embedding"
    ZEROS = "zeros"
    ABSENT = "nothing"
    ANOTHER = "another vector"


def settled(student: Backbone, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict]:
    """What is saved of a student so that no untrained pooler is; the network itself, which may be shared, stays.

    Where the embedding is the class token, a pooler that is one layer on it becomes the identity, if the configuration
    names its activation (``pooler_act`` of ViT, DeiT and DPT). The wrapper of timm leaves a pooler out
    (``do_pooling``). The weights of any other pooler that was not trained become zero, and so does what it gives. A
    pooler with weights of a checkpoint, or with nothing but a norm, is left as it is.

    Args:
        student: whose pooling decides.
        state: state dict of its network; not changed.

    Returns:
        The state dict to save, and the entries of ``config.json`` that differ from the network's configuration.
    """
    network = student.model
    if isinstance(network, ModuleNetwork) or student.pooling == "pooler":
        return state, {}
    if network.config.model_type == TIMM:
        return state, {} if pooler_output(student) is PoolerOutput.EMBEDDING else {"do_pooling": False}
    pooler = _pooler(student)
    if not pooler.identity and not pooler.is_untrained:
        return state, {}
    for name, value in pooler.parameters.items():
        zeros = torch.zeros_like(state[name]) if name in state else torch.zeros(value.shape, dtype=network.dtype)
        state = state | {name: zeros}
    if not pooler.identity:
        return state, {}
    entries = {"pooler_act": "linear"}
    if hasattr(network.config, "pooler_output_size"):  # another width than the tokens' can be left from other settings
        entries["pooler_output_size"] = student.dim
    for name in pooler.parameters:
        zeros = state[name].new_zeros(student.dim, *state[name].shape[1:])
        state[name] = zeros.fill_diagonal_(1) if name == pooler.identity else zeros
    return state, entries


class _Pooler(NamedTuple):
    """Parameters of a pooler that the embedding does not read, in the network that ``AutoModel`` builds.

    ``identity`` is the name of the weight that can be the identity on the class token; empty where there is none.
    """

    parameters: dict[str, nn.Parameter]
    is_untrained: bool
    identity: str


def _pooler(student: Backbone) -> _Pooler:
    network = student.model
    names = student.pooler_alone
    is_untrained = student.pooler_untrained
    if not student.layout.pooled:  # taken out of a classifier, which leaves the pooler of its backbone out
        network = _as_built(network)
        # Layers that are missing within the other parts were taken out of them, and are no pooler.
        left_out = [part for part, _ in network.named_children() if getattr(student.model, part, None) is None]
        names = {name for name, _ in network.named_parameters() if name.partition(".")[0] in left_out}
    parameters = {name: value for name, value in network.named_parameters() if name in names}
    if not student.layout.pooled:
        is_untrained = any(value.dim() > 1 for value in parameters.values())
    return _Pooler(parameters, is_untrained, _identity_layer(network, names) if student.pooling == "cls" else "")


def _as_built(network: PreTrainedModel) -> PreTrainedModel:
    """The network as its configuration alone builds it, without storage; itself where its code does not allow that."""
    try:
        with torch.device("meta"):
            return type(network)._from_config(copy.deepcopy(network.config))
    except Exception as error:  # code of any origin may refuse the meta device in any way
        logger.debug("no meta twin of %s: %s", type(network).__name__, error)
        return network


def _identity_layer(network: nn.Module, pooler: set[str]) -> str:
    """Name of the weight of a layer that is all of the pooler, if the configuration names its activation."""
    for name, module in network.named_modules() if hasattr(network.config, "pooler_act") else ():
        layer = getattr(module, "dense", None)
        own = {f"{name}.{key}" for key, _ in module.named_parameters()}
        is_fit = isinstance(layer, nn.Linear) and (
            layer.in_features == layer.out_features or hasattr(network.config, "pooler_output_size")
        )
        if is_fit and own and own == pooler and hasattr(module, "activation"):
            return f"{name}.dense.weight"
    return ""


def pooler_output(student: Backbone) -> PoolerOutput:
    """What ``pooler_output`` is once the student is saved, as Transformers' pipeline and others read it.

    It is found once: a network that is sharded later cannot be run by the one process that saves it.
    """
    if student.pooler_output is None:
        student.pooler_output = _found_output(student)
    return student.pooler_output


@torch.no_grad()
def _found_output(student: Backbone) -> PoolerOutput:
    if isinstance(student.model, ModuleNetwork) or student.layout.pooled not in ("pooler_output", ""):
        return PoolerOutput.ABSENT
    if student.pooling == "pooler":
        return PoolerOutput.EMBEDDING
    pooler = _pooler(student)
    if pooler.identity:
        return PoolerOutput.EMBEDDING
    if not pooler.parameters.keys() <= dict(_as_built(student.model).named_parameters()).keys():
        return PoolerOutput.ABSENT  # a classifier's backbone has one, and what AutoModel builds has none
    if pooler.is_untrained:
        return PoolerOutput.ABSENT if student.model.config.model_type == TIMM else PoolerOutput.ZEROS
    if not student.layout.pooled:
        return PoolerOutput.ANOTHER if pooler.parameters else PoolerOutput.ABSENT
    first = next(student.model.parameters())
    noise = torch.randn(2, 3, *student.size, generator=torch.Generator().manual_seed(0))
    with evaluating(student.model):
        output = student.model(pixel_values=noise.to(first.device, first.dtype), **student.options)
    pooled = output.pooler_output.flatten(1).float()
    embedding = pool(output, student.pooling, student.layout).float()
    if pooled.shape == embedding.shape:
        if ((l2_normalize(pooled) * l2_normalize(embedding)).sum(1) >= MIN_COSINE).all():
            return PoolerOutput.EMBEDDING
    # Its configuration can leave timm's pooling out.
    return PoolerOutput.ABSENT if student.model.config.model_type == TIMM else PoolerOutput.ANOTHER


def pooler_is_embedding(student: Backbone) -> bool:
    """Whether ``pooler_output`` of the saved student is its embedding."""
    return pooler_output(student) is PoolerOutput.EMBEDDING
