"""Images that tables name by a path (huggingface/datasets reports on relative paths and on columns of URLs)."""

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from coss_hf.data.decoding import decode
from coss_hf.data.loading import load_images


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")


def write(folder, paths, images=(), struct=False, name="train.parquet"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / image)
    column = [None if path is None else {"bytes": None, "path": path} for path in paths] if struct else paths
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()}) if struct else pa.string()
    table = pa.table({"number": list(range(len(paths))), "image": pa.array(column, kind), "text": ["t"] * len(paths)})
    pq.write_table(table, folder / name)
    return folder


@pytest.mark.parametrize("struct", [False, True])
@pytest.mark.parametrize("form", ["file", "folder", "glob"])
def test_relative_paths_start_at_the_folder_of_the_table(tmp_path, form, struct):
    folder = write(tmp_path / "d", ["x/0.png", "./x/1.png"], struct=struct)
    write(tmp_path / "d" / "x", [], ["0.png", "1.png"], name="unused")
    (tmp_path / "d" / "x" / "unused").unlink()
    if form == "folder":  # without the images, which would make it a folder of images
        write(tmp_path / "d2", ["../d/x/0.png", "../d/x/1.png"], struct=struct)
    given = {"file": folder / "train.parquet", "folder": tmp_path / "d2", "glob": folder / "*.parquet"}[form]
    train = load_images(str(given), image_column="image").train
    assert [decode(record).getpixel((0, 0))[0] for record in train["image"]] == [0, 1]
    assert set(train.column_names) == {"number", "image", "text", "image_hash"} and train["number"][:] == [0, 1]


def test_relative_paths_of_a_table_without_other_columns(tmp_path):
    """They failed, since a table without columns has no rows."""
    folder = write(tmp_path / "d", [], ["0.png", "1.png"])
    pq.write_table(pa.table({"image": ["0.png", "1.png"]}), folder / "train.parquet")
    train = load_images(str(folder / "train.parquet"), image_column="image").train
    assert [decode(record).getpixel((0, 0))[0] for record in train["image"]] == [0, 1]
    assert set(train.column_names) == {"image", "image_hash"}


def test_folder_of_the_table_is_searched_before_the_current_folder(tmp_path):
    write(tmp_path / "elsewhere", [], ["0.png"])
    for expected in ("elsewhere", "d"):
        folder = write(tmp_path / "d", ["0.png"], ["0.png"] if expected == "d" else [])
        train = load_images(str(folder / "train.parquet")).train
        assert train["image"][0]["path"] == str(tmp_path / expected / "0.png")


def test_ambiguous_relative_path_is_rejected(tmp_path):
    for part in ("a", "b"):
        write(tmp_path / "d" / part, ["0.png"], ["0.png"], name=f"{part}.parquet")
    with pytest.raises(ValueError, match="0.png may be .*a/0.png or .*b/0.png.*absolute paths, or one table"):
        load_images(str(tmp_path / "d" / "*" / "*.parquet"))


@pytest.mark.parametrize("struct", [False, True])
def test_urls_are_refused_as_urls(tmp_path, struct):
    folder = write(tmp_path / "d", ["https://host/a.jpg?x=1", None, "https://host/b.jpg"], struct=struct)
    with pytest.raises(ValueError, match="column image holds URLs .https://host/a.jpg.*download them"):
        load_images(str(folder), image_column="image")


def test_url_among_files_counts_as_bad_image(tmp_path):
    folder = write(tmp_path / "d", ["0.png", "s3://bucket/b.jpg"])
    write(tmp_path / "d", ["0.png", "s3://bucket/b.jpg"], ["0.png"])
    with pytest.raises(ValueError, match="1 of 2 images .*s3://bucket/b.jpg.*a URL: images are not downloaded"):
        load_images(str(folder / "train.parquet"))
    splits = load_images(str(folder / "train.parquet"), on_bad_image="skip")
    assert len(splits.train) == 1 and splits.bad_images == ["s3://bucket/b.jpg"]


def test_a_selection_is_not_written_into_the_users_folder(tmp_path, monkeypatch):
    folder = write(tmp_path / "elsewhere", ["0.png", "1.png", "2.png"], ["0.png", "1.png", "2.png"])
    datasets.Dataset.from_parquet(str(folder / "train.parquet")).save_to_disk(tmp_path / "saved")
    before = sorted((tmp_path / "saved").iterdir())
    train = load_images(datasets.load_from_disk(tmp_path / "saved").select([2, 0]), image_column="image").train
    assert [decode(record).getpixel((0, 0))[0] for record in train["image"]] == train["number"][:] == [2, 0]
    assert train["image"][0]["path"] == str(folder / "2.png")
    assert sorted((tmp_path / "saved").iterdir()) == before
