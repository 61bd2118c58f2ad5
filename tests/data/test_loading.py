import errno
import logging
import shutil
from hashlib import blake2b
from io import BytesIO
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image

import tests.helpers.runs as h
from coss_hf.data.decoding import decode
from coss_hf.data.encoded_files import EncodedFiles
from coss_hf.data.loading import load_images


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def png(i: int) -> bytes:
    buffer = BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def content_hash(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def write_parquet(file, rows, column="image", labels=True, start=0, paths=False, image_type=None):
    """Parquet that `datasets` did not write: no feature metadata. Bytes as given, else numbers of pictures."""
    data = [row if isinstance(row, bytes | None) else png(row) for row in rows]
    records = [{"bytes": d, "path": f"{start + i:03d}.png" if paths else None} for i, d in enumerate(data)]
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {column: pa.array(records if image_type is None else data, image_type or struct)}
    if labels:
        columns["label"] = pa.array([i % 3 for i in range(len(data))], pa.int64())
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)
    return str(file)


def hashes(rows: Dataset) -> list[int]:
    return rows.with_format(None)["image_hash"][:]


def write_folder(folder, count=6):
    for split in ("train", "test"):
        for i in range(count):
            file = folder / split / f"class{i % 2}" / f"{split}_{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(i + 100 * (split == "test")))


def test_parquet_without_metadata(tmp_path):
    file = write_parquet(tmp_path / "pictures.parquet", range(8))
    splits = load_images(file)
    assert (splits.image_column, splits.label_column, splits.bad_images) == ("image", "label", [])
    assert splits.validation is None and splits.test is None
    assert splits.train.features["image"] == datasets.Image(decode=False)
    assert splits.train.features["image_hash"] == Value("uint64")
    assert hashes(splits.train) == [content_hash(png(i)) for i in range(8)]
    assert splits.train[5]["image"]["bytes"] == png(5) and splits.train["label"][:] == [i % 3 for i in range(8)]


@pytest.mark.parametrize("image_type", [pa.binary(), pa.large_binary()])
def test_columns_of_encoded_bytes(tmp_path, image_type):
    splits = load_images(write_parquet(tmp_path / "a.parquet", range(4), column="img", image_type=image_type))
    assert splits.image_column == "img" and hashes(splits.train) == [content_hash(png(i)) for i in range(4)]
    assert decode(splits.train[0]["img"]).size == (8, 9)


def test_column_of_paths(tmp_path):
    write_folder(tmp_path / "pictures", 2)
    files = sorted(str(p) for p in (tmp_path / "pictures" / "train").rglob("*.png"))
    pq.write_table(pa.table({"image": files, "caption": ["a", "b"]}), tmp_path / "a.parquet")
    splits = load_images(str(tmp_path / "a.parquet"))
    assert hashes(splits.train) == [content_hash(png(0)), content_hash(png(1))] and splits.label_column is None


@pytest.mark.parametrize("form", ["folder", "glob", "test named otherwise"])
def test_parquet_files_become_splits(tmp_path, form):
    write_parquet(tmp_path / "d" / "train-00000-of-00002.parquet", range(3))
    write_parquet(tmp_path / "d" / "train-00001-of-00002.parquet", range(3, 5))
    write_parquet(tmp_path / "d" / ("valid.parquet" if form == "test named otherwise" else "test.parquet"), [9])
    splits = load_images(str(tmp_path / "d" / "*.parquet") if form == "glob" else str(tmp_path / "d"))
    assert hashes(splits.train) == [content_hash(png(i)) for i in range(5)]
    assert hashes(splits.test) == [content_hash(png(9))]


