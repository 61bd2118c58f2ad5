"""FSDP2: networks whose parameters are spread over processes."""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from coss_hf.utils.distributed import world_size


def name_blocks(model: nn.Module, student: PreTrainedModel) -> None:
    """Tells accelerate's transformer-based wrapping which blocks ``student`` has; without any it is one shard group."""
    present = {type(module).__name__ for module in student.modules()}
    model._no_split_modules = sorted(present & set(student._no_split_modules or ()))


def unshare(network: nn.Module) -> None:
    """Let a network keep its tensors in dictionaries of its own: FSDP puts shards there, which are nothing for a module
    of the caller that shares them (``copy_sharing_tensors``).
    """
    for module in network.modules():
        module._parameters = module._parameters.copy()
        module._buffers = module._buffers.copy()


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds a part of the parameters of ``model`` only, as FSDP2 spreads them."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def gather(model: nn.Module, unsharded: nn.Module) -> None:
    """Copy sharded ``model`` into ``unsharded``, the same network with ordinary parameters; all processes must call."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    unsharded.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))


def load_weights(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """``load_state_dict``, strict, of unsharded tensors into a module that may be sharded."""
    if not is_sharded(module):
        module.load_state_dict(state, strict=True)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(module, state, options=StateDictOptions(full_state_dict=True, strict=True))


def broadcast_buffers(model: nn.Module) -> None:
    """Gives every process the first one's buffers: batch-norm statistics are each process's own, that of its images."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def unsharded_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` to ``gather`` into."""
    return copy.deepcopy(model).requires_grad_(False)
