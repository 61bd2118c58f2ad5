"""Training on a stream: every image once a pass, and a resumed run is the uninterrupted one."""

import hashlib
import itertools
import json
import logging
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch

import tests.helpers.runs as h
from coss_hf import DistillationArguments, DistillationTrainer
from coss_hf.data.stream_views import StreamViews
from coss_hf.data.streams import load_stream
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.trainer.dry_run import describe
from coss_hf.trainer.factory import build_run
from coss_hf.trainer.stream_loader import StreamLoader
from tests.trainer.test_crash import end, wait_for


@pytest.fixture(scope="module", params=["tar", "parquet"])
def shards(request, tmp_path_factory):
    return h.write_shards(tmp_path_factory.mktemp("stream") / request.param, request.param)


def make_loader(folder, *, batch_size=8, workers=0, process=0, processes=1, shuffle=0, position=None) -> StreamLoader:
    parts = load_stream(folder)
    views = StreamViews(
        parts.stream,
        parts.image_column,
        "cifar",
        16,
        chunk_size=batch_size,
        shuffle_buffer_size=shuffle,
        process=process,
        processes=processes,
        workers=workers,
    )
    args = SimpleNamespace(
        per_device_train_batch_size=batch_size,
        device=torch.device("cpu"),
        dataloader_num_workers=workers,
        dataloader_prefetch_factor=None,
        dataloader_pin_memory=False,
    )
    return StreamLoader(views, args, position)


def batches_and_places(loader: StreamLoader, count: int) -> list[tuple[torch.Tensor, torch.Tensor, dict]]:
    found = [(b["index"], b["pixel_values"], loader.position) for b in itertools.islice(loader, count)]
    if loader.base_dataloader._iterator is not None:
        loader.base_dataloader._iterator._shutdown_workers()
    return found


def keys(batches) -> list[int]:
    return [key for index, *_ in batches for key in index.tolist()]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [4, 7])
