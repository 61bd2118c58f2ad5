"""Images read as a stream: where it is opened, its first images, and what is held out."""

import errno
import io
import os
import random
import subprocess
import sys
import zipfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import tests.helpers.runs as h
from coss_hf.data.decoding import content_hash, decode
from coss_hf.data.stream_views import MAX_KEY, StreamViews
from coss_hf.data.streams import load_stream
from coss_hf.data.transforms import augmentation
from coss_hf.utils.errors import UnreadableImage
from tests.helpers.hub_server import TOKEN, Hub


@pytest.fixture(params=["tar", "parquet"])
def shards(request, tmp_path):
    return h.write_shards(tmp_path / "shards", request.param)


def views(parts, **options) -> StreamViews:
    return StreamViews(parts.stream, parts.image_column, "cifar", 16, **({"chunk_size": 8} | options))


def keys(chunks) -> list[int]:
    return [key for chunk in chunks for key in chunk.keys.tolist()]


def test_folder_of_shards(shards):
    parts = load_stream(shards, validation_size=6)
    assert parts.label_column in ("label", "cls") and len(parts.validation) == 6 and len(parts.first) == 42
    assert parts.stream.rows.num_shards == 4
    seen = keys(views(parts))
    assert len(set(seen)) == len(seen) == 42, "the held-out images are not trained on"


def test_order_is_shuffled_and_the_same_again(shards):
    parts = load_stream(shards)
    plain = keys(views(parts))
    shuffled = keys(views(parts, shuffle_buffer_size=100, seed=1))
    assert sorted(plain) == sorted(shuffled) and plain != shuffled
    assert shuffled == keys(views(load_stream(shards), shuffle_buffer_size=100, seed=1))
    assert shuffled != keys(views(parts, shuffle_buffer_size=100, seed=2))
    again = views(parts, shuffle_buffer_size=100, seed=1)
    again.set_epoch(1)
    second = keys(again)
    assert sorted(second) == sorted(plain) and second != shuffled


@pytest.mark.parametrize("options", [{}, {"shuffle_buffer_size": 16}])
def test_views_depend_on_seed_epoch_and_image_alone(shards, options):
    """Whichever process reads an image, after whatever: its view is the same."""
    parts = load_stream(shards)

    def by_key(**more):
        given = views(parts, **options, **more)
        given.set_epoch(2)
        return {key: view for chunk in given for key, view in zip(chunk.keys.tolist(), chunk.views, strict=True)}

    one = by_key(seed=5)
    two = by_key(seed=5, processes=2, process=0) | by_key(seed=5, processes=2, process=1, chunk_size=5)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    other = by_key(seed=6)
    assert sum(torch.equal(one[key], other[key]) for key in one) < len(one) / 2


@pytest.mark.parametrize("shuffle", [0, 16])
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 6])
def test_a_pass_resumes_at_any_chunk(shards, shuffle, stop):
    parts = load_stream(shards)
    options = {"shuffle_buffer_size": shuffle, "seed": 3}
    whole = views(parts, **options)
    whole.set_epoch(1)
    chunks = list(whole)
    rest = views(load_stream(shards), **options)
    rest.start_at({"epoch": 1, "states": [chunks[stop - 1].state], "next": 0})
    assert keys(chunks[:stop]) + keys(rest) == keys(chunks) and len(keys(chunks)) == 48


def test_a_stream_that_shuffles_by_itself_resumes_too(tmp_path):
    """Its `state_dict` forgets what waits in its buffer (a warning of datasets): images would be left out."""
    shards = h.write_shards(tmp_path / "shards", "tar")
    files = sorted(map(str, shards.iterdir()))
    stream = datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True).shuffle(seed=7)
    parts = load_stream(stream)
    whole = views(parts, shuffle_buffer_size=100)
    chunks = list(whole)
    assert whole.shuffles_itself and len(set(keys(chunks))) == 48
    rest = views(parts)
    rest.start_at({"epoch": 0, "states": [chunks[2].state], "next": 0})
    assert keys(chunks[:3]) + keys(rest) == keys(chunks)
    assert parts.stream.identity == load_stream(stream).stream.identity
    assert parts.stream.identity != load_stream(stream.shuffle()).stream.identity, "without a seed"


