import math
from collections import Counter
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

from coss_hf.evaluation.tables import unit_of
from coss_hf.reporting import plots
from coss_hf.reporting.plots import method_plot, published_plot, quality_plot
from coss_hf.study import reproduction
from coss_hf.study.paper_tables import ROWS, choice_trials, own_pairs, own_rows, published, report_trials, scaled
from coss_hf.study.reproduction import ReproduceArguments, Reproduction, nothing_chosen
from coss_hf.study.tables import _listed, best, comparison, difference, half_interval, images_seen, markdown, ranked


def rows(method: str, *values: float | None, **more) -> list[dict]:
    return [
        {"method": method, "scale": 1, "seed": seed, "linear": value} | more
        for seed, value in enumerate(values, start=1)
    ]


def test_intervals_are_those_of_students_t():
    assert half_interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3))
    assert half_interval([1.0]) == math.inf
    assert half_interval([0.0, 1.0] * 50) == pytest.approx(2.042 * math.sqrt(100 / 99 / 4) / 10)


def test_best_takes_first_of_equals_and_ignores_failures():
    found = rows("a", None, 0.5, 0.5, float("nan"))
    assert best(found, "linear")["seed"] == 2
    assert best(rows("a", None), "linear") is None


def test_differences_are_paired_by_seed():
    mean, half = difference(rows("a", 0.5, 0.6, 0.7), rows("b", 0.4, 0.5, 0.6), "linear")
    assert (mean, half) == (pytest.approx(0.1), pytest.approx(0))
    assert difference(rows("a", 0.5), rows("b", None), "linear") is None


def test_a_table_is_ranked_and_says_what_failed():
    found = [*rows("low", 0.2, 0.3), *rows("none", None, None, failed="NaN"), *rows("high", 0.4, 0.5)]
    lines = markdown(found, "linear").splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| high", "| low", "| none"]
    assert "45.0 ± 63.5" in lines[2] and "2 (2 failed) | - |" in lines[4]


def test_a_comparison_says_what_lies_inside_the_noise():
    found = [*rows("a", 0.80, 0.81, 0.82), *rows("b", 0.79, 0.82, 0.80), *rows("c", 0.5, 0.51, 0.52)]
    text = comparison([*found, *rows("random", 0.2, 0.2)], "linear")
    assert "a has the highest mean, but its difference to b lies inside the noise of these seeds." in text
    assert "-30.0 ± 0.0 |" in text and "inside the noise |" in text
    assert "a is better than every other row by more than the noise of these seeds." in comparison(
        found[:3] + found[6:], "linear"
    )
    few = "a has the highest mean. It is not known whether it is better than c: two runs of each at least must end with"
    assert few in comparison([found[0], found[6]], "linear")
    assert _listed(["b"]) == "b" and _listed(["b", "c"], "or") == "b or c" and _listed(["b", "c", "d"]) == "b, c and d"


def test_comparison_without_intervals_makes_no_claim():
    low = rows("a", 0.30, 0.31, 0.32)
    ahead = "is better than every other row"
    assert "No method is better than initial weights" in comparison([*low, *rows("initial", 0.9)], "linear")
    beaten = comparison([*low, *rows("initial", 0.1)], "linear")
    assert "-21.0 ± 2.5" in beaten and f"a {ahead}" in beaten
    assert "Every run failed" in comparison([*rows("a", None, None, failed="NaN"), *rows("random", 0.3, 0.3)], "linear")
    one_left = comparison([*low, *rows("b", 0.2, None, None)], "linear")
    assert "It is not known whether it is better than b: " in one_left
    mixed = comparison([*rows("a", 0.5, 0.5, 0.9), *rows("b", 0.52, 0.521, None)], "linear")
    assert "inside the noise" in mixed and ahead not in mixed


def test_extra_teacher_passes_are_reported():
    found = [*rows("factor", 0.3, 0.3, extra_teacher_images=64_000), *rows("a", 0.3, 0.4)]
    assert "the teacher also embedded: 64,000 images for factor." in comparison(found, "linear")


