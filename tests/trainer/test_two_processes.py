"""The recipe on two real processes (gloo): the run of one process, resumed exactly, and never two lone runs."""

import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file

import tests.helpers.runs as h


def launch(world, output, *argv, processes: int = 2):
    # Slow enough that rounding, which differs with the order of a sum, does not grow from step to step.
    process = h.start_distill(world, output, *argv, processes=processes, max_steps=5, learning_rate=0.0005)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def world(tmp_path, image_parquet):
    return {
        "teacher": h.save_resnet(tmp_path / "teacher", seed=1),
        "student": h.save_vit(tmp_path / "student", seed=2),  # no batch norm, whose statistics are per process
        "images": str(image_parquet),
        "cache": str(tmp_path / "neighbours"),
    }


def test_two_processes_equal_one_and_resume_exactly(world, tmp_path):
    one = launch(world, tmp_path / "one", "--use_cpu", processes=1)
    assert one.returncode == 0, one.stderr
    two = launch(world, tmp_path / "two", "--use_cpu")
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("| student |") == 1, "one process reports"
    alone, together = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    start = load_file(f"{world['student']}/model.safetensors")
    moved = max((alone[name] - start[f"vit.{name}"]).abs().max() for name in alone if f"vit.{name}" in start)
    assert moved > 1e-2
    used = [name for name in alone if "pooler" not in name]  # not in the checkpoint: drawn at random, unused
    largest = max(alone[name].abs().max().item() for name in used)
    for name in used:
        torch.testing.assert_close(together[name], alone[name], rtol=0, atol=1e-4 * largest, msg=name)

    accumulated = ("--per_device_train_batch_size=4", "--gradient_accumulation_steps=2", "--exact_accumulation")
    four = launch(world, tmp_path / "four", "--use_cpu", *accumulated)
    assert four.returncode == 0, four.stderr
    in_four = load_file(tmp_path / "four" / "model.safetensors")
    for name in used:
        torch.testing.assert_close(in_four[name], alone[name], rtol=0, atol=1e-4 * largest, msg=name)

    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "two" / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    again = launch(world, tmp_path / "again", "--use_cpu", "--resume_from_checkpoint")
    assert again.returncode == 0 and "step 4" in again.stdout, again.stderr
    h.assert_same(together, load_file(tmp_path / "again" / "model.safetensors"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with GPUs trains on them")
def test_processes_that_would_train_alone_are_refused(world, tmp_path):
    done = launch(world, tmp_path / "out")
    assert done.returncode != 0 and "add --use_cpu" in done.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()