def test_image_folder_with_classes_and_with_metadata(tmp_path):
    write_folder(tmp_path / "d")
    splits = load_images(str(tmp_path / "d"))
    assert splits.label_column == "label" and splits.train.features["label"].names == ["class0", "class1"]
    assert sorted(hashes(splits.train)) == sorted(content_hash(png(i)) for i in range(6))
    assert sorted(hashes(splits.test)) == sorted(content_hash(png(100 + i)) for i in range(6))
    for split in ("train", "test"):
        names = [p.relative_to(tmp_path / "d" / split) for p in sorted((tmp_path / "d" / split).rglob("*.png"))]
        lines = "".join(f'{{"file_name": "{name}", "mood": "calm"}}\n' for name in names)
        (tmp_path / "d" / split / "metadata.jsonl").write_text(lines)
    splits = load_images(str(tmp_path / "d"))
    assert splits.train["mood"][0] == "calm" and splits.label_column is None and len(splits.train) == 6


def test_hashes_are_the_same_from_every_kind_of_storage(tmp_path):
    write_folder(tmp_path / "d")
    splits = load_images(str(tmp_path / "d"))
    expected = hashes(splits.train)
    splits.train.save_to_disk(tmp_path / "saved")
    DatasetDict(train=splits.train, test=splits.test).save_to_disk(tmp_path / "both")
    embedded = splits.train.with_format("arrow").map(datasets.table.embed_table_storage, batched=True)
    embedded.with_format(None).to_parquet(tmp_path / "p.parquet")
    shutil.rmtree(tmp_path / "d")  # so that nothing can be read through its paths
    assert hashes(load_images(str(tmp_path / "saved")).train) == expected
    both = load_images(str(tmp_path / "both"))
    assert hashes(both.train) == expected and hashes(both.test) == hashes(splits.test)
    assert hashes(load_images(str(tmp_path / "p.parquet")).train) == expected


def test_a_hash_column_that_came_along_is_not_trusted(tmp_path):
    rows = load_images(write_parquet(tmp_path / "a.parquet", range(4))).train
    liar = rows.remove_columns("image_hash").add_column("image_hash", [1, 2, 3, 4])
    liar.save_to_disk(tmp_path / "saved")
    assert hashes(load_images(str(tmp_path / "saved")).train) == hashes(rows)


def test_the_check_is_cached_until_the_images_change(tmp_path, monkeypatch):
    decoded = []
    monkeypatch.setattr("coss_hf.data.checking.decode", decoded.append)
    file = write_parquet(tmp_path / "a.parquet", range(40))
    load_images(file), load_images(file, validation_size=5, seed=1), load_images(file, on_bad_image="skip", num_proc=1)
    assert len(decoded) == 40
    write_parquet(tmp_path / "a.parquet", range(1, 41))
    assert hashes(load_images(file).train)[0] == content_hash(png(1)) and len(decoded) == 80
    load_images(file, max_train_samples=7)
    assert len(decoded) == 80, "another subset of the same images"
    other = write_parquet(tmp_path / "b.parquet", range(40))
    load_images(other, max_train_samples=30)
    assert len(decoded) == 110  # only the images in use
    load_images(other)
    assert len(decoded) == 120  # only those that are new
    load_images(file).train.save_to_disk(tmp_path / "saved")
    load_images(str(tmp_path / "saved"))
    assert not list((tmp_path / "saved").glob("cache*"))  # the user's folder may be read-only


def test_the_check_runs_in_processes(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", [*range(7), b"no image"])
    splits = load_images(file, num_proc=2, on_bad_image="skip")
    assert hashes(splits.train) == [content_hash(png(i)) for i in range(7)] and splits.bad_images == ["train row 7"]


def test_the_check_runs_in_all_processors(tmp_path, monkeypatch):
    """Also behind matrix products in this process, whose threads a forked one must not wait for."""
    monkeypatch.setattr("coss_hf.data.checking.PARALLEL_FROM", 20)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(2))
    started = []
    run = datasets.Dataset.map
    monkeypatch.setattr("datasets.Dataset.map", lambda *a, **kw: started.append(kw.get("num_proc")) or run(*a, **kw))
    torch.set_num_threads(2)
    torch.randn(500, 500) @ torch.randn(500, 500)
    splits = load_images(write_parquet(tmp_path / "a.parquet", range(40)))
    assert started[-1] == 2 and hashes(splits.train) == [content_hash(png(i)) for i in range(40)]


