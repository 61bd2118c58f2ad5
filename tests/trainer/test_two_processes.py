"""The recipe on two real processes (gloo): the run of one process, resumed exactly, and never two lone runs."""

import json
import socket
import sys

import pytest
import torch
from safetensors.torch import load_file

import tests.helpers.runs as h
from recipes.distill import main
from tests.helpers.processes import run as run_program

# Slow enough that rounding, which differs with the order of a sum, does not grow from step to step.
OPTIONS = {"max_steps": 5, "learning_rate": 0.0005}
ACCUMULATED = ("--per_device_train_batch_size=4", "--gradient_accumulation_steps=2", "--exact_accumulation")


# A loss of all pairs of a batch, which each image must be in once.
PKT = ("--method=pkt", "--neighbors_k=0", "--validation_size=0.34")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of one run by one process, ``one``, and several by two, ``two``, ``four`` (accumulated) and ``again``
    (resumed); what the two said is in ``done-0.json`` and ``done-1.json``."""
    folder = tmp_path_factory.mktemp("runs")
    world = {
        "teacher": h.save_resnet(folder / "teacher", seed=1),
        "student": h.save_vit(folder / "student", seed=2),  # no batch norm, whose statistics are per process
        "images": str(h.write_images(folder / "images")),
        "cache": str(folder / "neighbours"),
    }

    def words(name, *argv, processes=2):
        return h.distill_words(world, folder / name, *argv, processes=processes, **OPTIONS)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["distill.py", *words("one", "--use_cpu", processes=1)])
        main()
        patch.setattr(sys, "argv", ["distill.py", *words("one-pkt", "--use_cpu", *PKT, processes=1)])
        main()
    jobs = [
        {"words": words("two", "--use_cpu")},
        {"words": words("four", "--use_cpu", *ACCUMULATED)},
        {
            "words": words("again", "--use_cpu", "--resume_from_checkpoint"),
            "copied": [f"{folder}/two/checkpoint-4", f"{folder}/again/checkpoint-4"],
        },
        {"words": words("two-pkt", "--use_cpu", *PKT)},
    ]
    if not torch.cuda.is_available():  # a machine with GPUs trains on them
        jobs.append({"words": words("alone")})
    jobs = [job | {"port": port} for job, port in zip(jobs, free_ports(len(jobs)))]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = run_program([h.ROOT / "tests" / "helpers" / "distill_runs.py", folder], processes=2)
    assert done.returncode == 0, done.stderr
    return folder


def said(folder, job: int) -> list[dict]:
    return [json.loads((folder / f"done-{rank}.json").read_text())[job] for rank in range(2)]


def students(folder, *names) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / name / "model.safetensors") for name in names]


def assert_close(folder, name: str) -> None:
    alone, together = students(folder, "one", name)
    used = [name for name in alone if "pooler" not in name]  # not in the checkpoint: drawn at random, unused
    largest = max(alone[name].abs().max().item() for name in used)
    for name in used:
        torch.testing.assert_close(together[name], alone[name], rtol=0, atol=1e-4 * largest, msg=name)


def test_two_processes_train_the_student_of_one(folder):
    (alone,), start = students(folder, "one"), load_file(folder / "student" / "model.safetensors")
    moved = max((alone[name] - start[f"vit.{name}"]).abs().max() for name in alone if f"vit.{name}" in start)
    assert moved > 1e-2
    assert_close(folder, "two")
    assert sum(one["out"].count("| student |") for one in said(folder, 0)) == 1, "one process reports"


def test_accumulated_steps_of_two_processes_are_those_of_one(folder):
    assert_close(folder, "four")


def test_the_loss_of_held_out_images_does_not_depend_on_the_number_of_processes(folder):
    found = []
    for name in ("one-pkt", "two-pkt"):
        state = json.loads((folder / name / "checkpoint-4" / "trainer_state.json").read_text())
        found.append(next(line["eval_loss"] for line in state["log_history"] if "eval_loss" in line))
    assert found[1] == pytest.approx(found[0], rel=1e-3) and found[0] > 0


def test_two_processes_resume_exactly(folder):
    assert "step 4" in said(folder, 2)[0]["out"]
    h.assert_same(*students(folder, "two", "again"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with GPUs trains on them")
def test_processes_that_would_train_alone_are_refused(folder):
    first, second = said(folder, 4)
    assert first["code"] == second["code"] == 2 and "add --use_cpu" in first["err"]
    assert not (folder / "alone" / "model.safetensors").exists()
