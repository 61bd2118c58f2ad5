"""A training with the teacher's embeddings from disk is the training with the teacher itself."""

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

import tests.helpers.runs as h
from coss_hf.data.loading import load_images
from coss_hf.data.teacher_cache import TeacherCache
from coss_hf.data.views import ViewDataset
from coss_hf.losses.registry import LOSSES
from coss_hf.models.backbone import Backbone
from coss_hf.models.loading import load_backbone
from coss_hf.trainer.arguments import DataArguments
from coss_hf.trainer.cached_teacher import CachedTeacher, libraries, teacher_identity
from coss_hf.trainer.dry_run import describe
from coss_hf.trainer.rehearsal import rehearse
from coss_hf.trainer.trainer import DistillationTrainer
from coss_hf.trainer.training_args import DistillationArguments
from tests.data.test_teacher_cache import from_its_own_generator

NEIGHBORS = (np.arange(48)[:, None] + np.arange(1, 5)) % 48
OPTIONS = {
    "neighbors_k": 1,
    "neighbors_pool": 4,
    "view_epochs": 2,
    "max_steps": 14,  # 6 an epoch
    "logging_steps": 1,
    "learning_rate": 0.002,
    "lr_scheduler_type": "constant",
    "head_hidden_size": 12,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    h.save_resnet(folder / "teacher", seed=1)
    h.save_resnet(folder / "other", seed=9)
    h.save_vit(folder / "vit", seed=2)
    h.write_images(folder / "images")
    return folder


class Run:
    """A training of a float64 student: its losses at each step, and how many views the teacher embedded."""

    def __init__(self, world, output, checkpoint=None, teacher="teacher", **options):
        torch.manual_seed(0)  # of the pooler that the checkpoint lacks
        networks = str(world / teacher), str(world / "vit")
        options = OPTIONS | options
        neighbors = NEIGHBORS if options["neighbors_k"] else None
        self.trainer = trainer = h.make_trainer(output, world / "images", *networks, neighbors=neighbors, **options)
        self.prepare()
        self.losses = []
        self.embedded = 0
        compute, embed = trainer.compute_loss, trainer._teacher_features

        def compute_loss(*args, **kwargs):
            loss = compute(*args, **kwargs)
            self.losses.append(loss.item())
            return loss

        def teacher_features(views):
            self.embedded += len(views)
            return embed(views)

        trainer.compute_loss = compute_loss
        trainer._teacher_features = teacher_features
        trainer.train(resume_from_checkpoint=checkpoint)

    def prepare(self) -> None:
        self.trainer.model.double()


class SinglePrecisionRun(Run):
    """The same in the precision that is given."""

    def prepare(self) -> None:
        pass


def same(run, losses):
    assert run.losses == pytest.approx(losses, rel=1e-6, abs=0)


@pytest.fixture(scope="module")
def live(world, tmp_path_factory):
    run = Run(world, tmp_path_factory.mktemp("live"))
    assert run.embedded == 14 * 16 and len(set(run.losses)) == 14
    return run.losses


def test_cold_half_warm_and_warm_are_live(world, live, tmp_path):
    cache = {"teacher_cache": str(tmp_path / "cache")}
    half = Run(world, tmp_path / "half", **cache, max_steps=4)
    same(half, live[:4])
    cold = Run(world, tmp_path / "cold", **cache)
    same(cold, live)
    assert half.embedded == 4 * 16 and cold.embedded == 8 * 16  # the last 2 of 14 steps are of the first epoch again
    warm = Run(world, tmp_path / "warm", **cache, dataloader_num_workers=2, dataloader_persistent_workers=True)
    same(warm, live)
    assert warm.embedded == 0
    shares = [line["teacher_share"] for line in warm.trainer.state.log_history if "teacher_share" in line]
    assert shares and not any(shares)
    damaged = warm.trainer.cached_teacher.cache.path / "rows"
    damaged.write_bytes(damaged.read_bytes()[::-1])
    again = Run(world, tmp_path / "again", **cache)
    same(again, live)
    assert again.embedded == 12 * 16


def test_resumed_in_mid_epoch_with_other_workers_and_another_cache(world, live, tmp_path):
    """Live up to the checkpoint, then with a cache; then with one that is warm."""
    saving = {"save_strategy": "steps", "save_steps": 8, "save_total_limit": None}
    Run(world, tmp_path, **saving)
    checkpoint = str(tmp_path / "out" / "checkpoint-8")
    cache = {"teacher_cache": str(tmp_path / "cache")}
    for workers in (0, 1):
        resumed = Run(world, tmp_path, checkpoint, **saving, **cache, dataloader_num_workers=workers)
        same(resumed, live[8:])
        assert resumed.embedded == (0 if workers else 6 * 16)


def test_a_float16_cache_gives_one_student_cold_and_warm(world, live, tmp_path):
    cache = {"teacher_cache": str(tmp_path / "cache"), "teacher_cache_dtype": "float16"}
    cold = Run(world, tmp_path / "cold", **cache)
    warm = Run(world, tmp_path / "warm", **cache)
    assert cold.losses == warm.losses and not warm.embedded
    assert cold.losses == pytest.approx(live, rel=1e-3) and cold.losses != pytest.approx(live, rel=1e-7)


def test_exact_accumulation_reads_the_same_rows(world, tmp_path):
    options = {"gradient_accumulation_steps": 2, "exact_accumulation": True, "max_steps": 6}
    live = Run(world, tmp_path / "live", **options)
    for kind in ("cold", "warm"):
        run = Run(world, tmp_path / kind, **options, teacher_cache=str(tmp_path / "cache"))
        same(run, live.losses)
    assert live.embedded == 2 * 6 * 16 and run.embedded == 0


@pytest.mark.parametrize("method", ["kd", "crd(negatives=5)", "seed", "coss + pkt"])
def test_methods_of_embeddings_and_of_logits(world, tmp_path, method):
    """The logits of the teacher are its linear classifier's, on its embedding."""
    if method == "kd":
        h.save_vit(world / "classifier", seed=4)
        teacher = "classifier"
    else:
        teacher = "teacher"
    options = {"method": method, "teacher": teacher, "max_steps": 3, "view_epochs": 1}
    live = Run(world, tmp_path / "live", **options)
    for kind in ("cold", "warm"):
        run = Run(world, tmp_path / kind, **options, teacher_cache=str(tmp_path / "cache"))
        same(run, live.losses)
    assert run.embedded == 0


def test_seeds_share_the_embeddings_of_one_view_seed(world, tmp_path):
    options = {"teacher_cache": str(tmp_path / "cache"), "view_epochs": 1, "view_seed": 5}
    first = Run(world, tmp_path / "first", **options, seed=1, num_train_epochs=1, max_steps=-1)
    second = Run(world, tmp_path / "second", **options, seed=2, num_train_epochs=1, max_steps=-1)
    assert first.embedded == 96 and second.embedded == 0
    assert first.losses != second.losses


def test_view_seed_follows_the_seed(world, tmp_path):
    plain = h.make_trainer(tmp_path, world / "images", str(world / "teacher"), str(world / "vit"), seed=4)
    assert plain.train_dataset.seed == 4 and plain.train_dataset.view_epochs == 0
    other = h.make_trainer(tmp_path, world / "images", str(world / "teacher"), str(world / "vit"), seed=4, view_seed=0)
    assert other.train_dataset.seed == 0


@pytest.mark.parametrize(
    "change",
    [{"teacher": "other"}, {"augmentation": "imagenet"}, {"view_size": 20}, {"view_seed": 8}, {"neighbors_k": 0}],
    ids=lambda change: next(iter(change)),
)
def test_another_teacher_or_view_misses_and_is_named(world, tmp_path, caplog, change):
    options = {"teacher_cache": str(tmp_path / "cache"), "view_epochs": 1, "max_steps": 2}
    Run(world, tmp_path / "first", **options)
    caplog.set_level("INFO")
    live = Run(world, tmp_path / "live", **options | {"teacher_cache": None} | change)
    run = Run(world, tmp_path / "second", **options, **change)
    same(run, live.losses)
    assert run.embedded == live.embedded
    assert "0 % there" in caplog.text
    assert re.search(rf"most similar one differs in .*--{next(iter(change))}", caplog.text)


def test_an_image_that_is_replaced_is_neither_read_nor_kept(world, tmp_path):
    """--on_bad_image skip: the row is that of the image which was there before."""
    networks = load_backbone(str(world / "teacher")), load_backbone(str(world / "vit"))
    splits = load_images(str(world / "images"), validation_size=0, on_bad_image="skip")
    embedded = []

    def train(name, broken):
        views = ViewDataset(splits.train, "image", "cifar", 16, on_bad_image="skip", view_epochs=1)
        decode = views.reader._decode_reduced
        views.reader._decode_reduced = lambda i, record, reduction: decode(
            i, {"bytes": b"", "path": None} if i in broken else record, reduction
        )
        args = DistillationArguments(
            str(tmp_path / name),
            settings="paper",
            per_device_train_batch_size=8,
            max_steps=6,
            save_strategy="no",
            teacher_cache=str(tmp_path / "cache"),
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = DistillationTrainer(*networks, args, views)
        real = trainer._teacher_features
        embedded.clear()
        trainer._teacher_features = lambda views: embedded.append(len(views)) or real(views)
        trainer.train()
        return trainer.cached_teacher.cache.present()

    assert train("first", {3, 11}) == 46
    assert train("second", {7}) == 48
    assert set(embedded) == {8} and len(embedded) <= 3, "three images, each among others of its batch"
    assert train("third", ()) == 48 and not embedded


def test_views_that_two_trainers_share_bring_the_rows_of_the_one_that_trains(world, tmp_path):
    splits = load_images(str(world / "images"), validation_size=0)
    views = ViewDataset(splits.train, "image", "cifar", 16, view_epochs=1)

    def make(name, teacher, cache):
        args = DistillationArguments(
            str(tmp_path / name),
            settings="paper",
            per_device_train_batch_size=8,
            max_steps=3,
            logging_steps=1,
            save_strategy="no",
            teacher_cache=cache,
            use_cpu=True,
            disable_tqdm=True,
        )
        networks = load_backbone(str(world / teacher)), load_backbone(str(world / "other"))
        return DistillationTrainer(*networks, args, views)

    def losses(trainer):
        trainer.train()
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    cache = str(tmp_path / "cache")
    trainers = [make(name, name, cache) for name in ("teacher", "other")]
    found = [losses(trainer) for trainer in trainers]
    for name, expected in zip(("teacher", "other"), found, strict=True):
        assert losses(make(f"live-{name}", name, None)) == pytest.approx(expected, rel=1e-5)
    neighbours_later = make("later", "teacher", cache)
    views.use_neighbors(NEIGHBORS, 1)
    losses(neighbours_later)
    assert neighbours_later.cached_teacher.cache.shape == (1, 48, 2, 16)


class Killed(BaseException):
    pass


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise Killed


def test_what_was_embedded_is_kept_however_the_training_ends(world, tmp_path):
    options = OPTIONS | {"teacher_cache": str(tmp_path / "cache")}
    networks = str(world / "teacher"), str(world / "vit")
    trainer = h.make_trainer(tmp_path, world / "images", *networks, neighbors=NEIGHBORS, **options)
    trainer.add_callback(Stop())
    with pytest.raises(Killed):
        trainer.train()
    assert trainer.cached_teacher.cache.present() == 3 * 16


def maps_of(world, method, teacher="teacher", student="teacher"):
    args = DistillationArguments("out", method=method, teacher_cache="cache", view_epochs=1, use_cpu=True)
    rehearse(load_backbone(str(world / student)), load_backbone(str(world / teacher)).freeze(), args)


@pytest.mark.parametrize("method", [name for name, loss in LOSSES.items() if loss.uses_maps])
def test_methods_of_maps_are_told_why_not(world, method):
    with pytest.raises(ValueError, match=rf"teacher_cache=cache .*method={method} reads its feature maps.*leave"):
        maps_of(world, method)


def test_bad_input_is_refused_before_the_training(world, tmp_path):
    def make(method="coss", **options):
        networks = str(world / "teacher"), str(world / "vit")
        return h.make_trainer(tmp_path, world / "images", *networks, method=method, **options)

    with pytest.raises(ValueError, match="teacher_cache=cache needs views that come back: give (--)?view_epochs"):
        make(teacher_cache="cache")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="teacher_cache=.*file: .* cannot be written"):
        make(teacher_cache=str(tmp_path / "file"), view_epochs=1)
    huge = {"teacher_cache": str(tmp_path / "huge"), "view_epochs": 10**9, "num_train_epochs": 10**9, "max_steps": -1}
    with pytest.raises(ValueError, match=r"the missing rows of 1000000000 epochs take 3\.5 TB .* free there; free"):
        make(**huge)
    assert not (tmp_path / "huge").exists()
    with pytest.raises(ValueError, match="view_epochs=-1: give 0 or more"):
        make(view_epochs=-1)
    with pytest.raises(ValueError, match="teacher_cache_dtype='int8': choose one of float32, float16"):
        make(view_epochs=1, teacher_cache=str(tmp_path / "cache"), teacher_cache_dtype="int8")


def test_a_dry_run_says_how_large_it_would_be_and_writes_nothing(world, tmp_path):
    networks = str(world / "teacher"), str(world / "vit")
    options = {"teacher_cache": str(tmp_path / "cache"), "view_epochs": 10, "dry_run": True}
    trainer = h.make_trainer(tmp_path, world / "images", *networks, **options)
    assert f"{tmp_path / 'cache'}: 34.6 kB for 480 views, 10 epochs, float32" in describe(trainer)
    assert not (tmp_path / "cache").exists()


def test_a_checkpoint_of_other_views_is_refused(world, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    Run(world, tmp_path, **saving)
    for change in ({"view_epochs": 0}, {"view_epochs": 3}, {"view_seed": 4}):
        with pytest.raises(ValueError, match=f"written with another (--)?{next(iter(change))}"):
            Run(world, tmp_path, True, **saving, **change)
    again = Run(world, tmp_path, True, **saving, view_seed=3)
    record = tmp_path / "out" / "checkpoint-2"
    assert again.trainer.find_checkpoint(str(record))


def check_rows(folder: Path, world: Path) -> int:
    """Compare all rows of the one cache of a folder with the teacher's own pass, and count them."""
    (path,) = (path for path in folder.iterdir() if (path / "meta.json").exists())
    identity = json.loads((path / "meta.json").read_text())
    images, views, dim = map(int, identity.pop("shape").split(" x "))
    cache = TeacherCache(folder, identity, (3, images, views, dim), dtype=identity.pop("dtype"))
    assert cache.path == path
    options = {"neighbors_k": 1, "neighbors_pool": 4, "view_epochs": 3, "seed": 42}
    networks = str(world / "teacher"), str(world / "vit")
    trainer = h.make_trainer(folder / "checked", world / "images", *networks, **options)
    teacher, dataset = trainer.teacher, trainer.train_dataset
    count = 0
    for epoch in range(3):
        dataset.set_epoch(epoch)
        found, known = cache.read(range(epoch * images * views, (epoch + 1) * images * views))
        pixels = torch.cat([item["pixel_values"] for item in dataset.__getitems__(list(range(images)))])
        with torch.no_grad():
            expected = teacher.features(teacher.normalize(pixels)).embedding
        torch.testing.assert_close(found[known], expected[known], rtol=1e-4, atol=1e-5)
        count += sum(known)
    return count


@pytest.mark.slow
def test_killed_at_random_moments_while_filling(world, tmp_path):
    """Three kills, each resumed with the rows that are there; the reference has no cache."""
    images = {"teacher": str(world / "teacher"), "student": str(world / "vit"), "images": str(world / "images")}
    options = {"max_steps": 24, "view_epochs": 3, "save_steps": 2, "save_total_limit": 2, "eval_strategy": "no"}
    options |= {"use_cpu": True, "logging_steps": 1, "lr_scheduler_type": "constant"}
    world_of = images | {"cache": str(tmp_path / "neighbours")}

    def start(name, *argv, **more):
        return h.start_distill(world_of, tmp_path / name, *argv, processes=1, **options, **more)

    whole = start("whole")
    assert whole.communicate(timeout=300)[1] is not None and whole.returncode == 0
    rng = random.Random(5)
    cache = {"teacher_cache": tmp_path / "cache"}
    killed = []
    for target in (2, 8, 14):
        process = start("killed", *(["--resume_from_checkpoint"] if killed else []), **cache)
        while not any(int(p.name.split("-")[1]) >= target for p in (tmp_path / "killed").glob("checkpoint-*")):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.3))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        killed.append(target)
    rows = check_rows(tmp_path / "cache", world)
    last = start("killed", "--resume_from_checkpoint", **cache)
    err = last.communicate(timeout=300)[1]
    assert last.returncode == 0, err
    assert 0 < rows <= check_rows(tmp_path / "cache", world) and "% there" in err
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "whole"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_images_of_one_name_and_size_are_told_apart(world, tmp_path, caplog):
    """Without neighbours a run knows its images by name and size alone: a cache needs their content."""
    (tmp_path / "photos").mkdir()
    images, _ = h.colour_images(17, seed=0)
    for i, image in enumerate(images[:16]):
        image.save(tmp_path / "photos" / f"{i:02d}.bmp")

    def cached(output):
        args = DistillationArguments(
            str(tmp_path / output),
            settings="paper",
            per_device_train_batch_size=8,
            max_steps=2,
            view_epochs=1,
            teacher_cache=str(tmp_path / "cache"),
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
        )
        data = DataArguments(validation_size=0)
        networks = str(world / "teacher"), str(world / "vit")
        trainer = DistillationTrainer(*networks, args, str(tmp_path / "photos"), data=data)
        trainer.train()
        return trainer.train_dataset.identity()["--dataset"]

    first = cached("one")
    images[16].save(tmp_path / "photos" / "03.bmp")
    assert cached("two") != first


