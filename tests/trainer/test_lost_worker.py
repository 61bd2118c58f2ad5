"""A loader worker that is killed, by the kernel for want of memory say, costs a run no step."""

import multiprocessing
import os
import signal

import pytest
from transformers import TrainerCallback

import tests.helpers.runs as h
from coss_hf.utils.errors import LostWorker, bad_input_exits, is_lost_worker


class KillAWorker(TrainerCallback):
    """Kills a loader worker in the middle of a step; batches that it loaded ahead are still there."""

    def __init__(self, step: int):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


def test_the_step_is_saved_where_a_loader_worker_was_killed(tmp_path, image_parquet, networks):
    arguments = (image_parquet, networks.teacher, networks.resnet)
    options = {"dataloader_num_workers": 2, "max_steps": 14, "method": "crd(negatives=5)", "save_strategy": "no"}
    options["per_device_train_batch_size"] = 2
    whole = h.make_trainer(tmp_path / "whole", *arguments, **options)
    whole.train()
    trainer = h.make_trainer(tmp_path, *arguments, **options)
    trainer.add_callback(KillAWorker(3))
    with pytest.raises(LostWorker, match=r"images ended \(.*step [4-9] is saved"):
        trainer.train()
    assert signal.getsignal(signal.SIGCHLD) is not signal.SIG_DFL, "torch's own handler is back"
    again = h.make_trainer(tmp_path, *arguments, **options)
    again.train(resume_from_checkpoint="auto")
    h.assert_same(h.state(again), h.state(whole))


KILLED = "DataLoader worker (pid 7) is killed by signal: Killed. "
NO_ROOM = "RuntimeError: unable to allocate shared memory(shm)"


@pytest.mark.parametrize("text", [KILLED, f"Caught RuntimeError in DataLoader worker process 0.\n{NO_ROOM}"])
def test_a_worker_that_is_lost_before_training_is_one_paragraph(capsys, text):
    with pytest.raises(SystemExit) as stop, bad_input_exits():
        raise RuntimeError(text)
    assert stop.value.code == 1
    err = capsys.readouterr().err
    assert err.startswith("error: A process that loads images ended (" + text.splitlines()[-1].strip().rstrip("."))
    assert "/dev/shm" in err


@pytest.mark.parametrize(
    ("error", "file"),
    [
        ("OSError(28, 'No space left on device')", "synchronize.py"),  # of a new worker's lock
        ("ConnectionResetError(104, 'Connection reset by peer')", "resource_sharer.py"),  # a batch not handed over yet
        ("EOFError()", "reduction.py"),
    ],
)
def test_killed_worker_is_recognized_by_its_parent(error, file):
    def raised_in(path: str) -> BaseException:
        with pytest.raises((OSError, EOFError)) as caught:
            exec(compile(f"raise {error}", path, "exec"))
        return caught.value

    assert is_lost_worker(raised_in(f"/lib/multiprocessing/{file}"))
    assert not is_lost_worker(raised_in("/lib/json/encoder.py")), "a disk or a server"
