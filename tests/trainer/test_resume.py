import errno
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

import tests.helpers.runs as h
from coss_hf.trainer.checkpoint_files import recover
from coss_hf.utils.errors import CheckpointError


@pytest.mark.parametrize(("kind", "workers"), [("vit", 0), ("small", 2)])
def test_resume_is_bit_identical(tmp_path, image_parquet, networks, kind, workers):
    """In mid-epoch, with random views, for a student whose file has another key layout than its modules (ViT)."""
    options = {
        "max_steps": 9,  # 6 steps per epoch
        "save_strategy": "steps",
        "save_steps": 4,
        "dataloader_num_workers": workers,
        "dataloader_persistent_workers": workers > 0,
        "save_total_limit": None,
    }
    straight = h.make_trainer(tmp_path, image_parquet, networks.teacher, getattr(networks, kind), **options)
    recorder = h.Recorder(straight)
    straight.train()
    resumed = h.make_trainer(tmp_path, image_parquet, networks.teacher, getattr(networks, kind), **options)
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.add_(1)  # nothing of these may survive
    again = h.Recorder(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    for first, second in zip(recorder.batches[4:], again.batches, strict=True):
        h.assert_same(first, second)
    assert recorder.epochs[4:] == again.epochs == [0, 0, 1, 1, 1]
    h.assert_same(h.state(straight), h.state(resumed), but=h.UNTRAINED)


def test_a_finished_run_is_not_trained_on(tmp_path, image_parquet, networks):
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 8}
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.vit, **options)
    trainer.train()
    again = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.vit, **options)
    again.train(resume_from_checkpoint="auto")
    h.assert_same(h.state(trainer), h.state(again), but=h.UNTRAINED)
    assert again.state.global_step == 8 and again.images_seen == 64


def test_half_written_checkpoints_are_passed_over(tmp_path, image_parquet, networks, capsys):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, **options).train()
    (tmp_path / "out" / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4, "epo')
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, **options)
    trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-2, step 2" in capsys.readouterr().out
    assert trainer.state.global_step == 4


def test_nothing_to_resume_is_a_fresh_start_with_one_line(tmp_path, image_parquet, networks, capsys):
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, max_steps=1)
    trainer.train(resume_from_checkpoint="auto")
    assert capsys.readouterr().out.count("starting afresh") == 1


