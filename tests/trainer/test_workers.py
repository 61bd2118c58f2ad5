"""Training does not depend on how many processes load the images, nor on whether they live on from epoch to epoch."""

import multiprocessing
import subprocess
import time

import numpy as np
import pytest
import torch

import tests.helpers.runs as h
from coss_hf.trainer.callbacks.preemption import Preemption

WORKERS = {
    "none": {"dataloader_num_workers": 0},
    "two": {"dataloader_num_workers": 2},
    "persistent": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
}
OPTIONS = {"neighbors_k": 1, "neighbors_pool": 3, "augmentation": "moco", "max_steps": -1, "learning_rate": 0.005}
NEIGHBORS = (np.arange(48)[:, None] + np.arange(1, 4)) % 48


def make(tmp_path, images, networks, **options):
    trainer = h.make_trainer(
        tmp_path, images, networks.teacher, networks.vit, neighbors=NEIGHBORS, **(OPTIONS | options)
    )
    return trainer, h.Recorder(trainer)


def run(tmp_path, images, networks, checkpoint=None, **options):
    trainer, recorder = make(tmp_path, images, networks, **options)
    trainer.train(resume_from_checkpoint=checkpoint)
    # Not in the checkpoint, so drawn at random at each loading, and unused.
    weights = {name: tensor for name, tensor in h.state(trainer).items() if "pooler" not in name}
    return recorder.batches, recorder.epochs, weights


def assert_same_batches(first, second):
    for one, other in zip(first, second, strict=True):
        h.assert_same(one, other)


def test_persistent_workers_end_with_the_training(tmp_path, image_parquet, networks):
    options = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
    before = set(multiprocessing.active_children())
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, **options)
    trainer.train()  # kept: its end would end them, too
    assert set(multiprocessing.active_children()) <= before


def test_same_training_with_any_workers(tmp_path, image_parquet, networks):
    batches, epochs, weights = run(tmp_path, image_parquet, networks, num_train_epochs=3, **WORKERS["none"])
    assert epochs == [0] * 6 + [1] * 6 + [2] * 6
    per_epoch = [torch.cat([batch["pixel_values"] for batch in batches[i : i + 6]]) for i in (0, 6, 12)]
    orders = [torch.cat([batch["index"] for batch in batches[i : i + 6]])[::2] for i in (0, 6, 12)]
    assert all(sorted(order.tolist()) == list(range(48)) for order in orders)
    by_anchor = [views[::2][order.argsort()] for views, order in zip(per_epoch, orders, strict=True)]
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(by_anchor[0], by_anchor[1])
    for kind in ("two", "persistent"):
        other = run(tmp_path, image_parquet, networks, num_train_epochs=3, **WORKERS[kind])
        assert_same_batches(batches, other[0])
        assert epochs == other[1]
        h.assert_same(weights, other[2])


@pytest.mark.parametrize(("saved_with", "resumed_with"), [("two", "persistent"), ("persistent", "none")])
def test_resume_in_mid_epoch_may_change_the_workers(tmp_path, image_parquet, networks, saved_with, resumed_with):
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 8, "save_total_limit": None}
    batches, epochs, weights = run(tmp_path, image_parquet, networks, **options, **WORKERS[saved_with])
    checkpoint = str(tmp_path / "out" / "checkpoint-8")  # 2 steps into the second epoch
    again = run(tmp_path, image_parquet, networks, checkpoint, **options, **WORKERS[resumed_with])
    assert_same_batches(batches[8:], again[0])
    assert epochs[8:] == again[1] == [1] * 4
    h.assert_same(weights, again[2])


def test_two_processes_share_out_the_views_of_one(tmp_path, image_parquet, networks):
    """What each of two processes reads, persistent workers and resumption in mid-epoch included."""
    from accelerate.data_loader import prepare_data_loader, skip_first_batches
    from torch.utils.data import DataLoader, RandomSampler

    from coss_hf.data.views import collate_views

    dataset = make(tmp_path, image_parquet, networks)[0].train_dataset

    def loader(batch_size, processes, rank, workers):
        generator = torch.Generator().manual_seed(5)
        plain = DataLoader(
            dataset,
            batch_size,
            sampler=RandomSampler(dataset, generator=generator),
            collate_fn=collate_views,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        return prepare_data_loader(
            plain, num_processes=processes, process_index=rank, use_seedable_sampler=True, data_seed=5
        )

    def epochs(batch_size, processes, rank, workers, skip=0):
        prepared, found = loader(batch_size, processes, rank, workers), []
        for epoch in (0, 1):
            dataset.set_epoch(epoch)
            prepared.set_epoch(epoch)
            batches = skip_first_batches(prepared, skip) if skip and epoch else prepared
            found.append([batch["pixel_values"] for batch in batches])
        return found

    whole = epochs(8, 1, 0, 0)
    halves = [epochs(4, 2, rank, 1) for rank in (0, 1)]
    late = [epochs(4, 2, rank, 1, skip=2) for rank in (0, 1)]
    for epoch in (0, 1):
        for batch, *parts in zip(whole[epoch], halves[0][epoch], halves[1][epoch], strict=True):
            assert sorted(view.numpy().tobytes() for view in batch) == sorted(
                view.numpy().tobytes() for part in parts for view in part
            )
    for rank in (0, 1):
        for batch, resumed in zip(halves[rank][1][2:], late[rank][1], strict=True):
            assert torch.equal(batch, resumed)


def test_a_loader_worker_hears_sigterm_from_its_parent_alone():
    """A scheduler's SIGTERM reaches workers too, and must not cost the step; a stuck worker must still end."""
    with Preemption():
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
        worker.start()
    time.sleep(0.5)
    subprocess.run(["kill", str(worker.pid)], check=True)
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 143
