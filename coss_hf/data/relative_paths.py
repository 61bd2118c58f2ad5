"""Images that tables name by a path: next to the table, and never by a URL."""

import os

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from coss_hf.data.rows import image_rows, without_selection

URL = r"^([A-Za-z][A-Za-z0-9+.-]*://|data:)"


def resolve_paths(dataset: str, rows: Dataset, column: str, folders: list[str]) -> Dataset:
    """Make the paths of images without bytes absolute.

    Args:
        dataset: the name of the dataset, for messages.
        rows: the rows of one split.
        column: the name of the image column: of paths, or of records `{"bytes", "path"}`.
        folders: the folders of the tables that the rows come from. A relative path lies in one of them, or else in the
            current folder, or else stays as it is.

    Returns:
        The rows, the same object where all paths are absolute.

    Raises:
        ValueError: the paths are URLs, or one may be either of two files.
    """
    records = image_rows(rows.select_columns(column), column).with_format("arrow")[:].column(column)
    without_bytes = pc.is_null(pc.struct_field(records, "bytes"))
    paths = pc.if_else(without_bytes, pc.struct_field(records, "path"), None)
    urls = paths.filter(pc.fill_null(pc.match_substring_regex(paths, URL), False))
    if len(urls) and len(urls) == len(paths) - paths.null_count:
        raise ValueError(
            f"--dataset {dataset}: column {column} holds URLs ({urls[0].as_py()[:80]}), and images are not downloaded; "
            f"download them, for instance with img2dataset, and give the folder."
        )
    relative = pc.and_(pc.invert(pc.starts_with(paths, "/")), pc.invert(pc.match_substring_regex(paths, URL)))
    if not pc.any(relative).as_py():
        return rows
    values = [
        _find(dataset, path, folders) if is_relative else path
        for path, is_relative in zip(pc.struct_field(records, "path").to_pylist(), relative.to_pylist(), strict=True)
    ]
    encoded = pc.struct_field(records, "bytes").combine_chunks()
    feature = datasets.Image(decode=False)
    storage = pa.StructArray.from_arrays([encoded, pa.array(values, pa.string())], ["bytes", "path"])
    if rows.column_names == [column]:  # without it `datasets` would lose the number of rows
        info = datasets.DatasetInfo(features=datasets.Features({column: feature}))
        return Dataset(pa.table({column: storage}), info, rows.split)
    return without_selection(rows.remove_columns(column)).add_column(column, storage, feature=feature)


def _find(dataset: str, path: str, folders: list[str]) -> str:
    found = [joined for folder in folders if os.path.lexists(joined := os.path.join(folder, path))]
    if len(found) > 1:
        raise ValueError(
            f"--dataset {dataset}: {path} may be {found[0]} or {found[1]}, since tables lie in both folders; give "
            f"absolute paths, or one table."
        )
    found += [path] if os.path.exists(path) else []
    return os.path.abspath(found[0]) if found else path