def test_a_comparison_says_when_nothing_was_learnt():
    found = [*rows("a", 0.30, 0.31, 0.32), *rows("b", 0.2, 0.2, 0.2)]
    assert "its difference to random weights lies" in comparison([*found, *rows("random", 0.3, 0.3, 0.33)], "linear")
    better = comparison([*found, *rows("random", 0.4, 0.41, 0.42), *rows("teacher", 0.9)], "linear")
    assert "No method is better than random weights" in better


def test_scales_multiply_every_beta():
    assert scaled("at", 0.5) == "at(beta=500.0)"
    assert scaled("coss(beta=50, lambda_ss=0.5) + seed", 2) == "coss(beta=100, lambda_ss=0.5) + seed(beta=2.0)"


def test_plan_uses_test_images_only_for_reported_trials():
    trials = choice_trials(1, "s/t", ["at", "coss"], [1, 4], 100)
    assert {(trial.split, trial.seed) for trial in trials} == {("validation", 0)} and len(trials) == 4
    names = ["vid", "srrl", "coss", "at"]
    chosen = [{"method": name, "expression": name, "scale": 1} for name in names]
    report = report_trials("s/t", chosen, 1, 3, 200)
    assert {trial.method for trial in report} == {"vid", "coss", "random", "teacher"}
    assert {trial.split for trial in report} == {"test"} and {trial.seed for trial in report} == {1, 2, 3}
    report = report_trials("s/t", chosen, 1, 3, 200, seeds_of_others=1)
    seeds = Counter(trial.method for trial in report)
    assert [seeds[name] for name in ("vid", "srrl", "coss", "at")] == [3, 1, 3, 1]


def test_rows_with_neighbours_take_as_many_images_a_step():
    """Without, a row is compared at another batch."""
    names = list(ROWS[5])
    trials = {trial.method: trial for trial in choice_trials(5, "s/t", names, [1], 640, batch_size=64)}
    assert (trials["seed + SS"].neighbors_k, trials["seed + SS"].anchors) == (0, None)
    assert (trials["seed + SS, neighbours"].neighbors_k, trials["seed + SS, neighbours"].anchors) == (3, 16)
    assert trials["seed + SS"].expression == "seed(beta=1.0) + coss(beta=1, lambda_co=0)"
    chosen = [asdict(trial) for trial in trials.values()]
    reported = {trial.method: trial for trial in report_trials("s/t", chosen, None, 1, 640)}
    assert (reported["seed, neighbours"].neighbors_k, reported["seed, neighbours"].anchors) == (3, 16)


def test_published_figures_have_their_rows():
    for table in ROWS:
        for pair in ("resnet20/resnet56", "resnet8x4/resnet32x4"):
            found = list(published(table, pair))
            assert found == list(ROWS[table])[: len(found)] and (table > 3 or len(found) in (0, len(ROWS[table])))
    assert own_rows(4) == ["bn", "coss"] and own_rows(5) == list(ROWS[5]) and own_rows(1) == list(ROWS[1])
    assert "resnet20/resnet56" not in own_pairs(4) and own_pairs(5) == ["resnet20/resnet56"]
    assert published(1, "resnet20/resnet56")["coss"] == 71.11 and published(4, "resnet20/resnet56") == {}


def test_the_plot_is_written(tmp_path):
    found = ranked([*rows("a", 0.80, 0.81), *rows("b", None)], "linear")
    method_plot(tmp_path / "plot.png", found, "linear", "a title")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_own_figures_are_drawn_against_published_ones(tmp_path):
    published_plot(tmp_path / "plot.png", {"a": (49.0, [30.0, 31.0]), "coss": (71.11, [50.0])}, "linear", "a title")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_methods_are_checked_with_teachers_that_are_there(tmp_path, monkeypatch):
    """A resumed study was refused for want of disk: an untrained teacher has none of the embeddings that are there."""
    own = {name: tmp_path / name.replace("/", "-") for name in ("vgg8/vgg13", "resnet20/resnet56")}
    own["vgg8/vgg13"].mkdir()
    (own["vgg8/vgg13"] / "run.json").write_text("{}")
    monkeypatch.setattr(reproduction.teachers, "save_untrained", lambda name, folder: f"untrained {name}")
    found = reproduction._teachers_to_check_with(ReproduceArguments(pairs=[*own]), tmp_path, own)
    assert found == {"vgg8/vgg13": str(own["vgg8/vgg13"]), "resnet20/resnet56": "untrained resnet56"}


