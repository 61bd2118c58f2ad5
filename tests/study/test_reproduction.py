"""What coss-hf reproduce checks before it reads images, and the trials that it plans."""

import math

import pytest

from coss_hf.study import paper_tables as paper
from coss_hf.study.reproduction import ReproduceArguments, check, study_config
from coss_hf.trainer.arguments import DataArguments

DATA = DataArguments(validation_size=8)
PAIR = "resnet20/resnet56"


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("budget", (0, -1, math.nan, math.inf)),
        ("choice_budget", (0, -1, math.nan, math.inf)),
        ("seeds", (0, -1)),
        ("jobs", (0,)),
        ("teacher_epochs", (0, -1)),
        ("batch_size", (0,)),
        ("save_steps", (0,)),
        ("finalists", (-1,)),
        ("seeds_of_others", (-1,)),
        ("view_epochs", (-1,)),
        ("dataloader_num_workers", (-1,)),
        ("scales", ([0.0], [1.0, -1.0], [1.0, math.nan], [math.inf], [1.0, 1.0], [])),
        ("eval_at", ([0.0], [1.5], [math.nan], [-0.5], [0.5, 0.5])),
        ("pairs", ([PAIR, PAIR],)),
        ("methods", (["at", "at"],)),
    ],
)
def test_values_that_make_no_sense_are_refused_at_the_start(flag, values):
    """--finalists=-1 left out the last row; NaN was refused by round(), without a name."""
    for value in values:
        with pytest.raises(ValueError) as error:
            check(ReproduceArguments(**{flag: value}), DATA)
        message = str(error.value)
        assert message.startswith(f"--{flag}={value}") and "give" in message


@pytest.mark.parametrize(
    "options",
    [
        {"finalists": 0},
        {"finalists": 0, "methods": ["at"], "seeds_of_others": 1},
        {"finalists": 99},
        {"seeds_of_others": 0},
        {"view_epochs": 0},
        {"budget": 1.5, "scales": [0.5, 4.0], "eval_at": [0.25, 1.0]},
    ],
)
def test_values_at_the_end_of_their_range(options):
    check(ReproduceArguments(**options), DATA)


def keys(methods):
    """Keys of the planned trials by row, split and seed, of networks that are not trained, too."""
    args = ReproduceArguments(table=5, methods=methods, use_cpu=True)
    config = study_config(args, DATA, {PAIR: "teacher"})
    choices = paper.choice_trials(5, PAIR, methods, [1.0], 96)
    chosen = [
        {"method": one.method, "expression": one.expression, "scale": 1.0, **paper.views(one.method, 128)}
        for one in choices
    ]
    reports = paper.report_trials(PAIR, chosen, None, 1, 960)
    return {(one.method, one.split, one.seed): config.key(one) for one in choices + reports}


def test_trials_without_neighbours_do_not_depend_on_the_other_rows():
    """They were trained again in the same folder where a row with neighbours was added."""
    plain, both = keys(["seed"]), keys(["seed", "seed, neighbours"])
    assert len(plain) == 4 and plain.items() <= both.items()
    assert both["seed", "test", 1] != both["seed, neighbours", "test", 1]


def test_keys_do_not_depend_on_the_other_rows():
    """They are those that earlier versions wrote for a row that was asked for without others."""
    assert keys(["seed", "seed, neighbours"]) == {
        ("seed", "validation", 0): "258c955d24366277",
        ("seed", "test", 1): "c26ec5cdb0c2f7d3",
        ("random", "test", 1): "f383beaac80da174",
        ("teacher", "test", 1): "6c1d677f05646a04",
        ("seed, neighbours", "validation", 0): "8e3a2cccd6e28032",
        ("seed, neighbours", "test", 1): "b41803bbcd0e9466",
    }