@pytest.mark.parametrize("on_bad_image", ["error", "skip"])
def test_damaged_images(tmp_path, on_bad_image):
    rows = [{"image": {"bytes": _png(seed), "path": f"{seed}.png"}} for seed in range(40)]
    for damaged in (2, 30):
        rows[damaged]["image"]["bytes"] = rows[damaged]["image"]["bytes"][:20]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    stream = datasets.Dataset.from_list(rows, features=features).to_iterable_dataset(num_shards=2)
    if on_bad_image == "error":
        with pytest.raises(ValueError, match="2.png cannot be decoded"):
            load_stream(stream, validation_size=4)
        with pytest.raises(ValueError, match=r"--on_bad_image error: .*2\.png"):
            list(views(load_stream(stream)))
        return
    parts = load_stream(stream, validation_size=4, on_bad_image="skip")
    assert parts.bad_images == ["2.png"] and len(parts.validation) == 4
    given = views(parts, on_bad_image="skip")
    chunks = list(given)
    assert len(set(keys(chunks))) == len(keys(chunks)) == 34
    assert [name for chunk in chunks for name in chunk.left_out] == ["2.png", "30.png"]


def _png(seed: int) -> bytes:
    buffer = io.BytesIO()
    h.colour_images(1, seed)[0][0].save(buffer, "png")
    return buffer.getvalue()


def test_streams_of_any_origin():
    """A generator of PIL images without types, and one that is cut short."""

    def images():
        for seed in range(30):
            yield {"photo": h.colour_images(1, seed)[0][0], "name": f"{seed}"}

    parts = load_stream(datasets.IterableDataset.from_generator(images))
    assert parts.image_column == "photo" and len(keys(views(parts))) == 30
    short = load_stream(datasets.IterableDataset.from_generator(images).skip(3).take(20).with_format("torch"))
    assert len(set(keys(views(short)))) == 20


def test_splits_of_a_stream(tmp_path, image_parquet):
    parts = load_stream(image_parquet)
    assert len(parts.validation) == 24 and len(parts.first) == 48 and len(keys(views(parts))) == 48
    assert np.array_equal(parts.stream.held_out, np.unique(np.array(parts.validation["image_hash"][:], np.uint64)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_train_samples": 3}, "--max_train_samples 3: a stream is read in order"),
        ({"validation_size": 0.1}, "--validation_size 0.1: a stream has no length"),
        ({"validation_size": 48}, "--validation_size 48: .* has 48 images; at least 1"),
        ({"image_column": "photo"}, "--image_column photo does not exist"),
        ({"train_split": "all"}, "--train_split all: "),
    ],
)
def test_bad_input(shards, options, message):
    with pytest.raises(ValueError, match=message):
        load_stream(shards, **options)


