"""Rows of embeddings on disk: whatever happens to the files, a row is right or missing."""

import multiprocessing
import os
import pickle
import random
import signal
import time

import numpy as np
import pytest
import torch

import tests.helpers.runs as h
from coss_hf.data.teacher_cache import MAP, META, ROWS, TeacherCache, collate
from coss_hf.data.transform_identity import transform_identity
from coss_hf.data.transforms import augmentation

SHAPE = (2, 10, 3, 8)  # 2 epochs, 10 images, 3 views, 8 numbers
IDENTITY = {"--teacher": "a", "--augmentation": "cifar"}


def right(rows) -> torch.Tensor:
    """What row i holds: numbers that tell i."""
    return (torch.arange(8.0) + 1) * 0.1 + torch.as_tensor(rows, dtype=torch.float32)[:, None]


def cache_in(folder, identity=IDENTITY, shape=SHAPE, **options) -> TeacherCache:
    cache = TeacherCache(folder, identity, shape, **options)
    cache.create()
    return cache


def filled(folder, rows=range(60), **options) -> TeacherCache:
    cache = cache_in(folder, **options)
    cache.write(list(rows), right(rows))
    cache.flush()
    return cache


def assert_right_or_missing(cache, rows=range(60)) -> int:
    """Number of rows that are there."""
    found, known = cache.read(list(rows))
    known = torch.tensor(known)
    torch.testing.assert_close(found[known], right(rows)[known], rtol=0, atol=0)
    assert not found[~known].any()
    return int(known.sum())


def test_rows_come_back_in_any_order_and_from_any_process(tmp_path):
    cache = cache_in(tmp_path)
    assert cache.present() == 0 and assert_right_or_missing(cache) == 0
    for rows in ([41, 3], [7], [58, 0, 59]):
        cache.write(rows, right(rows))
    cache.flush()
    found, known = cache.read([59, 5, 3])
    assert known == [True, False, True]
    assert torch.equal(found, torch.stack([right([59])[0], torch.zeros(8), right([3])[0]]))
    again = TeacherCache(tmp_path, IDENTITY, SHAPE)  # not created: reads only
    assert again.present() == 6 and not again.is_complete() and assert_right_or_missing(again) == 6
    assert assert_right_or_missing(pickle.loads(pickle.dumps(cache))) == 6  # in a loader worker that is not forked


def test_the_file_is_an_array_of_epochs_images_views_and_numbers(tmp_path):
    cache = filled(tmp_path)
    array = np.memmap(cache.path / ROWS, np.float32, "r", shape=SHAPE)
    row = (1 * 10 + 4) * 3 + 2
    assert np.array_equal(array[1, 4, 2], right([row])[0].numpy())


def test_float16_rows_are_rounded_and_one_that_overflows_is_not_kept(tmp_path):
    cache = cache_in(tmp_path, dtype="float16")
    values = right([1, 2, 3])
    values[1, 5] = 1e6
    values[2, 0] = float("nan")
    cache.write([1, 2, 3], values)
    cache.flush()
    found, known = cache.read([1, 2, 3])
    assert known == [True, False, False]
    assert torch.equal(found[0], right([1])[0].half().float())


def test_rows_of_anything_else_are_missing(tmp_path):
    """Features of another teacher, of other views or sizes, are those of no view here."""
    filled(tmp_path)
    others = [
        {"identity": {**IDENTITY, "--teacher": "b"}},
        {"identity": {**IDENTITY, "--augmentation": "moco"}},
        {"shape": (2, 10, 1, 8)},
        {"shape": (2, 5, 3, 8)},
        {"dtype": "float16"},
    ]
    for other in others:
        cache = cache_in(tmp_path, **other)
        assert cache.present() == 0 and not any(cache.read([0, 1, 2])[1])
    cache = TeacherCache(tmp_path, {**IDENTITY, "--teacher": "c"}, SHAPE)
    assert "differs in --teacher" in cache.differences()