def test_a_pair_without_any_choice_has_a_section_that_says_so(tmp_path):
    failed = [{"pair": "a/b", "method": "rkd", "failed": "The loss is inf at step 9"}]
    untrained = {"pair": "a/b", "method": "random", "seed": 1, "images_seen": 0, "linear": 0.1}
    args = ReproduceArguments(output_dir=str(tmp_path), pairs=["a/b"])
    this = SimpleNamespace(args=args, data=SimpleNamespace(dataset="images"))
    text = Reproduction._write(this, failed, {"a/b": []}, {"a/b": [untrained]})
    assert "## a/b\n\nNothing is reported. Without a chosen scale" in text
    assert "`rkd` (The loss is inf at step 9)" in text and (tmp_path / "table1.md").read_text() == text
    assert "`rkd` (no value of knn20)" in nothing_chosen([{"method": "rkd"}], "knn20")


def test_a_method_without_any_choice_is_named(tmp_path):
    """It was missing from the table without a word."""
    row = {"pair": "a/b", "scale": 1, "seed": 1, "images_seen": 64, "linear": 0.5, "expression": "at"}
    tried = [row | {"method": "at"}, {"pair": "a/b", "method": "vid", "failed": "The loss is inf at step 9"}]
    args = ReproduceArguments(output_dir=str(tmp_path), pairs=["a/b"])
    splits = SimpleNamespace(validation=range(100))
    this = SimpleNamespace(
        args=args, data=SimpleNamespace(dataset="images"), splits=splits, own_teachers={}, other_teacher=""
    )
    text = Reproduction._write(this, tried, {"a/b": tried[:1]}, {"a/b": [row | {"method": "at"}]})
    assert "on 100 held-out images by linear" in text and "`vid` (The loss is inf at step 9)" in text


def test_where_one_scale_is_given_nothing_is_chosen(tmp_path):
    """Runs on held-out images took a third of the time of a short table, and decided nothing."""
    assert ReproduceArguments(scales=[1, 4]).chooses and ReproduceArguments(scales=[1], finalists=2).chooses
    args = ReproduceArguments(output_dir=str(tmp_path), pairs=["a/b"], methods=["at", "coss"], scales=[1], seeds=1)
    assert not args.chooses and not replace(args, finalists=1).chooses
    images = SimpleNamespace(dataset="images", validation_size=0)
    reproduction.check(replace(args, pairs=None), images)
    with pytest.raises(ValueError, match="--validation_size"):
        reproduction.check(replace(args, pairs=None, scales=[1, 4]), images)
    with pytest.raises(ValueError, match=r"--scales=\[1, 1\] has a value twice"):
        reproduction.check(replace(args, pairs=None, scales=[1, 1]), images)
    choices = choice_trials(1, "a/b", args.methods, args.scales, 64)
    sweep = FakeSweep()
    this = Reproduction(args, SimpleNamespace(dataset="images"), None, None, sweep, choices, 640, {})
    text = this.run()
    assert {trial.split for trial in sweep.trials} == {"test"} and {trial.seed for trial in sweep.trials} == {1}
    assert [trial.method for trial in sweep.trials] == ["at", "coss", "random", "teacher"]
    assert "scale 1 of each method: nothing was chosen" in text and "held-out" not in text


class FakeSweep:
    """Gives each trial a result, and keeps the trials."""

    def __init__(self):
        self.trials = []

    def run(self, trials, config, later=0):
        self.trials += trials
        return [asdict(trial) | {"images_seen": trial.num_images, "linear": 0.5} for trial in trials]


def test_a_table_where_only_coss_could_be_reported_and_failed(tmp_path):
    """It ended in StopIteration, after all runs and without any table."""
    tried = [
        {"pair": "a/b", "method": "at", "scale": 1, "seed": 0, "images_seen": 64, "linear": 0.5, "expression": "at"},
        {"pair": "a/b", "method": "coss", "failed": "The loss is inf at step 9"},
    ]
    untrained = {"pair": "a/b", "method": "random", "scale": 0, "seed": 1, "images_seen": 0, "linear": 0.1}
    args = ReproduceArguments(output_dir=str(tmp_path), pairs=["a/b"], finalists=0)
    splits = SimpleNamespace(validation=range(100))
    this = SimpleNamespace(
        args=args, data=SimpleNamespace(dataset="images"), splits=splits, own_teachers={}, other_teacher=""
    )
    text = Reproduction._write(this, tried, {"a/b": tried[:1]}, {"a/b": [untrained]})
    assert "No trained row is reported." in text and "| random |" in text and "0 images seen (" not in text
    assert "Without a chosen scale" in text and "`coss` (The loss is inf at step 9)" in text