def photos(folder):
    """16 files of one size, and the image of a 17th."""
    folder.mkdir()
    images, _ = h.colour_images(17, seed=0)
    for i, image in enumerate(images[:16]):
        image.save(folder / f"{i:02d}.bmp")
    return images[16]


def of_files(world, tmp_path, output="out", **options):
    """A trainer on the photographs, without neighbours: it knows them by their names and sizes."""
    options = {
        "settings": "paper",
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "view_epochs": 2,
        "logging_steps": 1,
    } | options
    args = DistillationArguments(
        str(tmp_path / output), use_cpu=True, disable_tqdm=True, report_to="none", augmentation="cifar", **options
    )
    networks = str(world / "teacher"), str(world / "vit")
    images = str(tmp_path / "photos")
    return DistillationTrainer(*networks, args, images, data=DataArguments(validation_size=0))


def losses_of(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_a_live_run_that_knows_its_images_by_file_goes_on_with_a_cache(world, tmp_path):
    """Its record stays as it is; the rows are those of the contents."""
    photos(tmp_path / "photos")
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None}
    live = of_files(world, tmp_path, **saving)
    live.train()
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    caching = {"teacher_cache": str(tmp_path / "cache"), "resume_from_checkpoint": checkpoint}
    resumed = of_files(world, tmp_path, **saving, **caching)
    resumed.train()
    assert losses_of(resumed) == pytest.approx(losses_of(live), rel=1e-5)
    assert resumed.identity() == live.identity() and resumed.cached_teacher.cache.present() == 16
    fresh = of_files(world, tmp_path, "fresh", teacher_cache=str(tmp_path / "cache"), save_strategy="no")
    assert fresh.train_dataset.identity()["--dataset"] != live.identity()["--dataset"]
    assert fresh.cached_teacher.cache.path == resumed.cached_teacher.cache.path


