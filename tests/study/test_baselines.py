"""What a study checks before it searches, trains or measures anything."""

from dataclasses import replace

import pytest
from datasets import Dataset

from coss_hf.data.loading import ImageSplits
from coss_hf.study import baselines, comparison
from coss_hf.study.report import Report
from coss_hf.study.trials import StudyConfig
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.trainer.training_args import DistillationArguments


def rows(count: int, labels=None) -> Dataset:
    labels = [number % 2 for number in range(count)] if labels is None else labels
    return Dataset.from_dict({"image": list(range(count)), "label": labels})


def splits(train: Dataset, validation: Dataset | None, test: Dataset | None, label_column="label") -> ImageSplits:
    return ImageSplits(train, validation, test, "image", label_column, [])


@pytest.mark.parametrize(("labels", "count", "problem"), [(None, 10, "11 or more"), ("label", 1, "2 or more")])
def test_too_few_images_to_measure_on(labels, count, problem):
    found = splits(rows(4), rows(count), rows(count + 1), labels)
    with pytest.raises(ValueError, match=f"^--validation_size: {count} images to measure on; with.* {problem}"):
        baselines.check_measured("validation", found)
    baselines.check_measured("test", found)


def test_images_of_which_some_have_no_label_are_measured_as_without_labels():
    found = splits(rows(4), rows(10, [0] * 9 + [None]), None)
    with pytest.raises(ValueError, match="^--validation_size: 10 images to measure on; without a label for each .* 11"):
        baselines.check_measured("validation", found)


@pytest.mark.parametrize("where", ["train", "validation", "test"])
def test_a_table_of_images_without_some_labels_is_refused_before_any_training(where):
    """All runs ended, and then no row had a value."""
    parts = {name: rows(12) for name in ("train", "validation", "test")}
    parts[where] = rows(12, [0] * 6 + [1] * 5 + [None])
    with pytest.raises(ValueError, match="--metric=linear needs a label of each image.* --label_column=label does not"):
        baselines.check_report("linear", splits(**parts), chooses=True)
    baselines.check_report("overlap10", splits(**parts), chooses=True)
    if where == "validation":
        baselines.check_report("linear", splits(**parts), chooses=False)


def test_classes_that_splits_do_not_share_are_no_labels():
    with pytest.raises(ValueError, match="the same classes in all splits"):
        baselines.check_report("knn10", splits(rows(12), None, rows(12, [7] * 12)), chooses=False)


def test_a_metric_needs_enough_images_in_each_split():
    """Ten held-out images have no 10 others: it was found out after the runs that choose."""
    few = splits(rows(15), rows(10), rows(11))
    with pytest.raises(ValueError, match="^--validation_size: --metric=overlap10 needs 11 images or more"):
        baselines.check_report("overlap10", few, chooses=True)
    baselines.check_report("overlap10", few, chooses=False)
    baselines.check_report("cosine", few, chooses=True)
    with pytest.raises(ValueError, match="^--test_split: --metric=overlap10 needs 11 images"):
        baselines.check_report("overlap10", splits(rows(15), None, rows(10)), chooses=False)
    with pytest.raises(ValueError, match="^--metric=knn20 needs 20 training images or more, and there are 15"):
        baselines.check_report("knn20", few, chooses=True)
    baselines.check_report("knn10", few, chooses=True)


@pytest.mark.parametrize(
    ("options", "training", "message"),
    [
        ({"seeds": 1}, {"num_images": 64}, "--seeds=1 must be at least 3"),
        ({"jobs": 0}, {"num_images": 64}, "--jobs=0 must be at least 1"),
        ({"hours": 1}, {"num_images": 64}, "--hours or --num_images"),
        ({"hours": float("nan")}, {}, "--hours=nan must be above 0"),
        ({"methods": ["coss", "nosuch"]}, {"num_images": 64}, "--methods='nosuch': there is no method 'nosuch'"),
        ({"methods": ["coss + coss"]}, {"num_images": 64}, r"--methods='coss \+ coss' names a method twice"),
    ],
)
def test_numbers_and_methods_are_checked_before_images_are_read(tmp_path, monkeypatch, options, training, message):
    monkeypatch.setattr(DataArguments, "load", lambda self: pytest.fail("images were read"))
    monkeypatch.setattr(ModelArguments, "load_teacher", lambda self: pytest.fail("a network was loaded"))
    arguments = DistillationArguments(str(tmp_path), use_cpu=True, **training)
    given = {"seeds": 3, "hours": None, "jobs": 1} | options
    with pytest.raises(ValueError, match=f"^{message}") as error:
        comparison.plan_comparison("compared", ModelArguments(), DataArguments(), arguments, **given)
    assert str(error.value).count("--jobs") == ("jobs" in options)


