"""What a command of several processes says of an error."""

from types import SimpleNamespace

import pytest

from coss_hf.utils import errors
from tests.helpers.processes import run

PROGRAM = """
import os, sys, time
from coss_hf.utils import errors
from coss_hf.utils.errors import RunStopped, bad_input_exits
errors.LAUNCHER_ENDS = 200 if sys.argv[2] == "common" else 1  # a busy machine takes its time
kind = {"ValueError": ValueError, "RunStopped": RunStopped}[sys.argv[1]]
with bad_input_exits():
    if sys.argv[2] == "common" or os.environ["RANK"] == "1":
        raise kind("--x=1: it is wrong.")
    time.sleep(200)
"""


@pytest.mark.parametrize("kind", ["ValueError", "RunStopped"])
@pytest.mark.parametrize(
    ("whose", "expected"), [("common", "error: --x=1: it is wrong."), ("own", "error: process 1: --x=1: it is wrong.")]
)
def test_an_error_is_printed_once_whichever_process_has_it(kind, whose, expected):
    """One of another process than the first ended the run without a word."""
    done = run(["-c", PROGRAM, kind, whose], processes=2)
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if "error:" in line] == [expected]


@pytest.mark.parametrize(("rank", "local_rank", "seconds"), [(0, 0, 0), (1, 1, 10), (2, 0, 10), (3, 1, 20)])
def test_how_long_a_process_leaves_an_error_to_another(rank, local_rank, seconds, monkeypatch, capsys):
    """All processes of a second machine printed an error that all have, since each waited for the first of all."""
    clock = [0.0]
    time = SimpleNamespace(monotonic=lambda: clock[0], sleep=lambda by: clock.append(clock.pop() + by))
    monkeypatch.setattr(errors, "time", time)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    with pytest.raises(SystemExit), errors.bad_input_exits():
        raise errors.RunStopped("it is wrong.")
    assert clock[0] == pytest.approx(seconds, abs=0.1)
    assert capsys.readouterr().err == f"error: {f'process {rank}: ' if rank else ''}it is wrong.\n"