def test_views_that_are_known_by_file_are_cached_by_content(world, tmp_path):
    """Given splits and views may come without content hashes."""
    other = photos(tmp_path / "photos")

    def cache_of(by_content):
        splits = load_images(str(tmp_path / "photos"), validation_size=0, by_content=by_content)
        views = ViewDataset(splits.train, "image", "cifar", 16, view_epochs=1)
        assert views.is_by_file != by_content
        cache = str(tmp_path / "cache")
        args = DistillationArguments(
            str(tmp_path / "out"), teacher_cache=cache, use_cpu=True, per_device_train_batch_size=8
        )
        networks = load_backbone(str(world / "teacher")), load_backbone(str(world / "vit"))
        return DistillationTrainer(*networks, args, views).cached_teacher.cache.path

    first = cache_of(by_content=False)
    assert first == cache_of(by_content=True)
    other.save(tmp_path / "photos" / "03.bmp")
    assert cache_of(by_content=False) != first


def test_an_image_that_changes_during_the_training_is_neither_kept_nor_read(world, tmp_path, caplog):
    """Its embedding would stand under the content that it had at the start."""
    other = photos(tmp_path / "photos")
    before = (tmp_path / "photos" / "03.bmp").read_bytes()
    options = {"teacher_cache": str(tmp_path / "cache"), "view_epochs": 1, "max_steps": 2, "save_strategy": "no"}
    first = of_files(world, tmp_path, **options)
    other.save(tmp_path / "photos" / "03.bmp")
    first.train()
    assert first.cached_teacher.cache.present() == 15
    assert caplog.text.count("03.bmp was changed after its content was identified") == 1
    (tmp_path / "photos" / "03.bmp").write_bytes(before)
    second = of_files(world, tmp_path, **options)
    second.train()
    assert second.cached_teacher.cache.path == first.cached_teacher.cache.path
    assert second.cached_teacher.cache.present() == 16


