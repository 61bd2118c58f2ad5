"""Which columns of a dataset hold the images and the labels."""

import datasets
from datasets import ClassLabel, Dataset, Value

IMAGE_NAMES = ("image", "images", "img", "picture", "photo", "jpg", "png")


LABEL_NAMES = ("label", "labels", "fine_label", "target", "class")


def _find_images(dataset: str, rows: Dataset, column: str | None) -> str:
    features, columns = rows.features, f"--dataset {dataset} has the columns {', '.join(rows.column_names)}"
    stored = [key for key, feature in features.items() if _may_hold_images(feature)]
    if column is not None:
        if column not in stored:
            what = "does not hold images" if column in features else "does not exist"
            raise ValueError(f"--image_column {column} {what}; {columns}.")
        return column
    found = [key for key in stored if isinstance(features[key], datasets.Image)]
    # Parquet that `datasets` did not write has no image type: look for its {bytes, path}, then for telling names.
    found = found or [key for key in stored if isinstance(features[key], dict)]
    found = found or [key for key in stored if key.lower() in IMAGE_NAMES]
    if len(found) != 1:
        problem = f"several image columns ({', '.join(found)})" if found else "no image column"
        raise ValueError(f"--image_column: {problem} found, name one; {columns}.")
    return found[0]


def _may_hold_images(feature) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"}
    texts = ("string", "large_string", "binary", "large_binary")
    return isinstance(feature, datasets.Image) or (isinstance(feature, Value) and feature.dtype in texts)


def _find_labels(dataset: str, rows: Dataset, column: str | None) -> str | None:
    numbered = {
        key: isinstance(feature, ClassLabel)
        for key, feature in rows.features.items()
        if isinstance(feature, ClassLabel)
        or (isinstance(feature, Value) and feature.dtype.lstrip("u").startswith("int"))
    }
    labelled = {key: is_class for key, is_class in numbered.items() if _labelled(rows, key)}
    if column is not None:
        if column not in labelled:
            what = "is not a ClassLabel or whole number" if column in rows.features else "does not exist"
            what = "holds only None or -1" if column in numbered else what
            columns = ", ".join(labelled) or "none"
            raise ValueError(f"--label_column {column} {what}; columns of --dataset {dataset} that can be: {columns}.")
        return column
    classes = [key for key, is_class in labelled.items() if is_class]
    named = [key for key in LABEL_NAMES if key in (classes or labelled)]
    return (named + (classes if len(classes) == 1 else []) + [None])[0]


def _labelled(rows: Dataset, column: str) -> bool:
    """Whether any row has a label: sets without labels carry a column of None or -1."""
    values = rows.select_columns(column).with_format("arrow")[:].column(0)
    return bool(len(set(values.unique().to_pylist()) - {None, -1}))
