"""Idle cores, other programs and slow images are named, each once, with the option that mends it."""

import logging
from types import SimpleNamespace

import pytest
import torch

from coss_hf.trainer.callbacks import waiting
from coss_hf.trainer.callbacks.waiting import WaitingCallback, idle_cores, shared_cores, slow_images, too_many_threads


@pytest.mark.parametrize(
    ("cores", "processes", "threads", "workers", "expected"),
    [
        (2, 1, 2, 0, ""),
        (2, 1, 1, 1, ""),
        (2, 1, 2, 4, ""),
        (8, 2, 4, 0, ""),
        (
            2,
            1,
            1,
            0,
            "1 of 2 cores have no work: load images with --dataloader_num_workers 1, or set OMP_NUM_THREADS=2",
        ),
        (
            8,
            2,
            1,
            1,
            "4 of 8 cores have no work: load images with --dataloader_num_workers 3, or set OMP_NUM_THREADS=3",
        ),
    ],
)
def test_idle_cores(cores, processes, threads, workers, expected):
    found = idle_cores(cores, processes, threads, workers)
    assert found.startswith(expected) and bool(found) == bool(expected)


@pytest.mark.parametrize("streams", [False, True])
def test_idle_cores_are_no_reason_for_another_order_of_a_stream(monkeypatch, caplog, streams):
    monkeypatch.setattr(waiting, "usable_cores", lambda: 8)
    monkeypatch.setattr(waiting.torch, "get_num_threads", lambda: 4)
    args = SimpleNamespace(device=torch.device("cpu"), dataloader_num_workers=0)
    with caplog.at_level(logging.WARNING):
        WaitingCallback(streams=streams).on_train_begin(args, SimpleNamespace(is_world_process_zero=True), None)
    assert "OMP_NUM_THREADS=8" in caplog.text and ("dataloader_num_workers=4" in caplog.text) != streams


@pytest.mark.parametrize("most", [0, 2, 3])
def test_idle_cores_advise_no_more_workers_than_there_is_room_for(most):
    found = idle_cores(16, 1, 4, 2, most=most)
    assert ("--dataloader_num_workers 3" in found) == (most == 3) and "OMP_NUM_THREADS=14" in found


@pytest.mark.parametrize(
    ("cores", "threads", "others", "fewer"),
    [(2, 2, None, 0), (2, 2, 0.3, 0), (2, 1, 1.5, 0), (8, 4, 2.0, 0), (2, 2, 1.0, 1), (8, 8, 3.5, 4)],
)
def test_other_programs(cores, threads, others, fewer):
    """Two threads that shared a core with another program took ten times as long a step."""
    found = shared_cores(cores, threads, others)
    assert bool(found) == bool(fewer) and (not fewer or f"OMP_NUM_THREADS={fewer} is faster" in found)


def test_other_programs_are_named_as_soon_as_they_are_known(monkeypatch, caplog):
    """Within a second of building the trainer it is not known how busy the cores are, and nobody asked again."""
    measured = iter([None, 1.0, 1.0])
    monkeypatch.setattr(waiting, "usable_cores", lambda: 2)
    monkeypatch.setattr(waiting.torch, "get_num_threads", lambda: 2)
    callback = WaitingCallback()
    monkeypatch.setattr(callback._load, "cores", lambda: next(measured))
    args = SimpleNamespace(device=torch.device("cpu"), dataloader_num_workers=0)
    state = SimpleNamespace(is_world_process_zero=True)
    with caplog.at_level(logging.WARNING):
        callback.on_train_begin(args, state, None)
        assert "Other programs" not in caplog.text
        callback.on_log(args, state, None, logs={"loss": 1})
        callback.on_log(args, state, None, logs={"loss": 1})
    assert caplog.text.count("Other programs keep 1.0 of 2 cores busy") == 1


def test_slow_images():
    assert "--dataloader_num_workers 7 uses the 8 cores" in slow_images(0.4, 0, 8, 4, "cuda")
    assert "--dataloader_num_workers 3 uses" in slow_images(0.4, 0, 4, 1, "cpu")
    assert "OMP_NUM_THREADS=1 with --dataloader_num_workers 1" in slow_images(0.4, 0, 2, 2, "cpu")
    assert "all cores are at work" in slow_images(0.4, 7, 8, 4, "cuda")
    assert "waits 40 % of its time" in slow_images(0.4, 0, 2, 1, "cpu") and "coss-hf prepare" in slow_images(
        0.4, 0, 2, 1, "cpu"
    )


def test_slow_images_advise_no_more_workers_than_were_filled_in_on_purpose():
    """64 cores, of which 8 workers are taken, or as many as shared memory has room for."""
    assert "--dataloader_num_workers 8 is the most" in slow_images(0.4, 4, 64, 1, "cuda", most=8)
    assert "more workers do not fit into shared memory" in slow_images(0.4, 3, 64, 1, "cuda", most=3)
    assert "--dataloader_num_workers 5 uses the 6 cores" in slow_images(0.4, 0, 6, 1, "cuda", most=5)


@pytest.mark.parametrize(
    ("cores", "processes", "threads", "fitting"),
    [(2, 1, 64, 2), (4, 2, 4, 2), (1, 2, 2, 1), (4, 2, 2, 0), (2, 1, 1, 0)],
)
def test_more_threads_than_cores(cores, processes, threads, fitting):
    """A container with a quota of 2 cores on a machine of 64."""
    found = too_many_threads(cores, processes, threads)
    assert bool(found) == bool(fitting) and (not fitting or f"OMP_NUM_THREADS={fitting} is faster" in found)


@pytest.mark.parametrize(("shares", "told"), [((0.9,), True), ((0.1,), False), ((0.9, 0.1), False), ((), False)])
def test_a_short_training_is_told_at_its_end(caplog, shares, told):
    """With a log entry each 50 steps, a training of fewer than 100 never heard of it."""
    callback = WaitingCallback()
    args = SimpleNamespace(device=torch.device("cuda"), dataloader_num_workers=0)
    state = SimpleNamespace(is_world_process_zero=True)
    callback.on_train_begin(args, state, None)
    for share in shares:
        callback.on_log(args, state, None, logs={"data_wait_share": share})
    callback.on_train_end(args, state, None)
    assert ("waits 90 % of its time" in caplog.text) == told


def test_each_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(waiting, "usable_cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    callback = WaitingCallback()
    args = SimpleNamespace(device=torch.device("cpu"), dataloader_num_workers=0)
    state = SimpleNamespace(is_world_process_zero=True)
    with caplog.at_level(logging.WARNING):
        callback.on_train_begin(args, state, None)
        for share in (0.9, 0.1, 0.5, 0.6):  # workers are started in the first
            callback.on_log(args, state, None, logs={"data_wait_share": share})
        callback.on_log(args, state, None, logs={"eval_loss": 1.0})
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2 and "3 of 4 cores have no work" in messages[0] and "waits 50 % of its time" in messages[1]