def plain(embedding=None, activation=nn.ReLU):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 4, 4), activation(), nn.Flatten(2))
    return Backbone.from_module(body, embedding=embedding, size=16, mean=0.5, std=0.5)


def test_plain_networks_of_equal_weights_have_caches_of_their_own():
    """Their fingerprints, which name neighbours and runs on disk, are equal."""
    first, second = (plain(lambda o: o[:, :, 0])), (plain(lambda o: o.mean(2)))
    assert first.fingerprint() == second.fingerprint()
    others = [plain(lambda o: o.mean(2), nn.GELU), plain(lambda o: o.mean(1))]
    assert len({teacher_identity(teacher) for teacher in (first, second, *others)}) == 4
    assert teacher_identity(plain(lambda o: o[:, :, 0])) == teacher_identity(first)


def test_rows_of_other_libraries_are_missing(world, tmp_path, monkeypatch):
    """Pillow and libjpeg decide pixels, NumPy's Generator.choice neighbours."""
    before = libraries()
    monkeypatch.setattr("PIL.__version__", "99.0")
    pillow = libraries()
    monkeypatch.setattr("numpy.__version__", "99.0.1")
    assert len({before, pillow, libraries()}) == 3 and "NumPy 99.0" in libraries()


def test_a_teacher_that_was_put_aside_is_back_after_the_training(world, tmp_path, monkeypatch):
    """The next who uses it, a live trainer or a measurement, expects it on the device."""
    options = {"teacher_cache": str(tmp_path / "cache"), "view_epochs": 1, "max_steps": 6, "neighbors_k": 0}
    Run(world, tmp_path / "first", **options)
    networks = str(world / "teacher"), str(world / "vit")
    trainer = h.make_trainer(tmp_path, world / "images", *networks, **OPTIONS | options)
    placed = []
    monkeypatch.setattr(trainer, "_place_teacher", lambda: placed.append(trainer.state.global_step))
    trainer.train()
    assert placed == [6]


