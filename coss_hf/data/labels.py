"""Labels of any kind as class numbers."""

import math

import torch
from datasets import ClassLabel, Dataset
from torch import Tensor

from coss_hf.utils.messages import get_logger

logger = get_logger(__name__)


def is_unlabelled(value) -> bool:
    """Whether a label says that there is none: None, empty text, or -1, as which the Hub keeps test labels back."""
    return value is None or value == "" or (value == -1) or (isinstance(value, float) and math.isnan(value))


def class_numbers(column: str, train: Dataset, *others: Dataset) -> tuple[list[Tensor], list[str]] | None:
    """Number the classes of labels of any kind: integers however large, text, truth values, floats without a fraction.

    Args:
        column: the name of the label column.
        train: the rows whose labels are the classes; of a ``ClassLabel`` all of its names are.
        others: rows of other splits. Their labels are matched by name; one that is not among the classes gets a number
            above them, and a warning says so: no classifier of the training images can be right about it.

    Returns:
        Class numbers ``(n,)`` of ``train`` and of each of ``others``, and the names of the classes, by number. None,
        with a warning, where any image lacks its label or the splits have no class in common.

    Example:
        >>> rows = Dataset.from_dict({"label": [5_000_000_011, 3, 3]})
        >>> class_numbers("label", rows)
        ([tensor([1, 0, 0])], ['3', '5000000011'])
    """
    labels = [_labels(rows, column) for rows in (train, *others)]
    if any(label is None for split in labels for label in split):
        logger.warning("Column %s lacks labels: only agreement is measured.", column)
        return None
    feature = train.features[column]
    classes = list(feature.names) if isinstance(feature, ClassLabel) else _classes({*labels[0]})
    numbers = {name: number for number, name in enumerate(classes)}
    for split in labels[1:]:
        unknown = sorted({*split} - {*labels[0]}, key=_order)
        if unknown and not {*split} & {*labels[0]}:
            logger.warning(
                "Column %s: no class of the images to measure on (%s) is one of the training images' (%s): only "
                "agreement is measured.",
                column,
                _shown(unknown),
                _shown(sorted({*labels[0]}, key=_order)),
            )
            return None
        if unknown:
            logger.warning(
                "Column %s: %d of %d images to measure on are of classes that none of the images to compare with has "
                "(%s): they count as wrong.",
                column,
                sum(label in {*unknown} for label in split),
                len(split),
                _shown(unknown),
            )
        for name in unknown:
            numbers.setdefault(name, len(numbers))
    found = [torch.tensor([numbers[label] for label in split], dtype=torch.long) for split in labels]
    return found, [str(name) for name in classes]


def _labels(rows: Dataset, column: str) -> list:
    """Labels of rows, names for those of a ``ClassLabel``; None where there is none."""
    feature = rows.features[column]
    names = feature.names if isinstance(feature, ClassLabel) else None
    found = []
    for value in rows.with_format(None)[column][:]:
        if is_unlabelled(value):
            found.append(None)
        elif names is not None:
            found.append(names[value])
        else:
            # Tables with gaps turn integers into floats without a fraction.
            found.append(int(value) if isinstance(value, float) and value.is_integer() else value)
    return found


def _classes(found: set) -> list:
    """Labels in order; whole numbers with few gaps stay what they are, with the numbers between them."""
    numbers = all(type(label) is int and label >= 0 for label in found)
    if numbers and found and max(found) < 2 * len(found):
        return list(range(max(found) + 1))
    return sorted(found, key=_order)


def _order(label) -> tuple:
    return (isinstance(label, str), label)


def _shown(labels: list) -> str:
    return ", ".join(str(label) for label in labels[:5]) + (", ..." if len(labels) > 5 else "")