def test_more_view_epochs_extend_the_cache_of_fewer(tmp_path):
    """The views of the first 2 of 5 epochs are those of 2 epochs."""
    filled(tmp_path)
    longer = cache_in(tmp_path, shape=(5, 10, 3, 8))
    assert longer.present() == 60 and assert_right_or_missing(longer, range(150)) == 60
    longer.write([149], right([149]))
    longer.flush()
    shorter = cache_in(tmp_path)
    assert shorter.is_complete() and (shorter.path / ROWS).stat().st_size == 150 * 32


@pytest.mark.parametrize("name", [ROWS, MAP])
@pytest.mark.parametrize("damage", ["bits", "zeros", "noise", "shifted", "swapped", "short", "gone"])
def test_damaged_files_lose_rows_and_never_make_a_wrong_one(tmp_path, name, damage):
    path = filled(tmp_path).path / name
    data = path.read_bytes()
    rng = random.Random(0)
    if damage == "bits":
        changed = bytearray(data)
        for _ in range(20):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif damage == "zeros":
        changed = data[:100] + bytes(200) + data[300:]
    elif damage == "noise":
        changed = rng.randbytes(len(data))
    elif damage == "shifted":
        width = len(data) // 60
        changed = data[width:] + data[:width]
    elif damage == "swapped":
        half = len(data) // 2
        changed = data[half:] + data[:half]
    else:
        changed = data[: len(data) // 2]
    path.unlink() if damage == "gone" else path.write_bytes(changed)
    cache = cache_in(tmp_path)
    assert assert_right_or_missing(cache) < 60
    cache.write(list(range(60)), right(range(60)))
    cache.flush()
    assert assert_right_or_missing(cache_in(tmp_path)) == 60


def test_files_of_another_teacher_under_this_ones_name_are_missing(tmp_path):
    """The fingerprint is part of each checksum: a folder that was renamed, or copied over, gives no row."""
    mine = cache_in(tmp_path)
    other = filled(tmp_path, identity={**IDENTITY, "--teacher": "b"})
    for name in (ROWS, MAP):
        (mine.path / name).write_bytes((other.path / name).read_bytes())
    assert mine.present() == 60 and assert_right_or_missing(cache_in(tmp_path)) == 0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"--teacher": "b"}'])
def test_a_damaged_description_changes_nothing(tmp_path, text):
    cache = filled(tmp_path)
    (cache.path / META).write_text(text)
    again = cache_in(tmp_path)
    assert assert_right_or_missing(again) == 60
    assert "--teacher" in (again.path / META).read_text()


def _fill_for_ever(folder, seed: int, ready) -> None:
    cache = cache_in(folder)
    rng = random.Random(seed)
    ready.set()
    while True:
        rows = rng.sample(range(60), 7)
        cache.write(rows, right(rows))
        if rng.random() < 0.3:
            cache.flush()


def test_killed_at_any_moment_while_several_fill_it(tmp_path):
    """No lock is held and nothing is half written for the next run."""
    context = multiprocessing.get_context("fork")
    rng = random.Random(1)
    there = 0
    for round in range(6):
        ready = [context.Event() for _ in range(2)]
        writers = [context.Process(target=_fill_for_ever, args=(tmp_path, round + i, ready[i])) for i in range(2)]
        for writer in writers:
            writer.start()
        for event in ready:
            event.wait(20)
        time.sleep(rng.uniform(0.0, 0.05))
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
        there = assert_right_or_missing(TeacherCache(tmp_path, IDENTITY, SHAPE))
    assert there > 30


def test_a_crash_of_the_machine_loses_rows_that_are_not_flushed(tmp_path, monkeypatch):
    """The map is written behind the data, and only what the data's own flush has brought to the disk."""
    order = []
    monkeypatch.setattr("os.fdatasync", lambda file: order.append(os.readlink(f"/proc/self/fd/{file}")[-4:]))
    real = os.pwrite

    def pwrite(file, data, position):
        order.append("write " + os.readlink(f"/proc/self/fd/{file}")[-4:])
        return real(file, data, position)

    cache = cache_in(tmp_path)
    monkeypatch.setattr("os.pwrite", pwrite)
    cache.write([1], right([1]))
    assert cache.present() == 0
    cache.flush()
    assert order == ["write rows", "rows", "write /map", "/map"]