def test_every_image_once_a_pass(shards, processes, batch_size):
    """Also where batches do not divide a pass: what is left over begins the first batch of the next one."""
    share = 48 // processes
    batches = -(-2 * share // batch_size)
    loaders = [make_loader(shards, batch_size=batch_size, process=p, processes=processes) for p in range(processes)]
    seen = [keys(batches_and_places(loader, batches)) for loader in loaders]
    first = Counter(key for one in seen for key in one[:share])
    second = Counter(key for one in seen for key in one[share : 2 * share])
    assert len(first) == 48 and first == second and set(first.values()) == {1}


def check_resumed(shards, **options) -> None:
    """A run that ends after any batch is continued by one that starts there, at the same views."""
    whole = batches_and_places(make_loader(shards, **options), 18)
    for stop in (1, 3, 4, 6, 7, 10, 13):
        rest = batches_and_places(make_loader(shards, position=whole[stop - 1][2], **options), 18 - stop)
        assert keys(whole[:stop]) + keys(rest) == keys(whole), stop
        assert all(torch.equal(a[1], b[1]) for a, b in zip(whole[stop:], rest, strict=True)), stop
    assert set(Counter(keys(whole)[:48]).values()) == {1}


@pytest.mark.parametrize(
    ("batch_size", "shuffle"),
    [(5, 16), (8, 0), *[pytest.param(*each, marks=pytest.mark.slow) for each in ((5, 0), (8, 16))]],
)
def test_resumes_after_any_batch(shards, shuffle, batch_size):
    check_resumed(shards, shuffle=shuffle, batch_size=batch_size)


SLOW = [
    pytest.param(workers, processes, counts, marks=pytest.mark.slow)
    for workers in (1, 2, 3, 5)
    for processes in (1, 2)
    for counts in ((12, 12, 12, 12), (5, 20, 3, 20))
]


@pytest.mark.parametrize(("workers", "processes", "counts"), [(2, 1, (5, 20, 3, 4)), *SLOW])
def test_resumes_after_any_batch_with_workers(tmp_path, workers, processes, counts):
    """Workers whose shards end earlier than those of others, and workers without a shard."""
    folder = h.write_shards(tmp_path / "shards", "tar", counts)
    options = {"workers": workers, "processes": processes, "batch_size": 5, "shuffle": 8}
    for process in range(processes):
        whole = batches_and_places(make_loader(folder, process=process, **options), 9)
        for stop in (1, 4, 6, 8):
            rest = make_loader(folder, process=process, position=whole[stop - 1][2], **options)
            assert keys(whole[:stop]) + keys(batches_and_places(rest, 9 - stop)) == keys(whole), stop


def make_trainer(tmp_path, networks, train_dataset, output="out", data=None, **options) -> DistillationTrainer:
    options = {
        "settings": "paper",
        "per_device_train_batch_size": 8,
        "max_steps": 9,
        "augmentation": "cifar",
        "learning_rate": 0.01,
        "save_steps": 2,
        "logging_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    } | options
    args = DistillationArguments(str(tmp_path / output), **options)
    return DistillationTrainer(networks.teacher, networks.resnet, args, train_dataset, data=data)


def sha(folder) -> str:
    return hashlib.sha256(Path(folder, "model.safetensors").read_bytes()).hexdigest()


def stream_of(shards) -> datasets.IterableDataset:
    kind = "webdataset" if list(shards.glob("*.tar")) else "parquet"
    files = sorted(map(str, shards.iterdir()))
    return datasets.load_dataset(kind, data_files=files, split="train", streaming=True)


def check_training(tmp_path, networks, shards, workers: int) -> None:
    """Six steps are one pass; the run is stopped in the second one, and resumed."""
    data = DataArguments(shuffle_buffer_size=20, validation_size=0)
    options = {"dataloader_num_workers": workers, "data": data}
    whole = make_trainer(tmp_path, networks, stream_of(shards), "whole", **options)
    recorder = h.Recorder(whole)
    whole.train()
    whole.save_model()
    seen = [key for batch in recorder.batches for key in batch["index"].tolist()]
    assert len(set(seen[:48])) == 48 and len(seen) == 72 and len(set(seen[48:])) == 24
    assert whole.state.epoch == 1 and whole.images_seen == 72
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["train_images"] is None

    short = make_trainer(tmp_path, networks, stream_of(shards), "parts", **options)
    before = h.Recorder(short)
    short.add_callback(h.StopAfter(7))
    short.train()
    resumed = make_trainer(tmp_path, networks, stream_of(shards), "parts", resume_from_checkpoint="auto", **options)
    after = h.Recorder(resumed)
    resumed.train()
    resumed.save_model()
    done = before.batches[:6] + after.batches  # step 6 is the newest checkpoint
    assert [key for batch in done for key in batch["index"].tolist()] == seen
    assert resumed.state.epoch == 1 and sha(tmp_path / "parts") == sha(tmp_path / "whole")


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path, networks, shards):
    check_training(tmp_path, networks, shards, workers=0)


@pytest.mark.slow
def test_a_resumed_training_with_workers_is_the_uninterrupted_one(tmp_path, networks, shards):
    check_training(tmp_path, networks, shards, workers=2)


def test_a_run_with_workers_is_resumed_without_naming_them(tmp_path, networks):
    """``train`` is told only there that it resumes: the workers of this machine were compared with the run's own."""
    shards = h.write_shards(tmp_path / "shards", "tar")
    options = {"settings": "auto", "max_steps": 3, "save_strategy": "steps"}
    options["data"] = DataArguments(validation_size=0)
    begun = make_trainer(tmp_path, networks, stream_of(shards), dataloader_num_workers=1, **options)
    begun.add_callback(h.StopAfter(2))
    begun.train()
    resumed = make_trainer(tmp_path, networks, stream_of(shards), **options)
    assert resumed.args.dataloader_num_workers == 0, "on every machine"
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.args.dataloader_num_workers == resumed.train_dataset.workers == 1 and resumed.state.global_step == 3


def test_evaluated_on_the_first_images(tmp_path, networks):
    shards = h.write_shards(tmp_path / "shards", "tar")
    data = DataArguments(streaming=True, validation_size=12)
    trainer = make_trainer(tmp_path, networks, str(shards), data=data, max_steps=2, eval_steps=1)
    trainer.train()
    trainer.save_model()
    measured = [entry for entry in trainer.state.log_history if "eval_cosine" in entry]
    assert len(measured) == 3 and "eval_knn10" in measured[0]
    record = trainer.report().record
    assert record["evaluated_images"] == 12 and record["results"]["student"]
    assert record["arguments"]["streaming"] is True


def test_skipped_images_are_recorded(tmp_path, networks, caplog):
    images, _ = h.colour_images(32, 0)
    rows = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    rows = rows.cast_column("image", datasets.Image(decode=False)).to_list()
    rows[5]["image"] = {"bytes": rows[5]["image"]["bytes"][:30], "path": "5.png"}
    features = datasets.Features({"image": datasets.Image(decode=False)})
    stream = datasets.Dataset.from_list(rows, features=features).to_iterable_dataset(num_shards=2)
    data = DataArguments(on_bad_image="skip", validation_size=0)
    trainer = make_trainer(tmp_path, networks, stream, data=data, max_steps=4, save_strategy="no")
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.train_dataset.replaced_names() == ["5.png"] and "1 images were left out: 5.png" in caplog.text
    with pytest.raises(ValueError, match="on_bad_image.*5.png"):
        make_trainer(tmp_path, networks, stream, max_steps=4).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neighbors_k": 2}, "^neighbors_k=2: neighbours are searched among all images"),
        ({"view_epochs": 2}, "^view_epochs=2: views that come back are numbered by image"),
        ({"teacher_cache": "auto"}, "^teacher_cache='?auto'?: views that come back are numbered by image"),
        ({"view_epochs": 2, "teacher_cache": "auto"}, "^view_epochs=2: views that come back are numbered by image"),
        ({"method": "crd"}, "^method=crd keeps a memory with a row for each training image"),
        ({"method": "coss + factor"}, "^method=factor learns from images in random order"),
        ({"max_steps": -1}, "^max_steps is missing: nobody knows"),
        ({"lr_milestones": [1.0]}, "^lr_milestones are epochs"),
        ({"eval_strategy": "epoch"}, "^eval_strategy=epoch: "),
    ],
)
def test_what_needs_an_index_or_a_length_is_refused(tmp_path, networks, options, message):
    images, _ = h.colour_images(16, 0)
    stream = datasets.Dataset.from_dict({"image": images}).to_iterable_dataset()
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, networks, stream, **options)