@pytest.mark.parametrize(
    ("jobs", "gpus", "use_cpu", "parallel"), [(1, 4, False, 1), (4, 2, False, 2), (2, 4, False, 2), (4, 4, True, 1)]
)
def test_hours_count_for_each_gpu_that_a_job_has(
    tmp_path, image_parquet, networks, monkeypatch, jobs, gpus, use_cpu, parallel
):
    """--hours took the time of one GPU, whatever --jobs and the machine."""
    counted = []

    def run_images(folder, hours, trained, others, config, parallel):
        counted.append(parallel)
        return 64

    monkeypatch.setattr(comparison, "run_images", run_images)
    monkeypatch.setattr(comparison.Sweep, "check", lambda *args: None)
    monkeypatch.setattr("coss_hf.study.sweep.take_one_gpu", lambda: [str(number) for number in range(gpus)])
    models = ModelArguments(teacher=networks.teacher, student=networks.resnet)
    data = DataArguments(dataset=str(image_parquet), validation_size=12)
    training = DistillationArguments(
        str(tmp_path / "out"), use_cpu=True, settings="paper", per_device_train_batch_size=8
    )
    training.use_cpu = use_cpu
    comparison.plan_comparison("compared", models, data, training, seeds=3, hours=1, jobs=jobs)
    assert counted == [parallel]


def test_a_step_without_neighbours_needs_as_many_images(tmp_path):
    """It was refused after the search for neighbours, with a batch size that nobody gave."""

    def training(**options):
        return DistillationArguments(str(tmp_path), use_cpu=True, neighbors_pool=4, **options)

    batch = {"per_device_train_batch_size": 8}
    baselines.check_batch(training(**batch, neighbors_k=4), 40)
    baselines.check_batch(training(**batch), 8)
    named = '--per_device_train_batch_size=8 with --neighbors_k=4: a step of the row "coss, no neighbours" '
    with pytest.raises(ValueError, match=f"^{named}.* --per_device_train_batch_size 7 at most, fewer neighbours or"):
        baselines.check_batch(training(**batch, neighbors_k=4), 39)
    with pytest.raises(ValueError, match="--gradient_accumulation_steps=2: .*others, 80,.*_size 4 at most"):
        baselines.check_batch(training(**batch, neighbors_k=4, gradient_accumulation_steps=2), 40)
    with pytest.raises(ValueError, match="training images; give fewer neighbours or more images"):
        baselines.check_batch(training(**batch, neighbors_k=4), 3)


def test_a_table_of_held_out_images_says_that_it_takes_a_part_of_the_training_images():
    """On held-out images k-NN and classifiers have 10,000 training images, and nothing said so."""
    config = StudyConfig(DataArguments(), {}, bank_size=20)
    found = splits(rows(30), rows(12), rows(12))
    note = comparison.measured_against(config, "validation", found)
    assert "k-NN, the classifiers and retrieval take 20 of the 30 training images" in note
    assert comparison.measured_against(config, "test", found) == ""
    assert comparison.measured_against(config, "validation", splits(rows(20), rows(12), None)) == ""
    assert comparison.measured_against(config, "validation", splits(rows(30), rows(12), None, None)) == ""
    report = Report("title", [], "linear", "validation", 0, {}, "a CPU", "command", {}, note)
    assert note in report._notes() and "  " not in replace(report, note="")._notes()