def test_without_content_only_a_sample_is_read(tmp_path, monkeypatch):
    """50,000 images took half a minute before the first step, again with each --max_train_samples."""
    decoded = []
    monkeypatch.setattr("coss_hf.data.checking.decode", decoded.append)
    file = write_parquet(tmp_path / "a.parquet", range(60), paths=True)
    splits = load_images(file, by_content=False, validation_size=10)
    assert len(decoded) == 16 and "image_hash" not in splits.train.column_names
    assert len(set(splits.train["image_file_hash"][:])) == 50
    load_images(file, by_content=False, sample=40)
    assert 16 < len(decoded) <= 16 + 40
    decoded.clear()
    load_images(file, by_content=False, validation_size=10, on_bad_image="skip", seed=3)
    assert len(decoded) <= 26, "what is evaluated on is read as well"


def test_without_content_files_are_told_apart_by_name_and_size(tmp_path):
    write_folder(tmp_path / "d")

    def found(name="d") -> dict[str, int]:
        rows = load_images(str(tmp_path / name), by_content=False).train
        return {row["image"]["path"][-5:]: row["image_file_hash"] for row in rows}

    before = found()
    (tmp_path / "d" / "train" / "class0" / "train_2.png").write_bytes(png(7) + b" ")
    after = found()
    assert len(before) == 6 and [name for name, value in after.items() if before[name] != value] == ["2.png"]
    (tmp_path / "d").rename(tmp_path / "moved")
    assert found("moved") == after
    (tmp_path / "moved" / "train" / "class0" / "train_4.png").write_bytes(b"")
    with pytest.raises(ValueError, match="1 of .* cannot be decoded: .*train_4.png"):
        load_images(str(tmp_path / "moved"), by_content=False, sample=1)


def test_rows_that_were_selected_keep_their_sizes(tmp_path):
    """The table of a selected dataset holds all rows, in its own order."""
    file = write_parquet(tmp_path / "a.parquet", [0, png(1)[:50], 2, 3], paths=True)
    rows = load_images(file, by_content=False, on_bad_image="skip").train
    assert len(rows) == 3
    files = EncodedFiles(rows.select([2, 0]), "image")
    assert files.names == ["003.png", "000.png"] and files.sizes.tolist() == [len(png(3)), len(png(0))]


BAD = [0, b"", 2, png(3)[:60], None, b"hello", 6]


@pytest.mark.parametrize("paths", [False, True])
def test_bad_images_are_named_and_skipped(tmp_path, caplog, paths):
    write_parquet(tmp_path / "d" / "train.parquet", BAD, paths=paths)
    write_parquet(tmp_path / "d" / "test.parquet", [7, b"x"], paths=paths, start=50)
    names = ["001.png", "003.png", "004.png", "005.png"] if paths else [f"train row {i}" for i in (1, 3, 4, 5)]
    with pytest.raises(ValueError, match="--on_bad_image error: 4 of 7 images of split train") as caught:
        load_images(str(tmp_path / "d"))
    assert ", ".join(names) in str(caught.value) and "skip" in str(caught.value)
    with caplog.at_level(logging.WARNING):
        splits = load_images(str(tmp_path / "d"), on_bad_image="skip")
    assert splits.bad_images == [*names, "051.png" if paths else "test row 1"]
    assert ", ".join(names) in caplog.text and "4 of 7" in caplog.text
    assert hashes(splits.train) == [content_hash(png(i)) for i in (0, 2, 6)]  # rows are counted without them
    assert [splits.train[i]["label"] for i in range(3)] == [0, 2, 0]
    assert hashes(splits.test) == [content_hash(png(7))]


