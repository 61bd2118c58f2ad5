"""One of two gloo processes: DDP, then FSDP2 forced on the CPU, then FSDP2 resumed; what was found goes to files.

python -m torch.distributed.run --nproc_per_node 2 tests/fsdp_script.py FOLDER, with images, teacher, vit, resnet in it
"""

import sys
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import tests.helpers.runs as h
from coss_hf.data.loading import load_images
from coss_hf.evaluation.evaluator import Evaluator

OPTIONS = {
    "max_steps": 5,
    "logging_steps": 1,
    "learning_rate": 0.002,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": None,
    "head_hidden_size": 12,
}
# As accelerate_configs/fsdp.yaml.
PLUGIN = {
    "fsdp_version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "state_dict_type": "FULL_STATE_DICT",
    "cpu_ram_efficient_loading": False,
    "reshard_after_forward": True,
}
_init = AcceleratorState.__init__


def fsdp_init(self, *args, **kwargs):
    """accelerate enables FSDP on accelerators only: sets on the CPU what it sets there."""
    first = AcceleratorState._shared_state == {}
    _init(self, *args, **kwargs)
    if first:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = FullyShardedDataParallelPlugin(**PLUGIN)
        PartialState._shared_state["distributed_type"] = self.distributed_type


class Kinds(TrainerCallback):
    """What the parameters are while training."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # gloo of torch 2.8 gives the sum where FSDP asks for the mean; on GPUs NCCL knows both.
                module.set_force_sum_reduction_for_comms(True)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.found = sorted({type(parameter).__name__ for parameter in model.parameters()})
        self.shards = sorted(type(m).__name__ for m in model.modules() if type(m).__name__.startswith("FSDP"))


def run(folder: Path, name: str, student: str, checkpoint=None, **options) -> dict:
    """One training run in ``folder / name``."""
    AcceleratorState._reset_state(reset_partial_state=True)

    def evaluator(splits, teacher):
        test_images = load_images(str(folder / "images")).test
        return Evaluator(teacher, test_images, splits.image_column, label_column="label", train_images=splits.train)

    options = OPTIONS | {"output_dir": str(folder / name), "eval_strategy": "steps", "eval_steps": 2} | options
    options |= {"per_device_train_batch_size": 8 // torch.distributed.get_world_size()}
    networks = str(folder / "teacher"), str(folder / student)
    trainer = h.make_trainer(folder, folder / "images", *networks, evaluator=evaluator, **options)
    trainer.add_callback(kinds := Kinds())
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    teacher = trainer.teacher.model
    return {
        "log": trainer.state.log_history,
        "kinds": kinds.found,
        "shards": kinds.shards,
        "student": dict(trainer.student.model.state_dict()),
        "projected": trainer.project(torch.ones(1, trainer.student.dim)),
        "metrics": trainer.evaluate(),
        "teacher_sharded": any(isinstance(p, DTensor) for p in teacher.parameters()),
        "teacher_trained": any(p.requires_grad or p.grad is not None for p in teacher.parameters()),
        "teacher_training": teacher.training,
        "trained": [name for name, _ in trainer.model.named_parameters()],
    }


def run_cached(folder: Path, name: str, cache: str | None, double: bool) -> dict:
    """Losses of each step with neighbours and views of 2 epochs, and how many views this process's teacher embedded."""
    AcceleratorState._reset_state(reset_partial_state=True)
    networks = str(folder / "teacher"), str(folder / "vit")
    options = OPTIONS | {"max_steps": 14, "save_strategy": "no", "view_epochs": 2, "teacher_cache": cache}
    options |= {"neighbors_k": 1, "neighbors_pool": 4, "per_device_train_batch_size": 4}
    neighbors = (np.arange(48)[:, None] + np.arange(1, 5)) % 48
    trainer = h.make_trainer(folder / name, folder / "images", *networks, neighbors=neighbors, **options)
    if double:
        trainer.model.double()
    losses, embedded = [], []
    compute, embed = trainer.compute_loss, trainer._teacher_features

    def compute_loss(*args, **kwargs):
        loss = compute(*args, **kwargs)
        losses.append(loss.item())
        return loss

    trainer.compute_loss = compute_loss
    trainer._teacher_features = lambda views: embedded.append(len(views)) or embed(views)
    trainer.train()
    return {"losses": losses, "embedded": sum(embedded)}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found = {"ddp": run(folder, "ddp", "vit")}
    found["live"] = run_cached(folder, "live", None, double=True)
    found["cold"] = run_cached(folder, "cold", str(folder / "cache"), double=True)
    found["warm"] = run_cached(folder, "warm", str(folder / "cache"), double=True)
    AcceleratorState.__init__ = fsdp_init
    found["fsdp"] = run(folder, "fsdp", "vit")
    found["live fsdp"] = run_cached(folder, "live-fsdp", None, double=False)
    found["warm fsdp"] = run_cached(folder, "warm-fsdp", str(folder / "cache"), double=False)
    found["resumed"] = run(folder, "resumed", "vit", str(folder / "fsdp" / "checkpoint-2"))
    # Batch norm, whose statistics are each process's own, and no blocks that the class names; the best checkpoint.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "max_steps": 4, "bf16": True}
    found["resnet"] = run(folder, "resnet-out", "resnet", **best)
    torch.save(found, folder / f"found-{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
