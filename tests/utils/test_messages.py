"""One message, in the words of its reader: flags where a command runs, parameters in Python."""

import logging
import sys

import datasets
import pytest
import torch
from PIL import Image

import coss_hf
from coss_hf import DistillationArguments
from coss_hf.cli import bad_input_exits
from coss_hf.neighbors.mining import search
from coss_hf.utils.errors import CheckpointError, UnreadableImage
from coss_hf.utils.messages import command_line, command_to, for_reader, get_logger, parameter_names
from tests.helpers.runs import ROOT


@pytest.mark.parametrize(
    ("message", "in_python"),
    [
        ("--neighbors_k=3: too many; use --neighbors_k 0.", "neighbors_k=3: too many; use neighbors_k=0."),
        ("--head=none: use --head mlp or --head linear.", 'head=none: use head="mlp" or head="linear".'),
        ("--view_size in pixels", "view_size in pixels"),
        ("--dataset cifar-10: no such folder", "dataset cifar-10: no such folder"),
        ("--teacher none/such, --seed 3.", "teacher none/such, seed=3."),
        ("--method crd: its negatives", 'method="crd": its negatives'),
        ("--method mse and a --method of yours", 'method="mse" and a method of yours'),
        ("use --neighbors_search exact or ivf.", 'use neighbors_search="exact" or ivf.'),
        ("--beta 0.5, or --on_bad_image skip, which", 'beta=0.5, or on_bad_image="skip", which'),
        ("run docker with --shm-size=1g.", "run docker with --shm-size=1g."),
        ("`hf download a/b --local_dir x`", "`hf download a/b --local_dir x`"),
        (
            "it with: coss-hf push out --repo_id me/x; or --push_to_hub",
            "it with: coss-hf push out --repo_id me/x; or push_to_hub",
        ),
        (
            "step 4 is saved; give the same command with --resume_from_checkpoint.",
            "step 4 is saved; call train(resume_from_checkpoint=True) in the same lines.",
        ),
        ("start afresh with --overwrite_output_dir", "start afresh with overwrite_output_dir=True"),
    ],
)
def test_flags_become_parameters_and_commands_stay(message, in_python):
    assert for_reader(message) == in_python
    with command_line():
        assert for_reader(message) == message


def test_a_log_line_whose_arguments_do_not_fit_ends_nothing(caplog, monkeypatch):
    """`logging` swallows such a mistake; the filter raised it into the training."""
    monkeypatch.setattr("logging.raiseExceptions", False)
    record = logging.LogRecord("coss_hf.test", logging.INFO, "", 0, "%d of --seed", ("three",), None)
    assert get_logger("coss_hf.test").filter(record)


@pytest.mark.parametrize("kind", [ValueError, CheckpointError, UnreadableImage])
def test_errors_keep_their_kind_and_cause(kind):
    cause = OSError("disk")

    @parameter_names()
    def fail():
        raise kind("--seed=x: give a number.") from cause

    with pytest.raises(kind, match="^seed=x: give") as raised:
        fail()
    assert raised.value.__cause__ is cause
    with pytest.raises(kind, match="^--seed=x"), command_line():
        fail()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 2}, "^momentum=2: give a number from 0 to 1"),
        ({"method": "cos"}, "^method='cos' is unknown"),
        ({"optim": "sgdd"}, "^optim=sgdd: "),
        ({"num_images": 5, "max_steps": 3}, "^num_images=5 and max_steps=3: give one of them"),
        ({"dataloader_drop_last": False}, "^dataloader_drop_last cannot be switched off"),
        ({"label_smoothing_factor": 0.1}, "^label_smoothing_factor=0.1: .*leave it out"),
    ],
)
def test_arguments_from_python_and_from_a_command(tmp_path, capsys, options, message):
    """They named flags in Python, where nobody gives any."""
    with pytest.raises(ValueError, match=message) as raised:
        DistillationArguments(str(tmp_path), use_cpu=True, **options)
    assert "--" not in str(raised.value)
    with pytest.raises(SystemExit), bad_input_exits():
        DistillationArguments(str(tmp_path), use_cpu=True, **options)
    assert f"error: --{next(iter(options))}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "environment", "expected"),
    [
        ("/usr/bin/pytest", "", "coss-hf train-teacher"),
        ("recipes/distill.py", "", "python recipes/train_teacher.py"),
        ("recipes/distill.py", "coss-hf distill", "coss-hf train-teacher"),
        ("/site-packages/coss_hf/recipes/distill.py", "", "coss-hf train-teacher"),
    ],
)
def test_commands_are_named_as_they_can_be_typed(monkeypatch, script, environment, expected):
    """Advice named scripts of a clone to those who had installed the package."""
    monkeypatch.setattr(sys, "argv", [script])
    monkeypatch.setenv("COSS_HF_COMMAND", environment)
    assert command_to("train-teacher") == expected


def test_a_script_is_known_from_its_own_folder(monkeypatch):
    """There its path names no folder."""
    monkeypatch.chdir(ROOT / "recipes")
    monkeypatch.setattr(sys, "argv", ["distill.py"])
    monkeypatch.delenv("COSS_HF_COMMAND", raising=False)
    assert command_to("train-teacher") == "python train_teacher.py"


def test_log_lines_name_parameters_in_python(caplog):
    """Only errors did: warnings told callers in Python to give --neighbors_k."""
    logger = get_logger("coss_hf.example")
    assert get_logger("coss_hf.example").filters == logger.filters and len(logger.filters) == 1
    logger.warning("--on_bad_image skip: %d images, %s%%: see --view_size", 3, 50)
    with command_line():
        logger.warning("--on_bad_image skip: %d images", 3)
    logger.warning("100 %% of -- nothing")
    assert caplog.messages == [
        'on_bad_image="skip": 3 images, 50%: see view_size',
        "--on_bad_image skip: 3 images",
        "100 %% of -- nothing",
    ]


def test_every_module_logs_and_warns_by_such_a_logger():
    """A logger of another kind would name flags to callers in Python."""
    for path in sorted((ROOT / "coss_hf").rglob("*.py")):
        text = path.read_text()
        assert "logging.getLogger(__name__)" not in text and "warnings.warn(" not in text, path


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rows: coss_hf.load_images(rows, validation_size=-1), "^validation_size=-1"),
        (lambda rows: coss_hf.load_backbone("nowhere/nothing", argument="teacher"), "^teacher=nowhere/nothing"),
        (lambda rows: coss_hf.add_neighbors(rows, None, "image", k=0), "^k=0: use 1 or more"),
        (lambda rows: search(torch.eye(3), 3), "^k=3: .*; use k=2 or fewer"),
    ],
)
def test_functions_of_the_package_name_parameters(call, message):
    """Errors of ``load_images`` and others told Python users of flags."""
    rows = datasets.Dataset.from_dict({"image": [Image.new("RGB", (4, 4))] * 6})
    with pytest.raises(ValueError, match=message) as raised:
        call(rows)
    assert "--" not in str(raised.value)


def test_embed_names_parameters(monkeypatch):
    def refuse(*_, **__):
        raise ValueError("--pooling=x is unknown")

    monkeypatch.setattr("coss_hf.models.embedding.load_network", refuse)
    with pytest.raises(ValueError, match="^pooling=x is unknown"):
        coss_hf.embed("nowhere/nothing", [Image.new("RGB", (4, 4))])
