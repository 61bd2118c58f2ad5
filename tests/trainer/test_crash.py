"""A run that dies goes on from its last whole checkpoint, to the same student bit for bit: real processes, killed."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time

import psutil
import pytest
from safetensors.torch import load_file

import tests.helpers.runs as h
from recipes.distill import main

STEPS = 30
# Processes and loader workers: all four in `-m slow`, at several moments each.
EVERY_SET_UP = [(1, 0), (1, 2), (2, 0), (2, 2)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return {
        "folder": folder,
        "teacher": h.save_resnet(folder / "teacher", seed=1),
        "student": h.save_resnet(folder / "student", seed=2),
        "vit": h.save_vit(folder / "vit", seed=2, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2),
        "swin": h.save_swin(folder / "swin", seed=2, drop_path_rate=0.5),
        "images": str(h.write_images(folder / "images")),
        "cache": folder / "cache",
        "finished": {},
    }


def words(world, output, processes: int, workers: int, *argv) -> list[str]:
    """The same command every time: what a user repeats after a crash."""
    options = {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0, "seed": 3}
    flags = ("--use_cpu", "--resume_from_checkpoint", *argv)
    return h.distill_words(world, output, *flags, processes=processes, max_steps=STEPS, **options)


def start(world, output, processes: int, workers: int, *argv, launcher: bool = False):
    return h.start_program(words(world, output, processes, workers, *argv), processes, launcher)


def end(process, number: int) -> None:
    """A signal to launcher, processes and loader workers alike, as from a scheduler."""
    launcher = psutil.Process(process.pid)
    # The launcher's children have sessions of their own: killing its group leaves them at work.
    for one in [launcher, *launcher.children(recursive=True)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one.pid, number)


def finish(world, output, *set_up, argv=()):
    process = start(world, output, *set_up, *argv)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, load_file(output / "model.safetensors")


def run_here(world, output, *set_up, argv=()):
    """A run of one process in this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["distill.py", *words(world, output, *set_up, *argv)])
        main()
    return load_file(output / "model.safetensors")


def uninterrupted(world, *set_up):
    if set_up not in world["finished"]:
        output = world["folder"] / f"whole-{set_up}"
        run = run_here if set_up[0] == 1 else lambda *args: finish(*args)[1]
        world["finished"][set_up] = run(world, output, *set_up)
    return world["finished"][set_up]


def wait_for(process, found):
    end = time.monotonic() + 120
    while not found():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
        time.sleep(0.001)


def wait_for_checkpoint(process, output):
    wait_for(process, lambda: newest(output))


def newest(output) -> int:
    return max((int(folder.name[11:]) for folder in output.glob("checkpoint-*")), default=0)


def kill_and_resume(world, output, seed, *set_up):
    before = newest(output)
    process = start(world, output, *set_up)
    wait_for(process, lambda: newest(output) > before)
    time.sleep(random.Random(seed).uniform(0, 1.0))
    end(process, signal.SIGKILL)
    out, _ = process.communicate()
    assert not before or f"step {before}." in out
    # A half-written folder must be passed over, wherever the kill fell.
    step = newest(output)
    (output / f"unfinished-checkpoint-{step + 1}").mkdir()
    out, student = finish(world, output, *set_up)
    assert "Resuming from" in out and f"step {step}." in out
    assert not list(output.glob("unfinished-*"))
    h.assert_same(student, uninterrupted(world, *set_up))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("set_up", EVERY_SET_UP)
def test_sigkill_at_random_moments(world, tmp_path, set_up, seed):
    kill_and_resume(world, tmp_path / "run", seed, *set_up)


CHAINS = {
    "crd": ("student", {"method": "crd(negatives=5)"}),
    "dropout": ("vit", {}),
    "drop path": ("swin", {}),
}
KILLS = 4


def sha256(output) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(output.glob("*.safetensors"))]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("kind", CHAINS)
def test_chains_of_kills_with_evaluations_leave_the_same_student(world, tmp_path, kind, processes):
    """Students and losses that draw random numbers in a step. The run that is not killed finds its neighbours in the
    cache, and is not evaluated."""
    student, options = CHAINS[kind]
    options = {"max_steps": 40, "save_steps": 2, "seed": 3, "validation_size": 8, **options}
    options["student"] = world[student]

    def begin(name, *argv, **more):
        argv = ("--use_cpu", "--resume_from_checkpoint", *argv)
        return h.start_distill(world, tmp_path / name, *argv, processes=processes, **options | more)

    output = tmp_path / "killed"
    own_cache = {"neighbors_cache": tmp_path / "cache", "eval_strategy": "steps", "eval_steps": 3}
    moment = random.Random(f"{kind} {processes}")
    steps = []
    while len(steps) < KILLS:
        before = newest(output)
        process = begin("killed", **own_cache)
        wait_for(process, lambda before=before: newest(output) > before)
        time.sleep(moment.uniform(0, 1))
        end(process, signal.SIGKILL)
        process.communicate()
        steps.append(newest(output))
    assert not (output / "model.safetensors").exists(), "the last kill came too late"
    process = begin("killed", **own_cache)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and f"step {steps[-1]}." in out, err
    process = begin("whole", eval_strategy="no")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert len(sha256(output)) == (2 if kind == "crd" else 1)
    assert sha256(output) == sha256(tmp_path / "whole")
    print(f"{kind}, {processes} processes: killed behind steps {steps}, sha256 {sha256(output)[-1][:16]}", flush=True)


