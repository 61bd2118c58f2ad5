"""Our figures next to the paper's."""

import numpy as np
import pytest

from coss_hf.study.paper_cells import cells, cells_table, compared, rank_correlation, ranking_sentence
from coss_hf.study.paper_tables import ROWS, figure, scaled


def row(table, pair, method, seed, linear, split="test", scale=1):
    expression = scaled(ROWS[table][method], scale)
    found = {"table": table, "pair": pair, "method": method, "seed": seed, "split": split, "scale": scale}
    return found | {
        "expression": expression,
        "linear": linear,
        "knn20": linear - 0.1,
        "images_seen": 1_000_000,
        "num_images": 1_000_000,
    }


def test_every_cell_is_there_run_or_not():
    rows = [row(3, "resnet20/resnet56", "lambda 0.5", seed, 0.60 + seed / 100) for seed in (1, 2, 3)]
    rows.append(row(3, "resnet20/resnet56", "lambda 0.5", 0, 0.9, split="validation"))
    found = cells(rows)
    assert len(found) == 3 * 11 + 2 * 3 + 2 * 4 + 4 * 4 + 4
    run = [cell for cell in found if cell.runs]
    # One method in four tables: it was "not run" in those that it was not run for.
    expected = [(1, "coss"), (2, "coss"), (3, "lambda 0.5"), (4, "coss")]
    assert [(cell.table, cell.row) for cell in run] == expected and {cell.published for cell in run} == {71.11}
    cell = run[2]
    assert cell.gap("linear") == pytest.approx(62 - 71.11)
    text = cells_table([cell for cell in found if cell.table == 3 and cell.pair == "resnet20/resnet56"])
    assert "| `lambda 0.5` | 71.11 | 62.0 ± 2.5 | -9.1 | 52.0 ± 2.5 | 3 | 1,000,000 | 1 |" in text
    assert "| `lambda 0` | 70.58 | not run |  |  |  |  |  |" in text
    assert not ranking_sentence(found), "one row ranks nothing"


def test_a_cell_without_a_figure_has_that_of_its_method_in_another_table():
    assert (figure(4, "vgg8/vgg13", "dist"), figure(4, "resnet20/resnet56", "L_co")) == (73.40, 70.58)
    assert figure(4, "resnet20/resnet56", "bn") is None and figure(5, "resnet20/resnet56", "seed") is None


def test_lengths_and_failures_are_told_apart():
    rows = [row(1, "vgg8/vgg13", "coss", seed, 0.60 + seed / 100) for seed in (1, 2)]
    long = row(1, "vgg8/vgg13", "coss", 1, 0.74) | {"num_images": 12_000_000, "images_seen": 12_000_000}
    failed = row(1, "vgg8/vgg13", "vid", 1, 0) | {"failed": "the loss is nan"}
    del failed["linear"], failed["knn20"]
    found = [cell for cell in cells([*rows, rows[0], long, failed], [1]) if cell.pair == "vgg8/vgg13"]
    text = cells_table(found)
    assert "| `coss` | 74.58 | 61.5 ± 6.4 | -13.1 | 51.5 ± 6.4 | 2 | 1,000,000 | 1 |" in text, (
        "a repeated run counts once"
    )
    assert "| `coss` | 74.58 | 74.0 | -0.6 | 64.0 | 1 | 12,000,000 | 1 |" in text
    assert "| `vid` | 73.65 | diverged |  | diverged | 1 (1 failed) | 1,000,000 | 1 |" in text
    no_scale = cells([failed | {"split": "validation"}], [1])
    assert {cell.row for cell in no_scale if cell.text("linear") == "diverged"} == {"vid"}
    tried = [failed | {"split": "validation"}, row(1, "vgg8/vgg13", "vid", 0, 0.5, split="validation")]
    assert {cell.text("linear") for cell in cells(tried, [1])} == {"not run"}, "another scale went well"
    with pytest.raises(ValueError, match="two runs of vgg8/vgg13 coss seed 1 with 1,000,000 images differ in linear"):
        cells([*rows, rows[0] | {"linear": 0.7}])


PAIR = "vgg8/vgg13"


def at(rows, metric="linear"):
    """Scale and seeds of the runs of the row ``at``."""
    (cell,) = [cell for cell in cells(rows, [1], metric) if cell.pair == PAIR and cell.row == "at"]
    return {run["scale"] for run in cell.runs}, [run["seed"] for run in cell.runs]


def of_images(found, count):
    return found | {"num_images": count}


def test_among_scales_those_runs_count_that_were_chosen_on_held_out_images():
    """A file could not have both a run at scale 1 and one at the chosen scale."""
    tested = [row(1, PAIR, "at", seed, 0.5, scale=scale) for scale in (1, 4) for seed in (1, 2)]
    held_out = [row(1, PAIR, "at", 0, linear, "validation", scale) for scale, linear in ((1, 0.4), (4, 0.6))]
    for swapped in (False, True):
        scores = {1: 0.7, 4: 0.6} if swapped else {1: 0.5, 4: 0.6}
        choice = [of_images(one | {"linear": scores[one["scale"]]}, 2000) for one in held_out]
        assert at([*tested, *choice]) == ({1 if swapped else 4}, [1, 2])
    # Of a metric that ranks otherwise.
    choice = [of_images(one | {"knn20": 1 - one["linear"]}, 2000) for one in held_out]
    assert at([*tested, *choice], "knn20") == ({1}, [1, 2])
    # One scale needs no choice, whatever another study chose.
    assert at([*tested[:2], *choice]) == ({1}, [1, 2])
    assert at([*tested[:2], *(of_images(one, 3_000_000) for one in held_out)]) == ({1}, [1, 2])