def test_a_missing_record_and_a_missing_file_are_bad_images(tmp_path):
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    records = [None, {"bytes": None, "path": str(tmp_path / "gone.png")}, {"bytes": png(1), "path": None}]
    pq.write_table(pa.table({"image": pa.array(records, struct)}), tmp_path / "a.parquet")
    splits = load_images(str(tmp_path / "a.parquet"), on_bad_image="skip")
    assert splits.bad_images == ["train row 0", str(tmp_path / "gone.png")]
    assert hashes(splits.train) == [content_hash(png(1))]


def test_a_file_that_a_table_points_to_is_checked_again_once_it_changes(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0)[:50])
    pq.write_table(pa.table({"image": [str(tmp_path / "a.png")]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.png"):
        load_images(str(tmp_path / "a.parquet"))
    (tmp_path / "a.png").write_bytes(png(0))
    assert hashes(load_images(str(tmp_path / "a.parquet")).train) == [content_hash(png(0))]


def test_an_image_folder_with_a_truncated_file(tmp_path):
    write_folder(tmp_path / "d")
    broken = tmp_path / "d" / "train" / "class0" / "train_2.png"
    broken.write_bytes(broken.read_bytes()[:80])
    with pytest.raises(ValueError, match="train_2.png"):
        load_images(str(tmp_path / "d"))
    assert load_images(str(tmp_path / "d"), on_bad_image="skip").bad_images == [str(broken)]
    broken.write_bytes(png(2))  # repaired: the cached check no longer counts
    assert len(load_images(str(tmp_path / "d")).train) == 6


def test_validation_and_subset_are_disjoint_and_seeded(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", range(40))
    of = {content_hash(png(i)): i for i in range(40)}

    def rows(**options):
        splits = load_images(file, **options)
        return tuple([of[h] for h in hashes(part)] if part else None for part in (splits.train, splits.validation))

    train, validation = rows(validation_size=10)
    assert len(validation) == 10 and sorted(train + validation) == list(range(40)) and train == sorted(train)
    assert rows(validation_size=0.25) == rows(validation_size=10.0) == (train, validation)
    assert rows(validation_size=10, seed=1)[1] != validation
    small, same = rows(validation_size=10, max_train_samples=8)
    smaller, _ = rows(validation_size=10, max_train_samples=4)
    assert same == validation and len(small) == 8 and set(smaller) < set(small) < set(train)
    assert small == sorted(small) and small != train[:8]  # folders are sorted by class: not the first ones
    assert rows(max_train_samples=99) == (list(range(40)), None)


def test_a_transform_of_the_dataset_is_refused():
    """Images are read from their files: the user's crop was never called, and nothing said so."""
    images = Dataset.from_dict({"image": list(h.colour_images(4, 0)[0])}).cast_column("image", datasets.Image())
    with pytest.raises(ValueError, match=r"its with_transform would not be called.*drop it by with_format\(None\)"):
        load_images(images.with_transform(lambda rows: rows))
    assert len(load_images(images.with_format("torch"), validation_size=0).train) == 4


def test_columns_are_found_by_type_before_name(tmp_path):
    features = Features(
        {"photo": datasets.Image(), "image": Value("string"), "coarse": ClassLabel(2), "fine_label": ClassLabel(3)}
    )
    records = {"photo": [{"bytes": png(i), "path": None} for i in range(3)], "image": ["a", "b", "c"]}
    rows = Dataset.from_dict({**records, "coarse": [0, 1, 0], "fine_label": [0, 1, 2]}, features=features)
    rows.save_to_disk(tmp_path / "d")
    splits = load_images(str(tmp_path / "d"))
    assert (splits.image_column, splits.label_column) == ("photo", "fine_label")
    assert load_images(str(tmp_path / "d"), label_column="coarse").label_column == "coarse"
    rows.remove_columns("fine_label").save_to_disk(tmp_path / "one")
    assert load_images(str(tmp_path / "one")).label_column == "coarse"


@pytest.mark.parametrize("nothing", [None, -1])
def test_a_column_without_labels_is_ignored(tmp_path, nothing, caplog):
    train = load_images(write_parquet(tmp_path / "a.parquet", range(3))).train
    empty = (bare := train.remove_columns("label")).add_column("label", [nothing] * 3, feature=ClassLabel(2))
    empty.save_to_disk(tmp_path / "empty")
    for i, test in enumerate((bare, empty)):
        DatasetDict(train=train, test=test).save_to_disk(tmp_path / f"{i}")
        assert load_images(str(tmp_path / f"{i}")).label_column is None and caplog.text.count("has no labels") == i + 1
    with pytest.raises(ValueError, match="--label_column label contains only None or -1"):
        load_images(str(tmp_path / "empty"), label_column="label")


def test_splits_by_name(tmp_path):
    part = load_images(write_parquet(tmp_path / "a.parquet", range(3))).train
    DatasetDict(fit=part, check=part.select([0])).save_to_disk(tmp_path / "d")
    splits = load_images(str(tmp_path / "d"), train_split="fit", test_split="check")
    assert len(splits.train) == 3 and len(splits.test) == 1
    DatasetDict(whole=part).save_to_disk(tmp_path / "one")
    assert len(load_images(str(tmp_path / "one")).train) == 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"on_bad_image": "ignore"}, "--on_bad_image ignore: choose error or skip"),
        ({"validation_size": -1}, "--validation_size -1"),
        ({"validation_size": 2.5}, "--validation_size 2.5"),
        ({"validation_size": float("nan")}, "--validation_size nan"),
        ({"validation_size": 6}, "--validation_size 6: 6 of the 6 images"),
        ({"validation_size": 0.01}, "--validation_size 0.01: 0 of the 6 images"),
        ({"max_train_samples": 0}, "--max_train_samples 0"),
        ({"train_split": "trian"}, "--train_split trian: .* has only the splits train, test, empty"),
        ({"test_split": "dev"}, "--test_split dev: .* has only the splits train, test, empty"),
        ({"test_split": "train"}, "--test_split train: the same split"),
        ({"train_split": "empty"}, r"--train_split empty: the split is empty; .* train \(6\), test \(2\), empty \(0\)"),
        ({"image_column": "picture"}, "--image_column picture does not exist; .* columns image, label, text"),
        ({"image_column": "label"}, "--image_column label does not contain images"),
        ({"label_column": "class"}, "--label_column class does not exist; .* can be: label"),
        ({"label_column": "text"}, "--label_column text is not a ClassLabel"),
    ],
)
def test_bad_arguments_are_named(tmp_path, options, message):
    image = [{"bytes": png(i), "path": None} for i in range(6)]
    features = Features({"image": datasets.Image(), "label": ClassLabel(6), "text": Value("string")})
    rows = Dataset.from_dict({"image": image, "label": range(6), "text": ["t"] * 6}, features=features)
    splits = DatasetDict(train=rows, test=rows.select([0, 1]), empty=rows.select([]))
    splits.save_to_disk(tmp_path / "d")
    with pytest.raises(ValueError, match=message):
        load_images(str(tmp_path / "d"), **options)