def kill_and_finish(world, output, process, *set_up, argv=()):
    end(process, signal.SIGKILL)
    process.communicate()
    out, student = finish(world, output, *set_up, argv=argv)
    h.assert_same(student, uninterrupted(world, *set_up))
    assert not list(output.glob("unfinished-*"))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("set_up", EVERY_SET_UP)
def test_sigkill_in_the_final_save(world, tmp_path, set_up):
    output = tmp_path / "run"
    process = start(world, output, *set_up)
    wait_for(process, lambda: any(output.glob("*.json")) or any(output.glob("model*")))
    kill_and_finish(world, output, process, *set_up)


@pytest.mark.slow
@pytest.mark.parametrize("set_up", EVERY_SET_UP)
def test_sigkill_before_the_first_checkpoint_is_complete(world, tmp_path, set_up):
    output = tmp_path / "run"
    process = start(world, output, *set_up)
    wait_for(process, lambda: any(output.glob("unfinished-checkpoint-*")))
    assert not any(output.glob("checkpoint-*"))
    kill_and_finish(world, output, process, *set_up)


@pytest.mark.slow
@pytest.mark.parametrize("set_up", EVERY_SET_UP)
def test_sigkill_in_an_evaluation(world, tmp_path, set_up):
    output, argv = tmp_path / "run", ("--eval_strategy=steps", "--eval_steps=1", "--validation_size=8")
    process = start(world, tmp_path / "whole", *set_up, *argv)
    assert process.communicate(timeout=300)[1] is not None and process.returncode == 0
    process = start(world, output, *set_up, *argv)
    wait_for_checkpoint(process, output)
    time.sleep(0.3)
    end(process, signal.SIGKILL)
    process.communicate()
    _, student = finish(world, output, *set_up, argv=argv)
    h.assert_same(student, load_file(tmp_path / "whole" / "model.safetensors"))


@pytest.mark.slow
def test_what_a_killed_launcher_leaves_ends_before_the_next_run_begins(world, tmp_path):
    output = tmp_path / "run"
    process = start(world, output, 2, 0)
    wait_for_checkpoint(process, output)
    orphans = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    out, student = finish(world, output, 2, 0)
    assert not any(orphan.is_running() for orphan in orphans) and "Resuming from" in out
    h.assert_same(student, uninterrupted(world, 2, 0))


def sigterm(world, output, *set_up) -> int:
    """Start a run, end it by SIGTERM after a checkpoint, and return the step that it saved."""
    process = start(world, output, *set_up, launcher=set_up[0] > 1)
    wait_for_checkpoint(process, output)
    end(process, signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    if set_up[0] == 1:
        assert process.returncode == 143, err
    else:
        assert process.returncode not in (0, 143), "the launcher has a code of its own"
        assert "exitcode  : 143" in err or "SIGTERM" in err or "Signal 15" in err
    step = newest(output)
    assert json.loads((output / f"checkpoint-{step}" / "trainer_state.json").read_text())["global_step"] == step
    assert 4 <= step < STEPS and not (output / "model.safetensors").exists()
    return step


def test_sigterm_saves_the_step_and_the_same_command_resumes(world, tmp_path, capfd):
    step = sigterm(world, tmp_path / "run", 1, 2)
    student = run_here(world, tmp_path / "run", 1, 2)
    assert f"step {step}." in capfd.readouterr().out
    h.assert_same(student, uninterrupted(world, 1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("set_up", EVERY_SET_UP)
def test_sigterm_then_sigkill(world, tmp_path, set_up):
    sigterm(world, tmp_path / "run", *set_up)
    kill_and_resume(world, tmp_path / "run", sum(set_up), *set_up)


@pytest.mark.slow
def test_a_full_disk_ends_all_processes(world, tmp_path):
    uninterrupted(world, 1, 2)  # fills the cache
    with h.no_file_larger_than((world["folder"] / "whole-(1, 2)" / "model.safetensors").stat().st_size // 2):
        process = start(world, tmp_path / "run", 2, 0)
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and "could not be written" in err, err
    assert "[rank0]: Traceback" not in err and "[rank1]: Traceback" not in err
    assert not list((tmp_path / "run").glob("*checkpoint-*"))


def test_full_disk_leaves_earlier_checkpoints_complete(world, tmp_path):
    output = tmp_path / "run"
    whole = uninterrupted(world, 1, 2)
    earlier = f"checkpoint-{STEPS - 2}"
    shutil.copytree(world["folder"] / "whole-(1, 2)" / earlier, output / earlier)
    size = (output / earlier / "model.safetensors").stat().st_size

    with h.no_file_larger_than(size // 2):
        process = start(world, output, 1, 0)  # workers pass images through files, too
        final = start(world, tmp_path / "final", 1, 0, "--save_strategy=no")
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 1, err
    assert "could not be written" in err and f"{earlier} is complete" in err and "Traceback" not in err
    assert not list(output.glob("unfinished-*"))
    err = final.communicate(timeout=120)[1]
    assert final.returncode == 1 and "final could not be written" in err and "Traceback" not in err, err
    assert "No checkpoint was written before" in err
    h.assert_same(run_here(world, output, 1, 2), whole)


def test_a_checkpoint_of_another_run_is_refused(world, capsys):
    uninterrupted(world, 1, 2)
    with pytest.raises(SystemExit) as stop:
        run_here(world, world["folder"] / "whole-(1, 2)", 1, 2, argv=("--seed=4", "--neighbors_pool=5"))
    err = capsys.readouterr().err
    assert stop.value.code == 2, err
    assert "was written with another --seed (then 3, now 4), --neighbors_pool" in err and "Traceback" not in err