def test_rows_without_a_value_are_told_from_failed_ones():
    """A table of images without enough labels said that every run had failed."""
    nothing = comparison([*rows("a", None, None), *rows("random", None, None)], "linear")
    assert "No run has a value of linear." in nothing and "failed" not in nothing
    both = comparison([*rows("a", 0.5, 0.6), *rows("b", None, None), *rows("c", None, None, failed="NaN")], "linear")
    assert both.splitlines()[-1].count("b and c") == 1 and "says why runs failed" in both
    assert [line.rstrip(" |").split(" | ")[-1] for line in both.splitlines()[5:7]] == ["no value", "failed"]
    mixed = comparison([*rows("a", None, None), *rows("b", None, None, failed="NaN")], "linear")
    assert "No run has a value of linear. The file of results says why runs failed." in mixed


def test_differences_of_cosines_have_the_unit_of_their_column(tmp_path):
    """They were 100 times as large, and the axis of the plot was in %."""
    found = [
        {"method": name, "scale": 1, "seed": seed, "cosine": value + seed / 1000}
        for name, value in (("a", 0.5), ("b", 0.25))
        for seed in (1, 2, 3)
    ]
    text = comparison(found, "cosine")
    assert "0.502 ± 0.002" in text and "| -0.250 ± 0.000 |" in text and "the cosine from -1 to 1" in text
    assert unit_of("cosine").axis("cosine") == "cosine" and unit_of("linear").axis("linear") == "linear (%)"
    labels = []
    real = plots._dress
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_dress", lambda axes, title, **more: labels.append(more) or real(axes, title, **more))
        method_plot(tmp_path / "plot.png", ranked(found, "cosine"), "cosine", "a title")
        quality_plot(tmp_path / "plot.png", {"a": (1.0, [0.5]), "b": (2.0, [0.25])}, "cosine", "a title")
    assert labels[0]["x"] == "cosine" and labels[1]["y"] == "cosine"


def test_rows_that_saw_different_numbers_of_images_say_so():
    """With accumulated gradients a row stops before the others; the title named the highest number for all."""
    same = [*rows("a", 0.5, 0.6, images_seen=64), *rows("b", 0.4, 0.5, images_seen=64)]
    stopped = rows("c", None, images_seen=8, failed="NaN")
    assert images_seen([*same, *stopped, *rows("random", 0.1, images_seen=0)]) == "64 images seen"
    assert "images seen" not in markdown([*same, *stopped], "linear")
    found = [*same, *rows("d", 0.3, 0.3, images_seen=1048)]
    assert images_seen(found) == "64 to 1,048 images seen" and images_seen(rows("random", 0.1, images_seen=0)) == ""
    lines = markdown([*found, *stopped, *rows("random", 0.1, images_seen=0)], "linear").splitlines()
    assert lines[0].endswith("| images seen |")
    assert [line.split(" | ")[-1] for line in lines[2:]] == ["64 |", "64 |", "1,048 |", " |", " |"]


@pytest.mark.parametrize("other", ["", "resnet20"])
def test_a_section_names_a_teacher_that_is_not_the_pairs(tmp_path, other):
    row = {"pair": "a/b", "scale": 1, "seed": 1, "images_seen": 64, "linear": 0.5, "expression": "at", "method": "at"}
    args = ReproduceArguments(output_dir=str(tmp_path), pairs=["a/b"], teacher="folder")
    splits = SimpleNamespace(validation=range(100))
    this = SimpleNamespace(
        args=args, data=SimpleNamespace(dataset="images"), splits=splits, own_teachers={}, other_teacher=other
    )
    text = Reproduction._write(this, [row], {"a/b": [row]}, {"a/b": [row]})
    assert ("Its teacher is resnet20, given by --teacher=folder." in text) == bool(other)
