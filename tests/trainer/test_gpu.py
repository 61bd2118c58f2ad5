"""On a GPU only: mixed precision, compilation, memory format, batch norm over processes, FSDP."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

import tests.helpers.runs as h

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
ROOT = Path(__file__).resolve().parents[2]


def losses(trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize(
    "precision",
    [
        {"bf16": True},
        {"fp16": True},
        {"bf16": True, "torch_compile": True},
        {"bf16": True, "torch_compile": True, "torch_compile_mode": "reduce-overhead"},
    ],
)
def test_mixed_precision(tmp_path, image_parquet, networks, kind, precision):
    options = {"use_cpu": False, "max_steps": 12, "logging_steps": 4, "learning_rate": 0.002}
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, getattr(networks, kind), **options, **precision)
    dtypes = set()
    compute = trainer.compute_loss

    def keep(*args, **kwargs):
        loss = compute(*args, **kwargs)
        dtypes.add(loss.dtype)
        return loss

    trainer.compute_loss = keep
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] and dtypes == {torch.float32}
    assert all(p.dtype == torch.float32 for p in trainer.student.model.parameters())
    trainer.save_model()
    h.assert_same(
        AutoModel.from_pretrained(tmp_path / "out").state_dict(),
        {name: tensor.cpu() for name, tensor in trainer.student.model.state_dict().items()},
    )


def test_same_run_as_on_the_cpu(tmp_path, image_parquet, networks):
    found = []
    for use_cpu in (True, False):
        options = {"use_cpu": use_cpu, "tf32": None if use_cpu else False, "max_steps": 4}
        trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.vit, **options)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_channels_last_and_synchronised_batch_norm_change_nothing_at_one_process(tmp_path, image_parquet, networks):
    found, saved = [], []
    for option in ({}, {"channels_last": True}, {"sync_batch_norm": True}):
        # At ten times the rate a relative change of 1e-5, as other kernels make, grows to 1e-3 within these steps.
        options = {"use_cpu": False, "tf32": False, "max_steps": 4, "learning_rate": 0.0002} | option
        trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, **options)
        norms = sum(isinstance(m, torch.nn.SyncBatchNorm) for m in trainer.student.model.modules())
        assert (norms > 0) == ("sync_batch_norm" in option)
        trainer.train()
        trainer.save_model()
        found.append(losses(trainer))
        saved.append(load_file(tmp_path / "out" / "model.safetensors"))
    for other, weights in zip(found[1:], saved[1:], strict=True):
        assert other == pytest.approx(found[0], rel=1e-3)
        assert weights.keys() == saved[0].keys()
    AutoModel.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_fsdp_with_one_process(tmp_path, image_parquet, networks, precision):
    """The recipe through ``accelerate launch``, resumed: a student as without FSDP."""
    options = {
        "teacher": networks.teacher,
        "student": networks.vit,
        "dataset": str(image_parquet),
        "settings": "paper",
        "per_device_train_batch_size": 8,
        "augmentation": "cifar",
        "max_steps": 5,
        "learning_rate": 0.002,
        "tf32": False,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 9,
        "disable_tqdm": True,
    }
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "CUDA_VISIBLE_DEVICES": "0"}

    def launch(config, output, *extra):
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml"), "--num_processes", "1"]
        command += ["--mixed_precision", precision, str(ROOT / "recipes" / "distill.py")]
        command += [*(f"--{key}={value}" for key, value in options.items()), f"--output_dir={tmp_path / output}"]
        done = subprocess.run([*command, *extra], capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        return load_file(tmp_path / output / "model.safetensors")

    plain, sharded = launch("single_gpu", "plain"), launch("fsdp", "sharded")
    assert (tmp_path / "sharded" / "checkpoint-2" / "pytorch_model_fsdp.bin").is_file(), "FSDP was not used"
    resumed = launch("fsdp", "resumed", f"--resume_from_checkpoint={tmp_path / 'sharded' / 'checkpoint-2'}")
    assert plain.keys() == sharded.keys() == resumed.keys()
    tolerance = 1e-3 if precision == "no" else 1e-2
    for name, tensor in plain.items():
        if "pooler" in name:
            continue
        torch.testing.assert_close(sharded[name], tensor, rtol=0, atol=tolerance, msg=name)
        torch.testing.assert_close(resumed[name], sharded[name], rtol=0, atol=tolerance / 10, msg=name)
    AutoModel.from_pretrained(tmp_path / "sharded")
