"""A folder of images: all of its images, each once, in the right split; each test stands for a fault that was found."""

import json
import logging
import os
from types import SimpleNamespace

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from coss_hf.data.loading import load_images


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(folder, *names: str, form: str | None = None):
    """Images of the given names, each of another colour."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (i, len(str(folder)) % 256, hash(name) % 256)).save(folder / name, form)
    return folder


def load(folder, **options):
    return load_images(str(folder), **options)


def names(rows) -> list[str]:
    return [os.path.basename(record["path"]) for record in rows["image"]]


# ---- splits (huggingface/datasets issues on split names inferred from file names) ----


def test_words_in_file_names_are_no_splits(tmp_path):
    found = ["photo of a train 1.jpg", "red train.jpg", "test.jpg", "test tubes 2.jpg", "val_3.jpg", "a.jpg"]
    splits = load(write(tmp_path / "d", *found))
    assert sorted(names(splits.train)) == sorted(found) and splits.test is None and splits.label_column is None


@pytest.mark.parametrize("classes", [("bus", "train", "dog"), ("train_station", "test tube"), ("dev", "prod")])
def test_a_class_may_be_called_like_a_split(tmp_path, classes, caplog):
    splits = load(write(tmp_path / "d", *(f"{name}/{i}.jpg" for name in classes for i in range(2))))
    assert len(splits.train) == 2 * len(classes) and splits.test is None
    assert splits.train.features["label"].names == sorted(classes)
    if "bus" in classes:
        assert "Folders named train are not taken for splits, since the first level holds bus, dog" in caplog.text


def test_classes_within_splits_may_be_called_like_splits(tmp_path):
    classes = ("bus_station", "train_station", "test", "val")
    files = [f"{split}/{name}/{split}{i}.jpg" for split in ("train", "Val") for name in classes for i in range(3)]
    splits = load(write(tmp_path / "d", *files))
    assert len(splits.train) == len(splits.test) == 12 and splits.validation is None
    assert all("/train/" in record["path"] for record in splits.train["image"])
    assert splits.train.features["label"].names == sorted(classes)
    assert splits.train["label"][:] == [number for number in range(4) for _ in range(3)]


@pytest.mark.parametrize("extra", ["train2/x.jpg", "labels.csv", "README.md", "notes/a.txt"])
def test_splits_with_numbers_and_files_that_are_no_images(tmp_path, extra):
    folder = write(tmp_path / "d", "train2017/a.jpg", "train2017/b.jpg", "val2017/c.jpg", "test-2017/d.jpg")
    (folder / extra).parent.mkdir(exist_ok=True)
    (folder / extra).write_text("x") if not extra.endswith("jpg") else write(folder, extra)
    splits = load(folder, on_bad_image="skip")
    assert len(splits.test) == 1 and len(splits.validation) == 1 and splits.label_column is None
    assert len(splits.train) == 2 + extra.endswith("jpg")


@pytest.mark.parametrize("extra", ["extra/x.jpg", "x.jpg"])
def test_anything_else_on_the_first_level_makes_all_train(tmp_path, extra, caplog):
    splits = load(write(tmp_path / "d", "train/a.jpg", "val/b.jpg", extra))
    assert len(splits.train) == 3 and splits.test is None
    assert f"Folders named train, val are not taken for splits, since the first level holds {extra[:5]}" in caplog.text


def test_folders_of_several_depths_are_no_classes(tmp_path, caplog):
    splits = load(write(tmp_path / "d", "a.jpg", "dog/b.jpg", "cat/c.jpg"))
    assert splits.label_column is None and "different depths" in caplog.text


def test_same_rows_and_labels_as_imagefolder(tmp_path):
    """Views are seeded by row: the order of ordinary folders must not change."""
    found = [
        f"{split}/{c}/{i}.png" for split in ("train", "test") for c in ("a b", "a-b", "a", "B") for i in (1, 10, 2)
    ]
    folder = write(tmp_path / "d", *found)
    theirs = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "other"))
    ours = load(folder)
    for split, rows in (("train", ours.train), ("test", ours.test)):
        expected = theirs[split].cast_column("image", datasets.Image(decode=False))
        assert rows["image"][:] == expected["image"][:] and rows["label"][:] == expected["label"][:]
        assert rows.features["label"] == expected.features["label"]


# ---- links and odd names ----


def test_links_to_folders_and_files_are_followed(tmp_path):
    pool = write(tmp_path / "pool", *(f"class{c}/{i}.jpg" for c in range(3) for i in range(4)))
    (tmp_path / "d" / "class2").mkdir(parents=True)
    for name in ("class0", "class1"):
        (tmp_path / "d" / name).symlink_to(pool / name)
    for file in (pool / "class2").iterdir():
        (tmp_path / "d" / "class2" / file.name).symlink_to(file)
    (tmp_path / "d" / "class2" / "loop").symlink_to(tmp_path / "d")
    (tmp_path / "link").symlink_to(tmp_path / "d")
    for folder in ("d", "link"):
        splits = load(tmp_path / folder)
        assert len(splits.train) == 12 and splits.train.features["label"].names == ["class0", "class1", "class2"]


@pytest.mark.parametrize(
    ("link", "target"),
    [("val", "train"), ("train/again", "train/a"), ("val/x.jpg", "train/a/1.jpg"), ("train/y.jpg", "train/a/1.jpg")],
)
def test_an_image_that_links_put_there_twice_is_refused(tmp_path, link, target):
    folder = write(tmp_path / "d", "train/a/1.jpg", "train/b/2.jpg")
    (folder / link).parent.mkdir(exist_ok=True)
    (folder / link).symlink_to(folder / target)
    with pytest.raises(ValueError, match="would be loaded twice; remove the link"):
        load(folder)


def test_links_of_two_splits_to_one_file_are_refused_and_of_one_are_named(tmp_path, caplog):
    write(tmp_path, "pool.jpg")
    folder = write(tmp_path / "d", "train/1.jpg", "test/2.jpg")
    for name in ("train/a.jpg", "train/b.jpg"):
        (folder / name).symlink_to(tmp_path / "pool.jpg")
    assert len(load(folder).train) == 3 and "1 images are the same file: train/a.jpg and train/b.jpg" in caplog.text
    (folder / "test" / "c.jpg").symlink_to(tmp_path / "pool.jpg")
    with pytest.raises(ValueError, match="are the same file, which would be loaded twice"):
        load(folder)


def test_links_that_lead_nowhere(tmp_path):
    folder = write(tmp_path / "d", "a/1.jpg", "b/2.jpg")
    (folder / "a" / "gone.jpg").symlink_to("/nowhere/3.jpg")
    with pytest.raises(ValueError, match="1 of 3 images .*gone.jpg"):
        load(folder)
    assert len(load(folder, on_bad_image="skip").train) == 2
    (folder / "c").symlink_to("/nowhere/c")
    with pytest.raises(ValueError, match="the link .*/c leads nowhere .to /nowhere/c."):
        load(folder)


def test_unreadable_folder_is_named(tmp_path, monkeypatch):
    folder = write(tmp_path / "d", "a/1.jpg", "b/2.jpg")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match="/d/b cannot be read .Permission denied"):
        load(folder)


ODD = ["a[b]", "a*", "a?b", "a#b%20", "a::b", " a b ", "ü{1}", "line\nbreak", "!x", "-", "~", "$HOME"]


def test_characters_that_are_patterns(tmp_path):
    folder = write(tmp_path / "d[1]*", *(f"{name}/{name}.jpg" for name in ODD))
    splits = load(folder)
    assert sorted(names(splits.train)) == sorted(f"{name}.jpg" for name in ODD)
    assert splits.train.features["label"].names == sorted(ODD)


@pytest.mark.parametrize("form", ["folder", "file"])
def test_parquet_below_a_path_with_patterns(tmp_path, form):
    for name in ("d?1", "dx1"):  # the first matches the second
        (tmp_path / name).mkdir()
        rows = [{"bytes": name.encode(), "path": None}] * 3
        pq.write_table(pa.table({"image": rows}), tmp_path / name / "train.parquet")
    path = tmp_path / "d?1"
    with pytest.raises(ValueError, match="3 of 3 images"):
        load(path if form == "folder" else path / "train.parquet")


def test_names_that_are_not_utf8_are_refused_by_name(tmp_path):
    folder = write(tmp_path / "d", "a.jpg")
    os.rename(folder / "a.jpg", os.fsencode(folder) + b"/caf\xe9.jpg")
    with pytest.raises(ValueError, match=r"1 paths are not UTF-8: .*caf\\xe9.jpg"):
        load(folder)


# ---- other files ----


@pytest.mark.parametrize("suffix", [".json", ".txt", ".xml", ".csv", ".parquet", ".npy", ".jsonl"])
def test_annotations_do_not_decide_the_format(tmp_path, suffix, caplog):
    folder = write(tmp_path / "d", *(f"{i}.jpg" for i in range(4)))
    for i in range(8):
        (folder / f"{i}{suffix}").write_text(json.dumps({"imagePath": f"{i}.jpg"}))
    if suffix == ".parquet":
        pq.write_table(pa.table({"image": ["1.jpg"], "label": [0]}), folder / "0.parquet")
    assert len(load(folder).train) == 4
    assert f"Left out: 8 files that Pillow does not read (8 {suffix}: 0{suffix}, 1{suffix}" in caplog.text


@pytest.mark.parametrize("other", ["d.py", "state.json", "dataset_infos.json", "config.json", "images.zip", "a.tar"])
def test_one_file_does_not_decide_the_format(tmp_path, other):
    folder = write(tmp_path / "d", "a.jpg", "b.jpg")
    (folder / other).write_text("{}")
    assert len(load(folder).train) == 2


def test_a_picture_next_to_parquet_does_not_replace_it(tmp_path, caplog):
    folder = write(tmp_path / "d", "a.jpg", "b.jpg", "c.jpg")
    records = [{"bytes": (folder / "a.jpg").read_bytes(), "path": None}] * 5
    pq.write_table(pa.table({"image": records}), folder / "train.parquet")
    assert len(load(folder).train) == 5 and "left out: 3 .jpg: a.jpg, b.jpg, c.jpg" in caplog.text


def test_parquet_files_that_no_split_names_are_train(tmp_path):
    folder = write(tmp_path / "d", "a.jpg")
    records = [{"bytes": (folder / "a.jpg").read_bytes(), "path": None}]
    for name in ("birds", "test", "cats"):
        pq.write_table(pa.table({"image": records}), folder / f"{name}.parquet")
    splits = load(folder)
    assert len(splits.train) == 2 and len(splits.test) == 1


# ---- left out ----


def test_every_format_that_pillow_reads(tmp_path):
    folder = write(
        tmp_path / "d", "a.jpg", "b.avif", "c.JPG", "d.Png", "e.qoi", "f.webp", "g.pfm.tif", "h.gif", "i.jp2"
    )
    Image.new("F", (4, 4)).save(folder / "j.pfm")
    assert len(load(folder).train) == 10


def test_suffixes_that_say_nothing(tmp_path, caplog):
    write(tmp_path / "d", "a", "b.tmp", "c.2 cat", form="PNG")
    write(tmp_path / "d", "d.jpg_large", form="JPEG")
    write(tmp_path / "d", "e", form="TIFF")
    write(tmp_path / "d", "raw.nef", form="TIFF")  # camera raw: Pillow would read its thumbnail
    (tmp_path / "d" / "notes").write_text("no image")
    (tmp_path / "d" / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic")
    assert sorted(names(load(tmp_path / "d").train)) == ["a", "b.tmp", "c.2 cat", "d.jpg_large", "e"]
    assert "3 files that Pillow does not read" in caplog.text and "photo.heic" in caplog.text


def test_hidden_images_are_left_out_with_a_word(tmp_path, caplog):
    folder = write(tmp_path / "d", "a.jpg", "._a.jpg", ".thumbnails/a.jpg", "__MACOSX/a.jpg", "__x/b.jpg")
    assert sorted(names(load(folder).train)) == ["a.jpg", "b.jpg"]
    assert "3 hidden images (._a.jpg, .thumbnails/a.jpg, __MACOSX/a.jpg)" in caplog.text


def test_a_pipe_is_not_waited_for(tmp_path):
    folder = write(tmp_path / "d", "a.jpg")
    os.mkfifo(folder / "b.jpg")
    assert len(load(folder).train) == 1


def test_no_message_where_no_image_is_left_out(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        load(write(tmp_path / "d", "a.jpg", "b.jpg"))
    assert "left out" not in caplog.text.lower()


# ---- tables ----


def test_a_table_that_names_part_of_the_images(tmp_path, caplog):
    folder = write(tmp_path / "d", *(f"{i}.jpg" for i in range(8)))
    (folder / "metadata.csv").write_text(
        "file_name,label,text\n" + "".join(f"{i}.jpg,{i % 2},t{i}\n" for i in (5, 3, 1))
    )
    splits = load(folder)
    assert names(splits.train) == ["5.jpg", "3.jpg", "1.jpg"] and splits.train["text"][:] == ["t5", "t3", "t1"]
    assert splits.label_column == "label"
    assert "5 images that are not in metadata.csv (0.jpg, 2.jpg, 4.jpg, 6.jpg, 7.jpg)" in caplog.text


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_tables_of_splits_and_one_for_all(tmp_path, form):
    folder = write(tmp_path / "d", "train/x/001", "train/x/002", "test/x/003", form="PNG")

    def table(file, rows):
        if form == "csv":
            file.write_text("file_name,n\n" + "".join(f"{name},{n}\n" for name, n in rows))
        elif form == "jsonl":
            file.write_text("".join(json.dumps({"file_name": name, "n": n}) + "\n" for name, n in rows))
        else:
            pq.write_table(pa.table({"file_name": [r[0] for r in rows], "n": [r[1] for r in rows]}), file)

    rows = [("train/x/001", 1), ("train/x/002", 2), ("test/x/003", 3)]
    table(folder / f"metadata.{form}", rows)
    for _ in range(2):
        splits = load(folder)
        assert splits.train["n"][:] == [1, 2] and splits.test["n"][:] == [3]
        (folder / f"metadata.{form}").unlink(missing_ok=True)
        table(folder / "train" / f"metadata.{form}", [("x/001", 1), ("x\\002", 2)])
        table(folder / "test" / "x" / f"metadata.{form}", [("003", 3)])


def test_classes_called_like_missing_values(tmp_path):
    """All metrics of labels vanished, since some images seemed to have none."""
    folder = write(tmp_path / "d", *(f"{i}.jpg" for i in range(8)))
    labels = ["None", "NA", "null", "n/a", "dog", "NaN", "nan", ""]
    rows = "".join(f"{i}.jpg,{label},{i if i % 2 else ''}\n" for i, label in enumerate(labels))
    (folder / "metadata.csv").write_text("file_name,label,n\n" + rows)
    train = load(folder).train
    assert train["label"][:] == ["None", "NA", "null", "n/a", "dog", None, None, None]
    assert train["n"][:] == [None, 1, None, 3, None, 5, None, 7]


def test_several_images_in_a_row(tmp_path):
    folder = write(tmp_path / "d", "a.jpg", "b.jpg", "mask.png")
    (folder / "metadata.csv").write_text("file_name,mask_file_name\na.jpg,mask.png\nb.jpg,mask.png\n")
    splits = load(folder, image_column="image")
    assert names(splits.train) == ["a.jpg", "b.jpg"]
    assert isinstance(splits.train.features["mask"], datasets.Image)


def test_an_image_that_a_table_names_and_that_is_not_there(tmp_path):
    folder = write(tmp_path / "d", "a.jpg")
    (folder / "metadata.csv").write_text("file_name,n\na.jpg,1\ngone.jpg,2\n,3\n")
    with pytest.raises(ValueError, match="2 of 3 images.*gone.jpg, train row 2"):
        load(folder)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("image,label\na.jpg,1\n", "has no column file_name, but image, label"),
        ("file_name\na.jpg\na.jpg\n", "name 1 images more than once: a.jpg. Keep one row"),
        ("file_name\n../x.jpg\n", "names '../x.jpg', which is not below the folder"),
        ("file_name\nhttps://host/a.jpg\n", "names the URL https://host/a.jpg; download"),
        ("file_name,image\na.jpg,1\n", "has a column image besides"),
        ("", "metadata.csv cannot be read"),
    ],
)
def test_invalid_metadata_tables_are_rejected(tmp_path, table, message):
    folder = write(tmp_path / "d", "a.jpg")
    (folder / "metadata.csv").write_text(table)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_card_that_names_the_files_is_obeyed(tmp_path, caplog):
    folder = write(tmp_path / "d", "one/a.jpg", "one/b.jpg", "two/c.jpg", "three/d.jpg")
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: one/*\n"
    (folder / "README.md").write_text(card + "  - split: test\n    path: two/*\n---\n# Images\n")
    splits = load(folder)
    assert len(splits.train) == 2 and len(splits.test) == 1 and "left out: 1 .jpg: three/d.jpg" in caplog.text


# ---- what is given instead of a folder ----


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("images.zip", "is an archive; unpack it and give the folder"),
        ("images.tar.gz", "is an archive"),
        ("one.jpg", "is one image; give the folder"),
        ("notes.txt", "is not a parquet file"),
    ],
)
def test_metadata_file_that_holds_no_table_is_rejected(tmp_path, name, message):
    (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / name)


def test_a_folder_with_a_script_of_its_name(tmp_path):
    (tmp_path / "d").mkdir()
    for name in ("d.py", "train.csv"):
        (tmp_path / "d" / name).write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="d.py is taken for a loading script.*rename it"):
        load(tmp_path / "d")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://huggingface.co/datasets/a/b/tree/main", "is a URL; give the name a/b"),
        ("https://host/images.zip", "is a URL; download it"),
        ("s3://bucket/images", "is a URL; download it"),
    ],
)
def test_a_url(url, message):
    with pytest.raises(ValueError, match=message):
        load(url)


@pytest.mark.parametrize("loaded", [3, 4, 5])
def test_images_of_the_hub_are_counted(tmp_path, monkeypatch, caplog, loaded):
    """`datasets` loads a repository of images by itself, and guesses the splits from names."""
    folder = write(tmp_path / "d", *(f"{i}.jpg" for i in range(loaded)))
    rows = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    siblings = [SimpleNamespace(rfilename=f"{i}.JPG") for i in range(4)] + [SimpleNamespace(rfilename="README.md")]
    info = SimpleNamespace(siblings=siblings)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, **_: info)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(train=rows))
    if loaded > 4:
        with pytest.raises(ValueError, match="--dataset a/b has 4 images, and 5 were loaded .train 5.*hf download"):
            load_images("a/b")
        return
    assert len(load_images("a/b").train) == loaded
    assert ("3 of 4 images were loaded (train 3)" in caplog.text) == (loaded == 3)