def test_a_disk_that_is_too_small_is_refused_with_sizes(tmp_path):
    cache = TeacherCache(tmp_path / "new" / "folder", IDENTITY, (100, 10**9, 1, 4096))
    with pytest.raises(
        ValueError, match=r"--teacher_cache=.* take 1,.* TB \(1,000,000,000 images x 1 views x 4096 .*free"
    ):
        cache.check_free_space(100)
    assert not (tmp_path / "new").exists()
    small = filled(tmp_path)
    small.free_bytes = lambda: 0
    small.check_free_space(2)  # all is there


def test_read_only_cache_is_rejected_where_it_holds_nothing(tmp_path, monkeypatch, caplog):
    """Each epoch leaves out the images that fill no batch, so that a cache of one run hardly ever holds every row."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--teacher_cache=.*file: .* cannot be written .*another folder"):
        cache_in(tmp_path / "file")
    filled(tmp_path / "nothing", ())
    filled(tmp_path / "most", range(59))
    filled(tmp_path / "whole")
    assert "98 % there" in cache_in(tmp_path / "most").describe()

    def read_only(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.open", read_only)
    with pytest.raises(ValueError, match="Permission denied.*can be read where it holds rows"):
        cache_in(tmp_path / "nothing")
    cache = cache_in(tmp_path / "whole")
    cache.write([3], right([4]))  # nothing to write to: it stays as it is
    assert assert_right_or_missing(cache) == 60 and not caplog.text
    assert assert_right_or_missing(cache_in(tmp_path / "most")) == 59
    assert "lacks some rows: the teacher embeds these each time" in caplog.text


def test_a_row_that_is_written_while_it_is_read_is_the_one_whose_checksum_was_compared(tmp_path, monkeypatch):
    cache = filled(tmp_path)
    checksum = cache._checksum

    def overwritten(row, data):
        with open(cache.path / ROWS, "r+b") as file:
            file.seek(row * cache.row_bytes)
            file.write(bytes(cache.row_bytes))
        return checksum(row, data)

    monkeypatch.setattr(cache, "_checksum", overwritten)
    assert assert_right_or_missing(cache) == 60


def test_the_description_of_a_cache_stops_nothing(tmp_path, monkeypatch):
    """Two containers had one process number, and replaced each other's temporary file."""

    def gone(*args):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr("os.replace", gone)
    assert assert_right_or_missing(filled(tmp_path)) == 60