def test_length_in_images_and_another_number_of_workers(tmp_path, networks):
    shards = h.write_shards(tmp_path / "shards", "tar")
    trainer = make_trainer(tmp_path, networks, stream_of(shards), max_steps=-1, num_images=40, save_steps=4)
    trainer.train()
    assert trainer.state.global_step == 5 and trainer.images_seen == 40
    for options, message in (
        ({"dataloader_num_workers": 2}, "another --dataloader_num_workers .then 0, each at its place in the stream"),
        ({"data": DataArguments(shuffle_buffer_size=0)}, "another --shuffle_buffer_size"),
        ({"seed": 4}, "another --seed"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(
                tmp_path, networks, stream_of(shards), resume_from_checkpoint="auto", **options
            ).find_checkpoint("auto")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_on_the_command_line(tmp_path, networks, shards, workers):
    """Killed after step 4, resumed; and the same run without interruption."""
    world = {"teacher": networks.teacher, "student": networks.resnet, "images": shards, "cache": tmp_path / "cache"}
    options = {
        "streaming": True,
        "neighbors_k": 0,
        "max_steps": 9,
        "save_steps": 2,
        "dataloader_num_workers": workers,
        "shuffle_buffer_size": 10,
        "use_cpu": True,
    }

    def run(output, *argv, **more) -> str:
        process = h.start_distill(world, tmp_path / output, *argv, processes=2, **(options | more))
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
        return out

    run("whole")
    killed = h.start_distill(world, tmp_path / "parts", processes=2, **options)
    wait_for(killed, lambda: (tmp_path / "parts" / "checkpoint-4").exists())
    end(killed, signal.SIGKILL)
    killed.communicate()
    assert "Resuming from" in run("parts", "--resume_from_checkpoint=auto")
    assert sha(tmp_path / "parts") == sha(tmp_path / "whole")
    process = h.start_distill(world, tmp_path / "whole", "--resume_from_checkpoint=auto", processes=1, **options)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2 and "--num_processes (then 2, each at its place" in err


def test_a_dry_run_says_that_it_is_a_stream(tmp_path, networks, monkeypatch):
    shards = h.write_shards(tmp_path / "shards", "tar")
    monkeypatch.setattr("coss_hf.trainer.factory.rehearse", lambda *_: None)
    data = DataArguments(dataset=str(shards), streaming=True, validation_size=8)
    args = DistillationArguments(
        str(tmp_path / "out"), num_images=4_000, dry_run=True, use_cpu=True, per_device_train_batch_size=8
    )
    run = build_run(ModelArguments(networks.teacher, networks.resnet), data, args)
    text = describe(run.trainer)
    assert "train a stream of 4 shards, validation 8; column 'png', labels 'cls'" in text
    assert "500 steps, 4,000 images seen" in text


def test_a_queue_needs_no_rows(tmp_path, networks):
    """SEED was refused as a loss with a memory of each image."""
    images, _ = h.colour_images(16, 0)
    stream = datasets.Dataset.from_dict({"image": images}).to_iterable_dataset()
    trainer = make_trainer(tmp_path, networks, stream, method="seed(queue_size=16)", max_steps=2)
    trainer.train()
    assert trainer.full_model.criterion.queue.shape[1] == 16 and trainer.state.global_step == 2
    with pytest.raises(ValueError, match=r"queue_size=3 must be a multiple of the batch of \d+ images\."):
        make_trainer(tmp_path / "other", networks, stream, method="seed(queue_size=3)", max_steps=2)
