"""Labels of any kind.

Reported: tables sized by the largest label number, 640 GB asked for after training where labels were 3 to
5,000,000,011 of four classes; labels that are text were ignored.
"""

import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from coss_hf.data.columns import find_label_column
from coss_hf.data.labels import class_numbers


def rows(*values, feature=None):
    features = Features({"label": feature}) if feature else None
    return Dataset.from_dict({"label": list(values)}, features=features)


@pytest.mark.parametrize(
    "values, names",
    [
        ([3, 5_000_000_011, 3, 70], ["3", "70", "5000000011"]),
        ([2**63 + 1, 2**63, 0], ["0", str(2**63), str(2**63 + 1)]),
        ([-7, 4, -2], ["-7", "-2", "4"]),
        (["dog", "Cat", "dog"], ["Cat", "dog"]),
        (["10", "9"], ["10", "9"]),
        ([True, False, True], ["False", "True"]),
        ([20.0, 10.0, 20.0], ["10", "20"]),
        ([2, 5, 4], ["0", "1", "2", "3", "4", "5"]),
    ],
)
def test_labels_become_classes_from_zero(values, names):
    given = rows(*values) if 2**63 not in values else Dataset(pa.table({"label": pa.array(values, pa.uint64())}))
    (numbers,), found = class_numbers("label", given)
    assert found == names
    kind = type(values[0])
    assert [names[number] for number in numbers] == [str(int(v) if kind is float else v) for v in values]


@pytest.mark.parametrize(
    "values", [[1, -1], [1, None], ["a", None], ["a", ""], [1.0, float("nan")], [True, None], [None, None]]
)
def test_missing_labels_leave_only_agreement_metrics(values, caplog):
    assert class_numbers("label", rows(*values)) is None
    assert "Column label lacks labels" in caplog.text


def test_splits_share_the_classes_by_name():
    train = rows(0, 1, 2, feature=ClassLabel(names=["ant", "bee", "cow"]))
    test = rows(0, 1, 2, feature=ClassLabel(names=["cow", "ant", "bee"]))
    (first, second), names = class_numbers("label", train, test)
    assert names == ["ant", "bee", "cow"] and first.tolist() == [0, 1, 2] and second.tolist() == [2, 0, 1]
    numbers, _ = class_numbers("label", rows("b", "a"), rows("a", "b", "b"))
    assert [n.tolist() for n in numbers] == [[1, 0], [0, 1, 1]]


def test_class_label_numbers_are_kept():
    """Also where a class has no image: figures of earlier runs stay comparable, and so do a teacher's outputs."""
    feature = ClassLabel(names=["ant", "bee", "cow"])
    (numbers,), names = class_numbers("label", rows(2, 0, feature=feature))
    assert numbers.tolist() == [2, 0] and names == ["ant", "bee", "cow"]


def test_class_without_training_images_is_named(caplog):
    (train, test), names = class_numbers("label", rows(10, 20), rows(20, 30, 30, 7))
    assert names == ["10", "20"] and test.tolist() == [1, 3, 3, 2]
    assert (
        "3 of 4 images to measure on are of classes that none of the images to compare with has (7, 30)" in caplog.text
    )


def test_splits_without_common_classes_are_rejected(caplog):
    assert class_numbers("label", rows("ant", "bee"), rows("cow", "ant "), rows("ant")) is None
    assert "(ant , cow) is one of the training images' (ant, bee)" in caplog.text


@pytest.mark.parametrize(
    "values, given, found",
    [
        (["a", "b", "a", "b"], None, "label"),
        (["one", "two", "three"], None, None),  # captions: each comes once
        (["one", "two", "three"], "label", "label"),
        ([True, False, True], None, "label"),
        ([1.0, 2.0, None], None, "label"),
        ([0.25, 0.5, 0.5], None, None),  # a measured value is no class
        ([None, None], None, None),
        (["t", "t", "t"], None, None),  # one class is none
        ([-1, -1], None, None),
    ],
)
def test_label_column_is_found(values, given, found):
    feature = Value("int64") if values == [None, None] else None
    assert find_label_column("d", rows(*values, feature=feature), given) == found


def test_invalid_label_column_is_rejected():
    with pytest.raises(ValueError, match="--label_column label is not a ClassLabel, nor a column of whole"):
        find_label_column("d", rows([1, 2], [3]), "label")