def test_a_choice_is_that_of_the_longest_held_out_runs_that_are_not_longer_than_the_report():
    tested = [row(1, PAIR, "at", 1, 0.5, scale=scale) for scale in (1, 4)]

    def choice(images, **scores):
        return [
            of_images(row(1, PAIR, "at", 0, linear, "validation", int(scale[1:])), images)
            for scale, linear in scores.items()
        ]

    short = choice(130, s1=0.9)  # one scale: nothing was chosen
    own, longer = choice(2000, s1=0.2, s4=0.3), choice(3_000_000, s1=0.8, s4=0.7)
    assert at([*tested, *short, *own, *longer, *choice(1000, s1=0.5, s4=0.4)]) == ({4}, [1])
    assert at([*(of_images(one, 5_000_000) for one in tested), *own, *longer]) == ({1}, [1])
    during = [one | {"share": 0.5} for one in choice(1_000_000, s1=0.9, s4=0.8)]
    assert at([*tested, *own, *during]) == ({4}, [1]), "an evaluation during training chooses nothing"


@pytest.mark.parametrize("seeds", [(1, 1), (1, 2)])
def test_test_runs_of_several_scales_need_a_choice(seeds):
    tested = [row(1, PAIR, "at", seed, 0.5, scale=scale) for scale, seed in zip((1, 4), seeds)]
    message = r"vgg8/vgg13 at with 1,000,000 images have the scales 1, 4, and no held-out runs .*: keep the rows of one"
    for held_out in ([], [row(1, PAIR, "at", 0, 0.5, "validation")]):
        with pytest.raises(ValueError, match=message):
            cells([*tested, *held_out])
    other = [row(1, PAIR, "at", 0, linear, "validation", scale) for scale, linear in ((1, 0.4), (2, 0.6))]
    with pytest.raises(ValueError, match="the held-out runs choose scale 2 by linear, which was not run: keep"):
        cells([*tested, *other])


def test_runs_of_the_chosen_scale_that_differ_are_still_refused():
    held_out = [row(1, PAIR, "at", 0, linear, "validation", scale) for scale, linear in ((1, 0.4), (4, 0.6))]
    tested = [row(1, PAIR, "at", 1, linear, scale=scale) for scale, linear in ((1, 0.4), (4, 0.6), (4, 0.7))]
    with pytest.raises(ValueError, match="two runs of vgg8/vgg13 at seed 1 with 1,000,000 images differ in linear"):
        cells([*tested, *held_out])


def test_evaluations_during_training_count_in_no_cell():
    one = row(1, PAIR, "coss", 1, 0.6)
    during = one | {"split": "validation", "share": 0.25, "images_seen": 250_000, "failed": "NaN"}
    without = [(cell.row, cell.runs, cell.text("linear")) for cell in cells([one])]
    assert [(cell.row, cell.runs, cell.text("linear")) for cell in cells([one, during])] == without
    assert {cell.text("linear") for cell in cells([during])} == {"not run"}


def test_rank_correlation():
    """The value of scipy.stats.spearmanr, with equal values."""
    ours, theirs = [0.3, 0.1, 0.5, 0.4, 0.2, 0.2], [69.3, 49.0, 71.1, 65.0, 68.6, 63.1]
    rho, low, high = rank_correlation(ours, theirs)
    assert rho == pytest.approx(0.782691, abs=1e-6) and -1 <= low < rho < high <= 1
    assert rank_correlation(ours, [-value for value in ours])[0] == pytest.approx(-1)
    assert rank_correlation(ours, theirs) == (rho, low, high), "the same draws each time"
    with pytest.raises(ValueError, match="needs 5 rows or more that differ"):
        rank_correlation(ours[:4], theirs[:4])
    with pytest.raises(ValueError, match="that differ"):
        rank_correlation(ours, np.ones(6))


def test_a_ranking_is_compared_over_the_rows_that_were_run():
    names = ("at", "sp", "vid", "rkd", "pkt", "coss")
    rows = [row(1, "vgg8/vgg13", name, 1, 0.4 + place / 10) for place, name in enumerate(names)]
    found = [cell for cell in cells(rows, [1]) if cell.pair == "vgg8/vgg13"]
    sentence = ranking_sentence(found)
    assert "top-1, over 6 of 11 rows at 1,000,000 images seen: 0.54 (95 % interval" in sentence
    assert sentence.endswith("The interval contains 0: these rows do not show that both rank alike.")
    text = cells_table(found)
    assert "| rank in the paper | rank here |" in text and "| 1 | 1,000,000 | 1 | 1 | 1 |" in text
    assert "| `at` | 56.22 | 40.0 | -16.2 | 30.0 | 1 | 1,000,000 | 1 | 5 | 6 |" in text
    assert "| `crd` | 69.73 | not run |  |  |  |  |  |  |  |" in text
    longer = [one | {"num_images": 2_000_000, "images_seen": 2_000_000} for one in rows]
    both = [cell for cell in cells([*rows, *longer], [1]) if cell.pair == "vgg8/vgg13"]
    assert {cell.runs[0]["num_images"] for cell in compared(both)} == {2_000_000}, "the longest of equals"
