"""Metadata tables of an image folder: files `metadata.csv`, `.jsonl` or `.parquet` that name images."""

import os

import pandas as pd
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq
from datasets import Features
from datasets import Image as ImageFeature

from coss_hf.data.folder_files import FolderFiles


def read_metadata(files: FolderFiles, file: str) -> pa.Table:
    """Read a metadata table; its columns `file_name` and `*_file_name` become images `image` and `*`, the first ones.

    Args:
        files: the folder of the table.
        file: the path of the table. The images that it names are relative to its own folder.

    Raises:
        ValueError: the table cannot be read, has no such column, or names what is not below the folder.
    """
    table = _read(files, file)
    names = [name for name in table.column_names if name == "file_name" or name.endswith("_file_name")]
    if not names:
        raise ValueError(
            f"--dataset {files.root}: {file} has no column file_name, but {', '.join(table.column_names)}; name the "
            f"column of file names so, or the file otherwise if it is not about the images."
        )
    names.sort(key=lambda name: name != "file_name")
    known = set(files.images)
    images = {}
    for name in names:
        paths = [_find(files, file, value, known) for value in table.column(name).to_pylist()]
        column = "image" if name == "file_name" else name.removesuffix("_file_name")
        images[column] = ImageFeature().cast_storage(pa.array(paths, pa.string()))
    others = table.drop_columns(names)
    for column in images:
        if column in others.column_names:
            raise ValueError(
                f"--dataset {files.root}: {file} has a column {column} besides the one of its file names; rename it."
            )
    features = Features({column: ImageFeature() for column in images} | Features.from_arrow_schema(others.schema))
    columns = [*images.values(), *others.columns]
    return pa.table(columns, names=list(features)).cast(features.arrow_schema)


def _read(files: FolderFiles, file: str) -> pa.Table:
    try:
        if file.endswith(".parquet"):
            return pq.read_table(file)
        if file.endswith(".jsonl"):
            return pyarrow.json.read_json(file)
        header = pd.read_csv(file, nrows=0).columns
        texts = {name: str for name in header if name.endswith("file_name")}  # a name may look like a number
        # "None", "NA" or "null" may be the name of a class.
        rows = pd.read_csv(file, dtype=texts, keep_default_na=False, na_values=["", "nan", "NaN"])
        return pa.Table.from_pandas(rows, preserve_index=False).replace_schema_metadata()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"--dataset {files.root}: {file} cannot be read ({error}).") from error


def _find(files: FolderFiles, table: str, name: object, known: set[str]) -> str | None:
    """The path of the image that a table calls `name`; None for a row without a name."""
    if name is None:
        return None
    name = str(name)
    if "://" in name:
        raise ValueError(
            f"--dataset {files.root}: {table} names the URL {name}; download the images and name the files."
        )
    folder = os.path.dirname(table)
    path = os.path.normpath(os.path.join(folder, name))
    if path not in known:  # written on Windows, perhaps
        path = os.path.normpath(os.path.join(folder, name.replace("\\", "/")))
    if not path.startswith(files.root.rstrip("/") + "/"):
        raise ValueError(
            f"--dataset {files.root}: {table} names {name!r}, which is not below the folder; give the folder that "
            f"holds both."
        )
    return path