def test_files_that_cannot_be_written_will_do_for_the_epochs_that_they_hold(tmp_path, monkeypatch, caplog):
    """A shared folder of 2 epochs, for the first 2 of 5."""
    filled(tmp_path)
    monkeypatch.setattr("os.access", lambda path, mode: False)

    def read_only(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("os.open", read_only)
    cache = TeacherCache(tmp_path, IDENTITY, (5, 10, 3, 8))
    assert not cache.check_writable(2)
    cache.create(2)
    assert cache.is_complete(2) and not cache.is_complete() and assert_right_or_missing(cache, range(150)) == 60
    assert not caplog.text
    cache.create(3)
    assert "lacks some rows" in caplog.text


def test_files_are_closed_with_the_cache(tmp_path):
    """A study opens one cache a trial."""
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        cache = filled(tmp_path)
        cache.create()
    assert assert_right_or_missing(cache) == 60  # mapped, too
    del cache
    assert len(os.listdir("/proc/self/fd")) == before


def test_files_have_one_byte_order(tmp_path):
    assert TeacherCache(tmp_path, IDENTITY, SHAPE).dtype.str == "<f4"
    assert TeacherCache(tmp_path, IDENTITY, SHAPE, dtype="float16").dtype.str == "<f2"


def test_a_disk_that_fills_up_ends_the_keeping_not_the_training(tmp_path, caplog):
    cache = cache_in(tmp_path, shape=(1, 10_000, 1, 8))
    with h.no_file_larger_than(1000):
        cache.write(list(range(60)), right(range(60)))
        cache.write([0], right([0]))
        cache.flush()
    assert caplog.text.count("cannot be written any more") == 1
    assert assert_right_or_missing(cache) == 0


def test_what_a_batch_brings(tmp_path):
    cache = filled(tmp_path, [3, 4, 12, 13, 14])
    items = cache.items(3, [1, 4], [[False] * 3, [False, True, False]])  # epoch 3 of 2: the second
    second = collate([item | {} for item in items])
    assert second["missing"] == [0, 1, 2, 3, 4, 5] and second["missing_rows"] == [33, 34, 35, 42, -1, 44]
    first = collate(cache.items(2, [1, 4], [[False] * 3, [False, True, False]]))
    # Another image stands in for that of row 13: the row is another image's.
    assert first["missing"] == [2, 4] and first["missing_rows"] == [5, -1]
    assert torch.equal(first["cached"][[0, 1, 3, 5]], right([3, 4, 12, 14]))
    cache.write(first["missing_rows"], right([5, 99]))
    cache.flush()
    assert cache.present() == 6
    assert collate([{"pixel_values": torch.zeros(1)}]) == {}


def half_flip(image):
    view = augmentation("none", 32)(image)
    return view.flip(-1) if torch.rand(()) < 0.5 else view


def maker(probability):
    def rare(image):
        view = augmentation("none", 32)(image)
        return view.flip(-1) if torch.rand(()) < probability else view

    return rare


def from_numpy(image):
    view = augmentation("none", 32)(image)
    return view.flip(-1) if np.random.rand() < 0.5 else view


def from_its_own_generator(image, generator=np.random.default_rng(0)):  # noqa: B008 - as it is done
    view = augmentation("none", 32)(image)
    return view.flip(-1) if generator.random() < 0.5 else view


RARE = 0.0001


def by_global(image):
    view = augmentation("none", 32)(image)
    return view.flip(-1) if torch.rand(()) < RARE else view


class Flip:
    """Without a printed form of its own."""

    def __init__(self, probability):
        self.probability = probability

    def __call__(self, image):
        view = augmentation("none", 32)(image)
        return view.flip(-1) if torch.rand(()) < self.probability else view


def test_attributes_and_globals_of_a_transform_count(monkeypatch):
    """Neither shows in its source text, and a rare one not in the views of test images."""
    found = [transform_identity(Flip(p), "flip", 32) for p in (0.0001, 0.0002, 0.0001)]
    assert found[0] != found[1] and found[0] == found[2]
    first = transform_identity(by_global, "name", 32)
    monkeypatch.setitem(globals(), "RARE", 0.0002)
    assert transform_identity(by_global, "name", 32) != first


def test_transforms_are_known_by_what_they_do():
    """Two lambdas have one name; a change that shows in one view of ten thousand is another transform, too."""
    transforms = [
        augmentation("cifar", 32),
        augmentation("imagenet", 32),
        augmentation("moco", 32),
        half_flip,
        maker(0.0001),
        maker(0.0002),
        lambda image: augmentation("none", 32)(image),
        lambda image: augmentation("none", 32)(image).flip(-1),
    ]
    found = [transform_identity(transform, "name", 32) for transform in transforms]
    assert len(set(found)) == len(found)
    again = [
        augmentation("cifar", 32),
        augmentation("imagenet", 32),
        augmentation("moco", 32),
        half_flip,
        maker(0.0001),
    ]
    assert [transform_identity(transform, "name", 32) for transform in again] == found[:5]
    assert transform_identity(from_numpy, "name", 32) == transform_identity(from_numpy, "name", 32) not in found
    with pytest.raises(ValueError, match="--transform=mine gives another view .*global generators of random, NumPy"):
        transform_identity(from_its_own_generator, "mine", 32)
