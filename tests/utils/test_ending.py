"""The end of a process from outside: real processes, real signals."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tests.helpers.runs as h

START = """
import ctypes, os, signal, sys, threading, time
from coss_hf.utils.ending import ENDING
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
ENDING.install()
"""
# Neither is a wait that a signal's handler could end: one ignores it, the other never gets back to Python.
IGNORES = "while True: time.sleep(0.05)"
DEAF = "lock = ctypes.create_string_buffer(64); [ctypes.CDLL(None).pthread_mutex_lock(lock) for _ in range(2)]"


def start(script: str, setting: str = "", **environment) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", f"{START}{setting}\nos.write(1, b'ready')\n{script}"],
        cwd=h.ROOT,
        env={name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.read(5)
    return process


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_signal_ends_a_command_with_a_message_and_its_exit_code(number, name):
    """It ended without a word by SIGTERM, and with a traceback by Ctrl-C."""
    process = start("time.sleep(60)")
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert err == f"{name}: ended. Give the same command again.\n"
    assert process.returncode == 128 + number


@pytest.mark.parametrize("recipe", ["distill", "neighbors", "evaluate", "train_teacher"])
def test_signal_during_imports_prints_a_message(recipe):
    """They take seconds, in which SIGTERM ended a run without a word."""
    command = [sys.executable, str(h.ROOT / "recipes" / f"{recipe}.py")]
    environment = os.environ | {"PYTHONPATH": str(h.ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    status = Path(f"/proc/{process.pid}/status")
    caught = 1 << (signal.SIGTERM - 1)
    while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) & caught:
        time.sleep(0.01)
    process.terminate()
    assert process.communicate(timeout=20)[1] == "SIGTERM: ended. Give the same command again.\n"
    assert process.returncode == 143


@pytest.mark.parametrize("hang", [IGNORES, DEAF])
def test_a_step_that_hangs_is_ended_after_a_time_of_grace(hang):
    process = start(hang, "ENDING.deferred = True; ENDING.grace = lambda: 0.5")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143
    first, second = err.splitlines()
    assert first.startswith("SIGTERM: after this step") and second.startswith("SIGTERM: ended at once (no end after")


@pytest.mark.parametrize("hang", [IGNORES, DEAF])
def test_a_second_signal_ends_at_once(hang):
    process = start(hang, "ENDING.deferred = True")
    for _ in range(3):  # a scheduler's, and the launcher's that passes it on, are one
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert process.poll() is None
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143 and "ended at once (a second signal)" in err


def test_hanging_shutdown_is_ended():
    process = start("time.sleep(60)", "import atexit; atexit.register(time.sleep, 60); ENDING.grace = lambda: 0.5")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "no end after" in err


def test_error_caused_by_a_signal_prints_no_traceback():
    """As of a process whose peer left a moment before."""
    error = "raise RuntimeError('closed by peer')"
    assert "Traceback" in start(error).communicate(timeout=20)[1]
    process = start(f"time.sleep(1); ENDING.deferred = False; {error}", "ENDING.deferred = True")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "Ctrl-C: ended. Give" in err and "Traceback" not in err


def test_signal_during_a_callback_ends_the_command():
    """Python ignored the end that was raised there, and the command continued."""
    late = "class Late:\n def __del__(self): os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.05)\n"
    process = start("Late(); time.sleep(60)", late)
    _, err = process.communicate(timeout=10)  # less than the time of grace
    assert err == "SIGTERM: ended. Give the same command again.\n"
    assert process.returncode == 143
    other = f"{late}Late.__del__ = lambda self: 1 / 0\n"
    assert "ZeroDivisionError" in start("Late()", other).communicate(timeout=20)[1]


def test_signal_during_the_last_step_ends_the_run_after_it():
    process = start("time.sleep(1); ENDING.deferred = False; ENDING.heed(); time.sleep(60)", "ENDING.deferred = True")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143 and "SIGTERM: ended. Give" in err


def test_only_the_first_process_prints_the_message():
    process = start("time.sleep(60)", RANK="1")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[1] == "" and process.returncode == 143


def test_earlier_signal_handlers_are_restored():
    script = "before = signal.getsignal(signal.SIGINT); ENDING.uninstall()\n"
    script += "print(before != signal.getsignal(signal.SIGINT) == signal.default_int_handler, file=sys.stderr)"
    assert start(script).communicate(timeout=20)[1] == "True\n"