def test_folder_room_and_transform_are_checked_before_neighbours_are_searched(world, tmp_path, monkeypatch):
    """And in a dry run, which writes nothing."""

    def search(*args, **kwargs):
        raise AssertionError("searched")

    monkeypatch.setattr("coss_hf.trainer.trainer.find_neighbors", search)
    networks = str(world / "teacher"), str(world / "vit")
    (tmp_path / "file").write_text("")

    def make(cache="cache", **options):
        options = OPTIONS | {"teacher_cache": str(tmp_path / cache)} | options
        h.make_trainer(tmp_path, world / "images", *networks, **options)

    for more in ({}, {"dry_run": True}):
        with pytest.raises(ValueError, match="file: .* cannot be written .*another folder"):
            make("file", **more)
        with pytest.raises(ValueError, match="the missing rows of .* epochs take .* free there"):
            make(view_epochs=10**9, num_train_epochs=10**9, max_steps=-1, **more)
        with monkeypatch.context() as patched:
            patched.setattr("os.access", lambda path, mode: False)
            with pytest.raises(ValueError, match="cannot be written .*is read-only"):
                make(**more)
        with pytest.raises(AssertionError, match="searched"):
            make(**more)
    assert not (tmp_path / "cache").exists()


def test_a_transform_that_draws_by_itself_is_refused_before_the_search(world, tmp_path, monkeypatch):
    def search(*args, **kwargs):
        raise AssertionError("searched")

    monkeypatch.setattr("coss_hf.trainer.trainer.find_neighbors", search)
    cache = {"teacher_cache": str(tmp_path / "cache"), "view_size": 32, "per_device_train_batch_size": 8}
    args = DistillationArguments(**OPTIONS, **cache, output_dir=str(tmp_path / "out"))
    networks = str(world / "teacher"), str(world / "vit")
    with pytest.raises(ValueError, match="transform.* gives another view .*global generators of random, NumPy"):
        DistillationTrainer(*networks, args, str(world / "images"), transform=from_its_own_generator)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_may_be_this_one_is_not_refused_before_the_search(world, tmp_path, monkeypatch):
    """A full disk that holds all rows already."""
    Run(world, tmp_path / "first", teacher_cache=str(tmp_path / "cache"))
    monkeypatch.setattr("coss_hf.data.teacher_cache.TeacherCache.free_bytes", lambda self: 0)
    run = Run(world, tmp_path / "second", teacher_cache=str(tmp_path / "cache"))
    assert run.embedded == 0