def test_a_wrong_checkpoint_path_is_refused(tmp_path, image_parquet, networks):
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet)
    with pytest.raises(ValueError, match="resume_from_checkpoint=.*nowhere"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_resume_rejects_checkpoint_without_optimizer_state(tmp_path, image_parquet, networks):
    options = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    arguments = (tmp_path, image_parquet, networks.teacher, networks.resnet)
    h.make_trainer(*arguments, **options, max_steps=2).train()
    with pytest.raises(ValueError, match="checkpoint-2 holds the network without .*save_only_model.* the network in"):
        h.make_trainer(*arguments, **options, max_steps=4).train(resume_from_checkpoint=True)
    ended = h.make_trainer(*arguments, **options, max_steps=2)
    ended.train(resume_from_checkpoint=True)
    assert ended.state.global_step == 2


@pytest.mark.parametrize(
    "change, named",
    [
        ({"student": "small"}, "student"),
        ({"teacher": "small"}, "teacher"),
        ({"images": True}, "dataset"),
        ({"neighbors_k": 1, "per_device_train_batch_size": 4}, "neighbors_k"),
        ({"augmentation": "none"}, "augmentation"),
        ({"per_device_train_batch_size": 12}, "per_device_train_batch_size"),
        ({"data_seed": 4}, "data_seed"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, image_parquet, networks, change, named):
    options = {"teacher": "teacher", "student": "resnet", "images": False, "max_steps": 2, "save_strategy": "steps"}

    def run(options, **arguments):
        networks_of = [getattr(networks, options.pop(role)) for role in ("teacher", "student")]
        images = h.write_images(tmp_path / "other", seed=7) if options.pop("images") else image_parquet
        neighbors = np.tile([[1], [0]], (24, 1)) + 2 * np.repeat(np.arange(24), 2)[:, None]
        return h.make_trainer(tmp_path, images, *networks_of, neighbors=neighbors, save_steps=2, **options).train(
            **arguments
        )

    run(dict(options))
    with pytest.raises(ValueError, match=rf"checkpoint-2 was written with another {named}\b"):
        run({**options, **change}, resume_from_checkpoint=True)


def test_another_number_of_steps_in_an_epoch_is_refused(tmp_path, image_parquet, networks):
    """Steps of 20 of 48 images: two batches of 20, or nine of 5, of which the last step has one."""

    def run(batch, accumulated, **arguments):
        options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
        options |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.vit, **options).train(**arguments)

    run(20, 1)
    changed = r"another gradient_accumulation_steps \(then 2 steps, 40 images per epoch, now 3 steps, 45"
    with pytest.raises(ValueError, match=changed):
        run(5, 4, resume_from_checkpoint=True)
    run(10, 2, resume_from_checkpoint=True)


def test_epochs_that_a_callback_ends_are_counted_whatever_tells_the_views(
    tmp_path, image_parquet, networks, monkeypatch
):
    """With several processes accelerate does not tell a dataset its epoch, and `state.epoch` stays behind."""

    class EndEpochs(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = state.global_step % 2 == 0

    def epochs(folder) -> list[int]:
        options = {"max_steps": -1, "num_train_epochs": 3}
        trainer = h.make_trainer(tmp_path / folder, image_parquet, networks.teacher, networks.resnet, **options)
        recorder = h.Recorder(trainer)
        trainer.add_callback(EndEpochs())
        trainer.train()
        return recorder.epochs

    assert epochs("told") == [0, 0, 1, 1, 2, 2]
    monkeypatch.setattr("accelerate.data_loader.DataLoaderShard.set_epoch", lambda loader, epoch: None)
    assert epochs("not told") == [0, 0, 1, 1, 2, 2]


def test_unwritable_checkpoint_leaves_the_earlier_one(tmp_path, image_parquet, networks, monkeypatch):
    arguments = (tmp_path, image_parquet, networks.teacher, networks.resnet)
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    whole = h.make_trainer(*arguments, **options)
    whole.train()
    expected = h.state(whole)
    shutil.rmtree(tmp_path / "out")

    trainer = h.make_trainer(*arguments, **options)
    real = trainer._save_rng_state

    def full(folder):
        if "checkpoint-4" in folder:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(folder)

    trainer._save_rng_state = full
    with pytest.raises(CheckpointError, match=r"checkpoint-4 could not be written.*No space.*checkpoint-2 is complete"):
        trainer.train()
    assert sorted(path.name for path in (tmp_path / "out").glob("*checkpoint*")) == ["checkpoint-2"]
    again = h.make_trainer(*arguments, **options)
    again.train(resume_from_checkpoint=True)
    h.assert_same(h.state(again), expected, but=h.UNTRAINED)


def test_a_checkpoint_that_was_half_replaced_comes_back(tmp_path):
    (tmp_path / "replaced-checkpoint-4").mkdir()
    (tmp_path / "replaced-checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2").mkdir()
    for name in ("unfinished-checkpoint-6", "replaced-best", "unfinished-best"):
        (tmp_path / name).mkdir()
    recover(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "checkpoint-2", "checkpoint-4"]


def test_a_full_disk_within_torch_save_is_named(tmp_path, image_parquet, networks):
    """PyTorch says "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534" of it."""
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, **options)
    weights = Path(networks.resnet, "model.safetensors").stat().st_size
    with h.no_file_larger_than(int(1.3 * weights)):  # an optimizer of two moments takes twice as much
        with pytest.raises(CheckpointError, match="checkpoint-2 could not be written: .*the disk is full, or a quota"):
            trainer.train()
    assert not any((tmp_path / "out").glob("*checkpoint*"))
