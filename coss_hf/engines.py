"""What engines ask of the networks: FSDP2's shards, channels-last memory, batch norm over all processes."""

import copy
import os

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel, TrainingArguments

from coss_hf.distributed import world_size

GRAPH_MODES = ("reduce-overhead", "max-autotune")  # of torch.compile, that record CUDA graphs


def check_engine(args: TrainingArguments) -> None:
    """Refuses settings under which a run would silently be another one, or leave no student.

    Raises:
        ValueError: several GPUs in one process, processes that do not know of each other, FSDP on a CPU (accelerate
            would run DDP) or with settings that do not work here, batch norm that cannot be synchronised, CUDA graphs
            with accumulated gradients.
    """
    if args.n_gpu > 1:
        raise ValueError(f"{args.n_gpu} GPUs in one process: start with `accelerate launch` to use them.")
    on_cpu = args.device.type == "cpu"
    if args.sync_batch_norm and on_cpu:
        raise ValueError("--sync_batch_norm: PyTorch synchronises batch norm on GPUs only; leave it out on a CPU.")
    fsdp = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if fsdp and on_cpu:
        raise ValueError(
            f"FSDP was asked for, but {'--use_cpu is set' if args.use_cpu else 'there is no GPU'}, where it would "
            f"silently not be used: launch with accelerate_configs/cpu.yaml instead."
        )
    check_processes(args)
    check_graphs(args)
    if not fsdp:
        return
    if args.channels_last:
        raise ValueError("--channels_last: FSDP cannot shard such weights; leave one of them out.")
    plugin = FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))
    for name, value, needed in (
        ("fsdp_version", plugin.fsdp_version, 2),
        ("fsdp_state_dict_type", plugin.state_dict_type.name, "FULL_STATE_DICT"),
        ("fsdp_cpu_ram_efficient_loading", plugin.cpu_ram_efficient_loading, False),  # leaves teachers empty
    ):
        if value != needed:
            raise ValueError(f"{name}={value} does not work here: use {needed}, as in accelerate_configs/fsdp.yaml.")


def check_graphs(args: TrainingArguments) -> None:
    """Refuses CUDA graphs where gradients are accumulated.

    Raises:
        ValueError: both.
    """
    graphs = args.torch_compile_mode in GRAPH_MODES or args.torch_compile_backend == "cudagraphs"
    if graphs and args.gradient_accumulation_steps > 1:
        raise ValueError(
            f"--torch_compile_mode={args.torch_compile_mode}, --torch_compile_backend={args.torch_compile_backend}: "
            f"CUDA graphs write all gradients into the same memory, where --gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps} adds them up; leave one of them out."
        )


def check_processes(args: TrainingArguments) -> None:
    """Refuses processes that do not know of each other.

    Raises:
        ValueError: more were launched than Trainer sees.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes != args.world_size:
        raise ValueError(
            f"{processes} processes were launched, but each would train alone and write the same folder; on a CPU add "
            f"--use_cpu."
        )


# ---- FSDP ----


def name_blocks(model: nn.Module, student: PreTrainedModel) -> None:
    """Tells accelerate's transformer-based wrapping which blocks ``student`` has; without any it is one shard group."""
    present = {type(module).__name__ for module in student.modules()}
    model._no_split_modules = sorted(present & set(student._no_split_modules or ()))


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds a part of the parameters of ``model`` only, as FSDP2 spreads them."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def gather(model: nn.Module, whole: nn.Module) -> None:
    """Copies sharded ``model`` into ``whole``, the same network with ordinary parameters; all processes must call."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))


def load_weights(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """``load_state_dict``, strict, of whole tensors into a module that may be sharded."""
    if not is_sharded(module):
        module.load_state_dict(state, strict=True)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(module, state, options=StateDictOptions(full_state_dict=True, strict=True))


def same_buffers(model: nn.Module) -> None:
    """Gives every process the first one's buffers: batch-norm statistics are each process's own, that of its images."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def standby(model: nn.Module) -> nn.Module:
    """A copy of ``model`` to ``gather`` into."""
    return copy.deepcopy(model).requires_grad_(False)


# ---- memory format, batch norm ----


def use_channels_last(network: PreTrainedModel) -> None:
    """Weights of ``network`` and whatever images it is given in channels-last memory."""
    network.to(memory_format=torch.channels_last)
    network.register_forward_pre_hook(_channels_last, with_kwargs=True)


def _channels_last(network, args, kwargs):
    return args, kwargs | {"pixel_values": kwargs["pixel_values"].contiguous(memory_format=torch.channels_last)}


def synchronise_batch_norm(student: PreTrainedModel, criterion: nn.Module) -> None:
    """Batch statistics of student and loss over all processes, in place; parameters, their names and the configuration
    stay.

    Raises:
        ValueError: a network without batch norm, or one whose batch norm does more than that.
    """
    norms = [module for module in student.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        raise ValueError(f"--sync_batch_norm: the student ({type(student).__name__}) has no batch norm; leave it out.")
    if student.config.model_type == "timm_wrapper":
        from timm.layers import convert_sync_batchnorm  # knows timm's layers that are batch norm and activation
    else:
        other = {type(m).__name__ for m in norms} - {"BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"}
        if other:
            raise ValueError(f"--sync_batch_norm cannot convert {', '.join(sorted(other))}; leave it out.")
        convert_sync_batchnorm = nn.SyncBatchNorm.convert_sync_batchnorm
    convert_sync_batchnorm(student)
    nn.SyncBatchNorm.convert_sync_batchnorm(criterion)