def test_building_a_trainer_writes_nothing(world, tmp_path):
    """A study builds one of each method as a check: it must not touch the files that another run is about to fill."""
    options = OPTIONS | {"teacher_cache": str(tmp_path / "cache")}
    h.make_trainer(
        tmp_path, world / "images", str(world / "teacher"), str(world / "vit"), neighbors=NEIGHBORS, **options
    )
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"bf16": True}, 2e-2),  # a half warm batch is cut otherwise, and bfloat16 has 8 bits
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, 1e-5, marks=pytest.mark.slow),
        pytest.param(
            {"bf16": True, "torch_compile": True, "torch_compile_backend": "eager"}, 2e-2, marks=pytest.mark.slow
        ),
    ],
)
def test_cached_is_live_in_bfloat16_and_compiled(world, tmp_path, options, tolerance):
    short = {"max_steps": 8, "neighbors_k": 0, "view_epochs": 1} | options
    live = SinglePrecisionRun(world, tmp_path / "live", **short)
    cache = {"teacher_cache": str(tmp_path / "cache")}
    cold = SinglePrecisionRun(world, tmp_path / "cold", **short, **cache)
    warm = SinglePrecisionRun(world, tmp_path / "warm", **short, **cache)
    assert (live.embedded, cold.embedded, warm.embedded) == (64, 48, 0)
    assert cold.losses == pytest.approx(live.losses, rel=tolerance)
    assert warm.losses == pytest.approx(live.losses, rel=tolerance)
    other = SinglePrecisionRun(world, tmp_path / "other", **{**short, "bf16": not short.get("bf16")}, **cache)
    assert other.embedded == 48, "what was embedded in another precision is not read"