def test_an_empty_parquet_file_is_an_empty_split(tmp_path):
    write_parquet(tmp_path / "d" / "train.parquet", range(3))
    write_parquet(tmp_path / "d" / "test.parquet", [])
    with pytest.raises(ValueError, match="--dataset .* a split is empty"):
        load_images(str(tmp_path / "d"))


def test_no_several_and_only_unreadable_images(tmp_path):
    texts = Dataset.from_dict({"text": ["a"], "score": [1.0]})
    texts.save_to_disk(tmp_path / "texts")
    with pytest.raises(ValueError, match="--image_column: no image column found, .* columns text, score"):
        load_images(str(tmp_path / "texts"))
    record = [{"bytes": png(0), "path": None}]
    pair = Features({"left": datasets.Image(), "right": datasets.Image()})
    Dataset.from_dict({"left": record, "right": record}, features=pair).save_to_disk(tmp_path / "pair")
    with pytest.raises(ValueError, match=r"--image_column: several image columns \(left, right\)"):
        load_images(str(tmp_path / "pair"))
    assert load_images(str(tmp_path / "pair"), image_column="right").image_column == "right"
    with pytest.raises(ValueError, match="--on_bad_image skip: no image is left of the 2"):
        load_images(write_parquet(tmp_path / "bad.parquet", [b"x", b"y"]), on_bad_image="skip")


