"""A folder of images on this machine: its splits, its classes, and every image that lies there."""

import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetInfo, Features
from datasets import Image as ImageFeature
from datasets.fingerprint import Hasher
from datasets.table import InMemoryTable

from coss_hf.data.columns import IMAGE_NAMES
from coss_hf.data.folder_files import FolderFiles
from coss_hf.data.metadata_tables import read_metadata
from coss_hf.utils.messages import first_names, get_logger

logger = get_logger(__name__)

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}


def split_name(folder: str) -> str | None:
    """The split that a folder's name stands for ("validation" for "val" or "Val2017"); None for another name."""
    return SPLIT_NAMES.get(re.sub(r"[-._ ]?\d+$", "", folder.lower()))


def holds_images(files: FolderFiles) -> bool:
    """Whether a folder is one of images, rather than one of parquet files that hold the images themselves."""
    parquet = next((path for path in files.others if path.endswith(".parquet")), None)
    return bool(files.images) and not (parquet and _has_encoded_images(parquet))


def _has_encoded_images(file: str) -> bool:
    try:
        schema = pq.read_schema(file)
    except (OSError, pa.ArrowInvalid):
        return False
    for field in schema:
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            return True
        is_binary = pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)
        if is_binary and field.name.lower() in IMAGE_NAMES:
            return True
    return False


def load_image_folder(files: FolderFiles) -> dict[str, Dataset]:
    """Load every image of a folder, by its path.

    A folder is cut into splits where all folders of its first level have names of splits and no image lies next to
    them; else every image is train. Where there are metadata tables, the images are those that the tables name, with
    the other columns of the tables. Else the folders that the images lie in are their classes, where all images lie
    equally deep and there are two classes or more.

    Args:
        files: what lies in the folder.

    Returns:
        The splits, in the order of their paths, or of the rows of the tables. What is left out is logged.

    Raises:
        ValueError: an image stands in two splits or twice in one, or a table cannot be used.
    """
    splits = _find_splits(files)
    _check_links(files, splits)
    tables = _with_metadata(files, splits) if files.tables else _with_classes(files, splits)
    _check_repeated_rows(files, tables)
    _log_what_is_left_out(files, tables)
    return {split: as_dataset(table) for split, table in tables.items()}


def _find_splits(files: FolderFiles) -> dict[str, str]:
    """The split of each folder of the first level; empty where the folder is not cut into splits."""
    relative = [files.relative(path) for path in files.images]
    first_level = list(dict.fromkeys(path.partition("/")[0] for path in relative))
    loose = [path for path in relative if "/" not in path]
    splits = {name: split_name(name) for name in first_level if name not in loose}
    if splits and all(splits.values()) and not loose:
        return splits
    folders = dict.fromkeys(folder for path in relative for folder in path.split("/")[:-1])
    if like_splits := [folder for folder in folders if split_name(folder)]:
        others = [name for name in first_level if name in loose or not splits[name]]
        logger.warning(
            "--dataset %s: all %d images are train. Folders named %s are not taken for splits, since the first level "
            "holds %s. Where they are splits, give a folder that holds only them.",
            *(files.root, len(files.images), first_names(like_splits), first_names(others)),
        )
    return {}


def _split_of(files: FolderFiles, splits: dict[str, str], path: str) -> str:
    return splits.get(files.relative(path).partition("/")[0], "train")


def _check_links(files: FolderFiles, splits: dict[str, str]) -> None:
    repeated = files.repeated_links()
    for first, second in repeated:
        two_splits = _split_of(files, splits, first) != _split_of(files, splits, second)
        if two_splits or not Path(first).is_symlink():
            raise ValueError(
                f"--dataset {files.root}: {first} and {second} are the same file, which would be loaded twice; remove "
                f"the link."
            )
    if repeated:
        pairs = [f"{files.relative(first)} and {files.relative(second)}" for first, second in repeated]
        logger.warning("--dataset %s: %d images are the same file: %s.", files.root, len(pairs), first_names(pairs))


