"""The command `coss-hf`."""

import os
import signal
import subprocess
import sys
import zipfile

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from coss_hf import __version__
from coss_hf.cli import main as module
from coss_hf.cli.environment import environment
from coss_hf.cli.main import COMMANDS, main, recipe_path
from coss_hf.reporting.run_record import command
from tests.helpers.runs import ROOT


@pytest.fixture(autouse=True)
def this_process_stays_as_it_is(monkeypatch):
    monkeypatch.setenv("COSS_HF_COMMAND", "")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "")
    monkeypatch.setattr(sys, "argv", list(sys.argv))


def error(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*words])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_overview_names_every_command(capsys):
    main([])
    page = capsys.readouterr().out
    assert all(f"\n  {name} " in page for name in COMMANDS)
    main(["--version"])
    assert capsys.readouterr().out == f"coss-hf {__version__}\n"


def test_every_command_but_env_is_a_recipe():
    scripts = {path.stem.replace("_", "-") for path in (ROOT / "recipes").glob("*.py")}
    assert {*COMMANDS} - {"env"} == scripts
    assert all(recipe_path(name).is_file() for name in scripts)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distil"], "error: 'distil' is no command of coss-hf. Did you mean distill?"),
        (["distill", "--num_processes", "none"], "error: --num_processes none: give a whole number"),
        (["distill", "--num_processes=0"], "error: --num_processes 0: give a whole number"),
        (
            ["distill", "--accelerate_config", "nowhere"],
            "error: --accelerate_config nowhere: no such file; give a file, or",
        ),
        (["push", "--num_processes", "2"], "error: coss-hf push runs in one process"),
        (
            ["compare", "--num_processes=4"],
            "error: coss-hf compare runs in one process; leave out --num_processes and --accelerate_config. --jobs",
        ),
        (["push", "nowhere", "--repo_id", "me/x"], "error: nowhere holds no student"),
    ],
)
def test_bad_input(capsys, words, message):
    assert error(capsys, *words).startswith(message)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SignalException("Process 7 got signal: 2", sigval=signal.SIGINT), 130),
        (ChildFailedError("distill.py", {1: ProcessFailure(1, 7, 2, "no file")}), 2),
        (ChildFailedError("distill.py", {1: ProcessFailure(1, 7, -signal.SIGKILL, "no file")}), 137),
        (subprocess.CalledProcessError(143, "distill.py"), 143),
    ],
)
def test_launcher_adds_no_traceback_to_errors_of_its_processes(monkeypatch, error, code):
    """Ctrl-C on several processes ended with accelerate's."""

    def launch(args):
        raise error

    monkeypatch.setattr("accelerate.commands.launch.launch_command", launch)
    with pytest.raises(SystemExit) as stop:
        main(["distill", "--num_processes", "2"])
    assert stop.value.code == code


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--num_processes", "2"], {"num_processes": 2, "multi_gpu": True, "config_file": None}),
        (
            ["--accelerate_config=cpu"],
            {"num_processes": None, "config_file": str(ROOT / "accelerate_configs/cpu.yaml")},
        ),
        (["--accelerate_config=fsdp", "--num_processes=8"], {"num_processes": 8, "multi_gpu": False}),
    ],
)
def test_several_processes_are_launched_by_accelerate(monkeypatch, words, expected):
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    main(["distill", *words, "--teacher=a", "--use_cpu", "--hub_token", "secret"])
    (args,) = launched
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.training_script == str(ROOT / "recipes" / "distill.py")
    assert args.training_script_args == ["--teacher=a", "--use_cpu", "--hub_token", "secret"]
    assert os.environ["ACCELERATE_USE_CPU"] == "true"
    # What the record of the run calls its command, in every process.
    assert command() == f"coss-hf distill {' '.join(words)} --teacher=a --use_cpu --hub_token '***'"


def test_one_process_runs_here(monkeypatch):
    ran = []
    monkeypatch.setattr(module.runpy, "run_path", lambda path, run_name: ran.append((path, run_name, sys.argv)))
    main(["train-teacher", "--model", "resnet20"])
    path = str(ROOT / "recipes" / "train_teacher.py")
    assert ran == [(path, "__main__", [path, "--model", "resnet20"])]


def test_environment_hides_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    text = environment()
    assert "HF_TOKEN=***" in text and "secret" not in text and "OMP_NUM_THREADS=7" in text
    assert f"coss-hf{' ' * 10}{__version__}" in text.replace("not installed", __version__) and "GPUs" in text


@pytest.mark.slow
def test_the_wheel_holds_recipes_and_configurations(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {*zipfile.ZipFile(wheel).namelist()}
    ours = [*(ROOT / "recipes").glob("*.py"), *(ROOT / "recipes/configs").glob("*"), *ROOT.glob("accelerate_configs/*")]
    assert {f"coss_hf/{path.relative_to(ROOT)}" for path in ours} < names
    assert {"coss_hf/py.typed", "coss_hf/cli/help_texts/distill.txt"} < names
    assert not [name for name in names if name.startswith(("tests", "recipes"))]