def test_paths_without_images_are_refused(tmp_path):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "bad.parquet").write_text("hello")
    for dataset, reason in (
        ("nothing", "cannot be loaded"),
        ("notes.txt", "not a parquet file"),
        ("bad.parquet", "cannot be loaded"),
        ("*.pq", "no file matches"),
    ):
        with pytest.raises(ValueError, match=reason) as caught:
            load_images(str(tmp_path / dataset))
        assert f"--dataset {tmp_path / dataset}" in str(caught.value)


def test_hub_dataset_is_loaded_by_name_configuration_and_revision(monkeypatch, tmp_path):
    rows = load_images(write_parquet(tmp_path / "a.parquet", range(3))).train
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        return DatasetDict(train=rows)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, **_: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_images("a/b", name="plain", revision="v1").train) == 3
    assert asked == [("a/b", {"name": "plain", "revision": "v1"})]


def test_cifar10(shared):
    splits = load_images(str(shared / "data" / "cifar10"), max_train_samples=100, test_split="test")
    assert len(splits.train) == 100 and len(splits.test) == 10_000 and splits.label_column == "label"
    assert decode(splits.train[0][splits.image_column]).size == (32, 32)


def test_a_validation_split_next_to_test_replaces_held_out_images(tmp_path):
    for split, rows in (("train", range(6)), ("validation", range(10, 13)), ("test", range(20, 22))):
        write_parquet(tmp_path / "d" / f"{split}.parquet", rows)
    splits = load_images(str(tmp_path / "d"))
    assert [len(rows) for rows in splits[:3]] == [6, 3, 2]
    carved = load_images(str(tmp_path / "d"), validation_size=2)
    assert [len(rows) for rows in carved[:3]] == [4, 2, 2]


def test_a_selection_is_not_written_into_the_users_folder(tmp_path):
    """The column of hashes was joined to a copy of all rows, next to the user's dataset; it may be read-only, too."""
    write_parquet(tmp_path / "a.parquet", range(6))
    Dataset.from_parquet(str(tmp_path / "a.parquet")).save_to_disk(tmp_path / "saved")
    before = sorted((tmp_path / "saved").iterdir())
    found = load_images(datasets.load_from_disk(tmp_path / "saved").select([4, 1, 3])).train
    assert hashes(found) == [content_hash(png(i)) for i in (4, 1, 3)] and found["label"][:] == [1, 1, 0]
    assert sorted((tmp_path / "saved").iterdir()) == before


def test_a_check_that_cannot_be_kept_ends_no_run(tmp_path, monkeypatch, caplog):
    """It also left a file of its beginning behind."""

    def full(file, **arrays):
        Path(file).write_bytes(b"begun")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("coss_hf.data.checking.np.savez", full)
    assert len(load_images(write_parquet(tmp_path / "a.parquet", range(20))).train) == 20
    assert "Which images were checked is not kept in" in caplog.text and "No space left" in caplog.text
    assert not list((tmp_path / "cache" / "coss_hf" / "checked").iterdir())


def test_too_many_open_files_are_no_bad_image(tmp_path, monkeypatch):
    def fails(record):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("coss_hf.data.checking.encoded_bytes", fails)
    with pytest.raises(OSError, match="Too many open files"):
        load_images(write_parquet(tmp_path / "a.parquet", range(4)), on_bad_image="skip")