def _with_classes(files: FolderFiles, splits: dict[str, str]) -> dict[str, pa.Table]:
    """The images of each split and, where there are any, their classes."""
    images: dict[str, list[str]] = {}
    for path in files.images:
        images.setdefault(_split_of(files, splits, path), []).append(path)
    folders = {path: files.relative(path).split("/")[bool(splits) : -1] for path in files.images}
    classes = sorted({parts[-1] for parts in folders.values() if parts})
    same_depth = len({len(parts) for parts in folders.values()}) == 1
    if len(classes) > 1 and not same_depth:
        logger.warning(
            "--dataset %s: folders are not taken for classes, since images lie at different depths.", files.root
        )
    features = Features({"image": ImageFeature()})
    if len(classes) > 1 and same_depth:
        features["label"] = ClassLabel(names=classes)
    tables = {}
    for split, paths in images.items():
        columns = [ImageFeature().cast_storage(pa.array(paths, pa.string()))]
        if "label" in features:
            columns.append(pa.array(features["label"].str2int([folders[path][-1] for path in paths])))
        tables[split] = pa.table(columns, names=list(features)).cast(features.arrow_schema)
    return tables


def _with_metadata(files: FolderFiles, splits: dict[str, str]) -> dict[str, pa.Table]:
    """The rows of the metadata tables by the split of their first image."""
    parts: dict[str, list[pa.Table]] = {}
    features = Features()
    for file in files.tables:
        table = read_metadata(files, file)
        features |= Features.from_arrow_schema(table.schema)
        paths = [path or file for path in _paths(table, table.column_names[0])]
        found = [_split_of(files, splits, path) for path in paths]
        for split in dict.fromkeys(found):
            parts.setdefault(split, []).append(table.filter(pa.array([other == split for other in found])))
    schema = Features(features).arrow_schema
    tables = {}
    try:
        for split, rows in parts.items():
            complete = pa.concat_tables([*rows, schema.empty_table()], promote_options="default")
            tables[split] = complete.select(schema.names).cast(schema)
    except pa.ArrowException as error:
        raise ValueError(
            f"--dataset {files.root}: {files.names(files.tables)} do not go together ({error})."
        ) from error
    return tables


def _paths(table: pa.Table, column: str) -> list[str | None]:
    return table.column(column).combine_chunks().field("path").to_pylist()


def _image_columns(table: pa.Table) -> list[str]:
    features = Features.from_arrow_schema(table.schema)
    return [column for column, feature in features.items() if isinstance(feature, ImageFeature)]


def _check_repeated_rows(files: FolderFiles, tables: dict[str, pa.Table]) -> None:
    """A second image of a row, such as a mask, may belong to several rows."""
    counts = Counter(path for table in tables.values() for path in _paths(table, _image_columns(table)[0]) if path)
    repeated = [path for path, count in counts.items() if count > 1]
    if repeated:
        raise ValueError(
            f"--dataset {files.root}: {files.names(files.tables)} name {len(repeated)} images more than once: "
            f"{files.names(repeated)}. Keep one row of each."
        )


def _log_what_is_left_out(files: FolderFiles, tables: dict[str, pa.Table]) -> None:
    loaded = {path for table in tables.values() for column in _image_columns(table) for path in _paths(table, column)}
    unnamed = [path for path in files.images if path not in loaded]
    reasons = []
    if unnamed:
        reasons.append(f"{len(unnamed)} images that are not in {files.names(files.tables)} ({files.names(unnamed)})")
    if files.hidden:
        reasons.append(f"{len(files.hidden)} hidden images ({files.names(files.hidden)})")
    if files.others:
        reasons.append(f"{len(files.others)} files that Pillow does not read ({files.count(files.others)})")
    if reasons:
        counts = ", ".join(f"{split} {len(table)}" for split, table in tables.items())
        logger.warning("--dataset %s: images loaded: %s. Left out: %s.", files.root, counts, "; ".join(reasons))


def as_dataset(table: pa.Table) -> Dataset:
    """A table of paths of images as a dataset with the fingerprint that it has in every run."""
    features = Features.from_arrow_schema(table.schema)
    images = _image_columns(table)
    paths = [_paths(table, column) for column in images]
    # What is computed from the images is kept under it.
    fingerprint = Hasher.hash(("image folder, version 1", paths, table.drop_columns(images).to_pydict(), features))
    return Dataset(InMemoryTable(table), info=DatasetInfo(features=features), fingerprint=fingerprint)


def paths_of_images(rows: Dataset) -> list[str]:
    """The paths of the images of rows that `as_dataset` returned."""
    table = rows.data.table
    return [path for column in _image_columns(table) for path in _paths(table, column) if path]
