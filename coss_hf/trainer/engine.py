"""Checks of the arguments of engines, channels-last memory, batch norm over all processes, and the precision."""

import os

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel, TrainingArguments

GRAPH_MODES = ("reduce-overhead", "max-autotune")  # of torch.compile, that record CUDA graphs


def check_engine(args: TrainingArguments) -> None:
    """Refuses settings under which a run would silently be another one, or leave no student.

    Raises:
        ValueError: several GPUs in one process, processes that do not know of each other, half precision or FSDP on a
            CPU (accelerate would compute in float32, or run DDP), FSDP with settings that do not work here, batch norm
            that cannot be synchronised, CUDA graphs with accumulated gradients.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process: to use them, start by `coss-hf distill --num_processes {args.n_gpu}`, "
            f"by `accelerate launch`, or in a notebook by accelerate's notebook_launcher; to use one, set "
            f"CUDA_VISIBLE_DEVICES=0."
        )
    on_cpu = args.device.type == "cpu"
    if on_cpu and args.mixed_precision == "fp16":
        raise ValueError(
            "--fp16: a CPU has no half precision, and would compute in float32; leave it out, or give --bf16."
        )
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


# ---- memory format, batch norm ----


def use_channels_last(network: PreTrainedModel) -> None:
    """Weights of ``network`` and whatever images it is given in channels-last memory."""
    network.to(memory_format=torch.channels_last)
    if _channels_last not in network._forward_pre_hooks.values():  # a network may be given to several trainers
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
    before = dict(student.named_modules())
    convert_sync_batchnorm(student)
    for name, module in student.named_modules():
        if before.get(name) not in (None, module):
            # What `to` puts into these dictionaries reaches a module of the caller that shares them, too.
            module.__dict__.update(_parameters=before[name]._parameters, _buffers=before[name]._buffers)
    nn.SyncBatchNorm.convert_sync_batchnorm(criterion)


def use_precision(args: TrainingArguments) -> None:
    """Let a trainer compute in its own precision, whatever another trainer of this process computes in.

    accelerate keeps one for the process: it refuses a second one, and an earlier trainer would continue in that of a
    later one. DeepSpeed and FSDP, which keep more there, are left alone.

    Args:
        args: arguments of the trainer.
    """
    if not AcceleratorState._shared_state:
        return
    state = AcceleratorState()
    engines = (DistributedType.DEEPSPEED, DistributedType.FSDP)
    if state.mixed_precision != args.mixed_precision and state.distributed_type not in engines:
        compiler = state.dynamo_plugin  # resetting loses it
        AcceleratorState._reset_state()
        AcceleratorState(args.mixed_precision, cpu=args.use_cpu, dynamo_plugin=compiler, _from_accelerator=True)