def test_inputs_other_than_streams_are_rejected(tmp_path):
    h.colour_images(1, 0)[0][0].save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="--streaming reads parquet files or tar files.*it holds none"):
        load_stream(tmp_path)
    h.write_shards(tmp_path / "both", "tar")
    (tmp_path / "both" / "a.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="it holds .parquet and .tar files"):
        load_stream(tmp_path / "both")
    rows = datasets.Dataset.from_dict({"text": ["a"] * 4}).to_iterable_dataset()
    with pytest.raises(ValueError, match="--image_column: "):
        load_stream(rows)
    divided = datasets.distributed.split_dataset_by_node(rows, 0, 2)
    with pytest.raises(ValueError, match="divided by split_dataset_by_node already"):
        load_stream(divided)


@pytest.mark.slow
def test_a_dataset_on_the_hub():
    """Pushed to a Hub in this process, and streamed from it by another one."""
    hub = Hub()
    options = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    environment = os.environ | options | {"PYTHONPATH": str(h.ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", STREAMED], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.split()[-4:] == ["2", "5", "label", "35"]


STREAMED = """
import datasets, tests.helpers.runs as h
from coss_hf.data.streams import load_stream

images, labels = h.colour_images(40, 0)
features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abcd"))})
rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
rows.push_to_hub("me/pictures", num_shards=2)
parts = load_stream("me/pictures", validation_size=5)
from tests.data.test_streams import keys, views
print(parts.stream.rows.num_shards, len(parts.validation), parts.label_column, len(set(keys(views(parts)))))
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_the_order_of_a_stream_is_kept_in_every_pass(shards, workers):
    """`datasets` shuffles the shards of any pass but the first by itself."""
    loader = StreamLoaderOfKeys(views(load_stream(shards), workers=workers), workers)
    passes = [loader.next_pass() for _ in range(3)]
    assert passes[0] == passes[1] == passes[2] and len(set(passes[0])) == 48
    assert "same order in each pass" in views(load_stream(shards)).identity()["--shuffle_buffer_size"]
    shuffled = load_stream(shards)
    again = views(shuffled, shuffle_buffer_size=16)
    assert keys(again) != (again.set_epoch(1), keys(again))[1]
    itself = datasets.Dataset.from_parquet(parquet_of(shards)).to_iterable_dataset(num_shards=2)
    itself = views(load_stream(itself.shuffle(seed=0, buffer_size=16)))
    assert keys(itself) != (itself.set_epoch(1), keys(itself))[1], "a stream that shuffles by itself goes its own way"


class StreamLoaderOfKeys:
    """Keys of one pass after the other, read by persistent workers."""

    def __init__(self, given: StreamViews, workers: int):
        self.views = given
        self.loader = torch.utils.data.DataLoader(
            given, batch_size=None, num_workers=workers, persistent_workers=workers > 0, collate_fn=lambda chunk: chunk
        )
        self.number = 0

    def next_pass(self) -> list[int]:
        self.views.set_epoch(self.number)
        self.number += 1
        return keys(self.loader)


def test_large_photographs_are_decoded_at_a_reduced_scale(tmp_path):
    """At full size each took several times as long, and the option was ignored."""
    coarse = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((400, 300), Image.Resampling.BICUBIC).save(buffer, "jpeg", quality=95)
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": [{"bytes": buffer.getvalue(), "path": None}]}, features=features)
    rows.to_parquet(tmp_path / "photographs.parquet")
    parts = load_stream(tmp_path)

    def view(**options) -> torch.Tensor:
        stream = StreamViews(parts.stream, parts.image_column, "imagenet", 16, chunk_size=1, seed=5, **options)
        return next(iter(stream)).views[0].float()

    reduced, full = view(), view(reduced_decoding=False)
    assert 0 < (reduced - full).abs().mean() < 4
    assert not torch.equal(view(view_seed=6), reduced) and torch.equal(view(view_seed=5), reduced)
    fixed = rows[0]["image"].convert("RGB")
    torch.default_generator.manual_seed(StreamViews._key(5, 0, content_hash(buffer.getvalue()) & MAX_KEY))
    assert torch.equal(augmentation("imagenet", 16)(fixed).float(), full), "as of earlier versions"


def test_the_seed_of_views_leaves_the_order_as_it_is(shards):
    parts = load_stream(shards)
    one, two = (views(parts, shuffle_buffer_size=16, seed=1, view_seed=seed) for seed in (None, 2))
    assert keys(one) == keys(two)
    changed = {name for name, value in one.identity().items() if two.identity()[name] != value}
    assert changed == {"--view_seed"}


def test_an_image_that_is_null_is_left_out(tmp_path):
    features = datasets.Features({"image": datasets.Image()})
    images = [h.colour_images(1, 0)[0][0], None]
    datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(tmp_path / "a.parquet")
    parts = load_stream(tmp_path)
    chunks = list(views(parts, on_bad_image="skip"))
    assert len(keys(chunks)) == 1 and [name for chunk in chunks for name in chunk.left_out] == [
        "row 1 of worker 0 of process 0"
    ]
    with pytest.raises(UnreadableImage, match="on_bad_image error: row 1 of worker 0 .* --on_bad_image skip"):
        list(views(parts))


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError])
def test_a_transform_that_fails_is_no_bad_image(shards, kind):
    calls = []

    def fails(image):
        calls.append(image)
        if len(calls) > 10:
            raise kind("of the transform")
        return torch.from_numpy(np.array(image.resize((16, 16)))).permute(2, 0, 1)

    parts = load_stream(shards)
    given = StreamViews(parts.stream, parts.image_column, fails, 16, chunk_size=8, on_bad_image="skip")
    with pytest.raises(kind, match="of the transform"):
        list(given)


def parquet_of(shards) -> list[str]:
    """The same images as parquet shards."""
    if not list(shards.glob("*.parquet")):
        h.write_shards(shards.parent / "parquet", "parquet")
        shards = shards.parent / "parquet"
    return sorted(map(str, shards.glob("*.parquet")))


def draws_from_all(image) -> torch.Tensor:
    """A transform of the user's own, of every global generator."""
    view = torch.from_numpy(np.array(image.resize((16, 16)))).permute(2, 0, 1)
    shift = random.randrange(60) + np.random.randint(60) + int(torch.randint(60, ()))
    return (view // 4 + shift).to(torch.uint8)


def test_views_of_a_transform_that_draws_from_any_global_generator(shards):
    def by_key(**options) -> dict[int, torch.Tensor]:
        parts = load_stream(shards)
        given = StreamViews(parts.stream, parts.image_column, draws_from_all, 16, **({"chunk_size": 8} | options))
        return {key: view for chunk in given for key, view in zip(chunk.keys.tolist(), chunk.views, strict=True)}

    before = random.getstate(), str(np.random.get_state())
    one = by_key()
    assert before == (random.getstate(), str(np.random.get_state()))
    two = by_key(chunk_size=5, shuffle_buffer_size=16)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def far_stream(monkeypatch, out_of_reach=(), damaged=(), problem=None) -> datasets.IterableDataset:
    """A stream of 40 images by path, on another machine."""

    def xopen(path, mode):
        seed = int(path.removeprefix("far://").removesuffix(".png"))
        if seed in out_of_reach:
            raise problem or ConnectionError("no route to host")
        return io.BytesIO(_png(seed)[: 20 if seed in damaged else None])

    monkeypatch.setattr("coss_hf.data.streams.xopen", xopen)
    rows = [{"image": {"bytes": None, "path": f"far://{seed}.png"}} for seed in range(40)]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    return datasets.Dataset.from_list(rows, features=features).to_iterable_dataset()


@pytest.mark.parametrize("out_of_reach", [3, 30])
@pytest.mark.parametrize("on_bad_image", ["error", "skip"])
def test_an_image_that_cannot_be_downloaded_is_not_left_out(monkeypatch, on_bad_image, out_of_reach):
    """It counted as damaged: with "skip", images were missing where the network was."""
    stream = far_stream(monkeypatch, {out_of_reach})
    message = rf"^far://{out_of_reach}.png cannot be read \(no route to host\); give the same command once it can be"
    with pytest.raises(UnreadableImage, match=message):
        list(views(load_stream(stream, on_bad_image=on_bad_image), on_bad_image=on_bad_image))


def test_a_damaged_member_of_an_archive_is_a_damaged_image(monkeypatch):
    stream = far_stream(monkeypatch, {3, 30}, problem=zipfile.BadZipFile("Bad CRC-32"))
    assert len(keys(views(load_stream(stream, on_bad_image="skip"), on_bad_image="skip"))) == 38
    with pytest.raises(ValueError, match="far://3.png"):
        list(views(load_stream(stream)))


def test_a_stream_of_paths_is_evaluated(monkeypatch):
    """What is held out was refused as URLs, which training reads."""
    stream = far_stream(monkeypatch, damaged={2, 30})
    with pytest.raises(ValueError, match=r"--on_bad_image error: image far://2\.png cannot be decoded"):
        load_stream(stream, validation_size=4)
    parts = load_stream(stream, validation_size=4, on_bad_image="skip")
    assert parts.bad_images == ["far://2.png"] and len(parts.validation) == 4
    for rows, seed in ((parts.validation, 0), (parts.first, 5)):
        assert rows["image_hash"][0] == content_hash(_png(seed))
        assert decode(rows["image"][0]).tobytes() == h.colour_images(1, seed)[0][0].tobytes()
    chunks = list(views(parts, on_bad_image="skip"))
    assert len(keys(chunks)) == 34
    assert [name for chunk in chunks for name in chunk.left_out] == ["far://2.png", "far://30.png"]


@pytest.mark.parametrize("reads", ["stream_bytes", "decode_reduced"])
def test_too_many_open_files_are_no_damaged_image(shards, monkeypatch, reads):
    def fails(*args):
        raise OSError(errno.EMFILE, "Too many open files")

    given = views(load_stream(shards), on_bad_image="skip")
    monkeypatch.setattr(f"coss_hf.data.stream_views.{reads}", fails)
    with pytest.raises(OSError, match="Too many open files"):
        list(given)


def test_a_split_with_other_columns_is_held_out():
    """A column that the training split lacks ended in a KeyError."""
    images = [h.colour_images(1, seed)[0][0] for seed in range(20)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 10}, features=features)
    more = rows.add_column("source", ["web"] * 20)
    splits = {"train": rows.to_iterable_dataset(), "test": more.to_iterable_dataset()}
    parts = load_stream(datasets.IterableDatasetDict(splits))
    assert len(parts.validation) == 20 and parts.label_column == "label" and parts.validation["source"][0] == "web"
    splits["test"] = more.rename_column("image", "photo").to_iterable_dataset()
    with pytest.raises(ValueError, match=r"--image_column image does not exist; .*images held out.*photo"):
        load_stream(datasets.IterableDatasetDict(splits))
