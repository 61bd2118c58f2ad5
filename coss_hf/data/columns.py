"""Which columns of a dataset contain the images and the labels."""

import datasets
from datasets import ClassLabel, Dataset, Value

from coss_hf.data.labels import is_unlabelled

IMAGE_NAMES = ("image", "images", "img", "picture", "photo", "jpg", "png")
LABEL_NAMES = ("label", "labels", "fine_label", "target", "class", "cls")


def find_image_column(dataset: str, rows: Dataset, column: str | None) -> str:
    """Name of the image column: ``column`` if given, else found by type, then by name.

    Args:
        dataset: the name of the dataset, for messages.
        rows: the rows of one split.
        column: the name of the column that the user gave.

    Raises:
        ValueError: the given column is absent or has no images, there is not exactly one image column, or the rows have
            a transform, which nothing here would call.
    """
    if (getattr(rows, "format", None) or {}).get("type") == "custom":
        raise ValueError(
            f"--dataset {dataset}: its with_transform would not be called, since images are read from their files; "
            f"change the images by map, give the change of the views as transform=, or drop it by with_format(None)."
        )
    features = rows.features
    columns = f"--dataset {dataset} has the columns {', '.join(rows.column_names)}"
    candidates = [key for key, feature in features.items() if _may_contain_images(feature)]
    if column is not None:
        if column not in candidates:
            what = "does not contain images" if column in features else "does not exist"
            raise ValueError(f"--image_column {column} {what}; {columns}.")
        return column
    found = [key for key in candidates if isinstance(features[key], datasets.Image)]
    # Parquet that `datasets` did not write has no image type: search for its {bytes, path}, then for telling names.
    found = found or [key for key in candidates if isinstance(features[key], dict)]
    found = found or [key for key in candidates if key.lower() in IMAGE_NAMES]
    if len(found) != 1:
        problem = f"several image columns ({', '.join(found)})" if found else "no image column"
        raise ValueError(f"--image_column: {problem} found, name one; {columns}.")
    return found[0]


def _may_contain_images(feature) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"}
    texts = ("string", "large_string", "binary", "large_binary")
    return isinstance(feature, datasets.Image) or (isinstance(feature, Value) and feature.dtype in texts)


def find_label_column(dataset: str, rows: Dataset, column: str | None) -> str | None:
    """Name of the label column: ``column`` if given, else found by type, then by name; None without labels.

    Args:
        dataset: the name of the dataset, for messages.
        rows: the rows of one split.
        column: the name of the column that the user gave.

    Raises:
        ValueError: the given column is absent or has no labels.
    """
    numbered = [key for key, feature in rows.features.items() if _may_contain_labels(feature)]
    labelled = [key for key in numbered if has_labels(rows, key)]
    if column is not None:
        if column not in labelled:
            if column in numbered and not _is_text(rows.features[column]):
                what = "contains only None or -1"
            elif column in rows.features:
                what = "is not a ClassLabel, nor a column of whole numbers or of several names"
            else:
                what = "does not exist"
            columns = ", ".join(labelled) or "none"
            raise ValueError(f"--label_column {column} {what}; columns of --dataset {dataset} that can be: {columns}.")
        return column
    classes = [key for key in labelled if isinstance(rows.features[key], ClassLabel)]
    named = [key for key in LABEL_NAMES if key in (classes or labelled) and _repeats(rows, key)]
    if named:
        return named[0]
    return classes[0] if len(classes) == 1 else None


def _may_contain_labels(feature) -> bool:
    if isinstance(feature, ClassLabel):
        return True
    kinds = ("int", "uint", "float", "bool", "string", "large_string")
    return isinstance(feature, Value) and feature.dtype.startswith(kinds)


def has_labels(rows: Dataset, column: str) -> bool:
    """Whether any row has a label: sets without labels have a column of None or -1."""
    values = [value for value in _distinct(rows, column) if not is_unlabelled(value)]
    if values and isinstance(values[0], str):
        return len(values) > 1
    return bool(values) and all(value.is_integer() for value in values if isinstance(value, float))


def _repeats(rows: Dataset, column: str) -> bool:
    """Whether text names classes: captions and file names hardly ever come twice."""
    if not _is_text(rows.features[column]):
        return True
    return 2 * len(_distinct(rows, column)) <= max(len(rows), 2)


def _is_text(feature) -> bool:
    return isinstance(feature, Value) and feature.dtype.endswith("string")


def _distinct(rows: Dataset, column: str) -> list:
    return rows.select_columns(column).with_format("arrow")[:].column(0).unique().to_pylist()