def test_a_loss_of_maps_is_named_by_its_parameter(world, tmp_path, monkeypatch):
    """The message named --method, coss by default, where the loss was given as a module."""

    class OfMaps(nn.Module):
        uses_maps = True

        def forward(self, student, teacher, index):
            return student.maps[-1].mean() - teacher.maps[-1].mean()

    args = DistillationArguments(str(tmp_path), teacher_cache="cache", view_epochs=1, use_cpu=True)
    networks = str(world / "other"), str(world / "teacher")
    read = []
    monkeypatch.setattr("coss_hf.trainer.inputs.as_splits", lambda *given, **options: read.append(1))
    with pytest.raises(ValueError, match="^teacher_cache=cache .* and criterion=OfMaps reads its feature maps"):
        DistillationTrainer(*networks, args, str(world / "images"), criterion=OfMaps())
    assert not read, "before images are read"
    with pytest.raises(ValueError, match="criterion=OfMaps reads its feature maps"):
        h.make_trainer(tmp_path, world / "images", *networks, criterion=OfMaps(), teacher_cache="cache", view_epochs=1)


def test_few_missing_rows_are_embedded_among_others():
    """A study that was killed had other figures: an image alone is rounded otherwise by a CPU's convolutions."""
    assert CachedTeacher._with_others([5], 16) == [5, 0, 1, 2, 3, 4, 6, 7]
    assert CachedTeacher._with_others([2, 1], 4) == [2, 1, 0, 3]
    assert CachedTeacher._with_others([*range(3, 12)], 16) == [*range(3, 12)]
