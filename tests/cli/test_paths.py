"""`~` and variables of the environment in arguments: no shell expands them in YAML files, in quotes or after `=`."""

import argparse

import pytest

from coss_hf.cli.parser import parse
from coss_hf.cli.paths import expand_word, path
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.trainer.training_args import DistillationArguments


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("~/images", "/home/me/images"),
        ("--dataset=~/images", "--dataset=/home/me/images"),
        ("--dataset=$SCRATCH/images", "--dataset=/scratch/images"),
        ("${SCRATCH}-2/images", "/scratch-2/images"),
        ("--use_cpu", "--use_cpu"),
        ("coss + rkd(beta=2)", "coss + rkd(beta=2)"),
        ("--run_name=5$", "--run_name=5$"),
        ("--hub_token=a$SCRATCH", "--hub_token=a$SCRATCH"),
        ("images~", "images~"),
    ],
)
def test_words(word, expected):
    assert expand_word(word) == expected


def test_a_name_that_is_there_is_taken_as_it_is(tmp_path):
    (tmp_path / "$SCRATCH").mkdir()
    assert expand_word("$SCRATCH") == "$SCRATCH"


def test_every_argument_of_a_file_and_of_a_command(tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text(
        "teacher: ~/teacher\nstudent: $SCRATCH/student\ndataset: ${SCRATCH}/images\nneighbors_cache: ~/cache\n"
        "report_to: [tensorboard]\noutput_dir: ~/out\n"
    )
    monkeypatch.setenv("HERE", str(tmp_path))
    arguments = (ModelArguments, DataArguments, DistillationArguments)
    words = ["--config", "$HERE/run.yaml", "--use_cpu", "--resume_from_checkpoint=~/out/checkpoint-1"]
    models, data, args = parse(arguments, words)
    assert (models.teacher, models.student) == ("/home/me/teacher", "/scratch/student")
    assert (data.dataset, data.neighbors_cache) == ("/scratch/images", "/home/me/cache")
    assert (args.output_dir, args.resume_from_checkpoint) == ("/home/me/out", "/home/me/out/checkpoint-1")


def test_a_variable_that_is_not_set(tmp_path):
    with pytest.raises(ValueError, match=r"^--output_dir \$NOWHERE/out: the variable NOWHERE is not set"):
        parse((DistillationArguments,), ["--use_cpu", "--output_dir=$NOWHERE/out"])
    (tmp_path / "run.yaml").write_text("dataset: $NOWHERE/images\n")
    with pytest.raises(ValueError, match="NOWHERE is not set"):
        parse((DataArguments,), ["--config=run.yaml"])


def test_recipes_of_plain_arguments():
    assert str(path("~/student")) == "/home/me/student"
    with pytest.raises(argparse.ArgumentTypeError, match="NOWHERE is not set"):
        path("$NOWHERE/student")
