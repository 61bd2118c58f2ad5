"""Programs in processes of their own, without the seconds that importing torch and Transformers takes each time.

Each is forked from a server that has only imported third-party packages: the project's own modules, the program and
its options run as in a process started from nothing. Tests of the launcher, of the import phase or of the environment
that packages read at import start ``subprocess`` themselves.
"""

import atexit
import functools
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    "torch",
    "torch.distributed",
    "torchvision",
    "numpy",
    "scipy.stats",
    "pandas",
    "pyarrow.parquet",
    "sklearn",
    "PIL.Image",
    "faiss",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "huggingface_hub.utils",
    "transformers.trainer",
    "transformers.hf_argparser",
    "transformers.models.vit.modeling_vit",
    "datasets",
    "accelerate",
)


@functools.cache
def server(modules: tuple[str, ...], environment: tuple[tuple[str, str], ...] | None = None) -> socket.socket:
    """The connection to a server that has imported ``modules`` under ``environment``, by default that of this process;
    one for each process that runs tests."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = dict(environment or os.environ) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, f"{ROOT}/tests/helpers/fork_server.py", str(its.fileno()), *modules]
    process = subprocess.Popen(command, env=environment, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL)
    its.close()
    atexit.register(process.kill)  # what it started has ended, or is of no use
    return ours


class Program:
    """As ``subprocess.Popen`` with pipes and text, for ``argv`` of a Python script; ``processes`` of them in a group
    of torch.distributed share the pipes. ``imported_in`` are the variables that packages read at their import: a
    server of its own imports them so."""

    def __init__(
        self, argv, *, environment=None, cwd=ROOT, processes: int = 1, modules=MODULES, imported_in: dict | None = None
    ):
        self.args = [str(word) for word in argv]
        self.returncode = None
        request = {
            "argv": self.args,
            "cwd": str(cwd),
            "environment": dict(environment if environment is not None else os.environ),
            "processes": processes,
            "largest_file": resource.getrlimit(resource.RLIMIT_FSIZE)[0],
        }
        pipes = [os.pipe() for _ in range(4)]  # stdin, stdout, stderr, answers
        theirs = [pipes[0][0], pipes[1][1], pipes[2][1], pipes[3][1]]
        variables = None if imported_in is None else tuple(sorted(imported_in.items()))
        socket.send_fds(server(modules, variables), [json.dumps(request).encode()], theirs)
        for descriptor in theirs:
            os.close(descriptor)
        self.stdin = open(pipes[0][1], "w")
        self.stdout = open(pipes[1][0])
        self.stderr = open(pipes[2][0])
        self.answers = open(pipes[3][0])
        self.pid = int(self.answers.readline())
        os.set_blocking(self.answers.fileno(), False)

    def poll(self) -> int | None:
        if self.returncode is None and (answer := self.answers.readline()):
            self.returncode = int(answer)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + timeout if timeout is not None else float("inf")
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return self.returncode

    def communicate(self, input: str = "", timeout: float | None = None) -> tuple[str, str]:
        text = {}
        readers = [
            threading.Thread(target=lambda name=name: text.update({name: getattr(self, name).read()}), daemon=True)
            for name in ("stdout", "stderr")
        ]
        for reader in readers:
            reader.start()
        with self.stdin:
            self.stdin.write(input)
        self.wait(timeout)
        for reader in readers:
            reader.join()
        return text["stdout"], text["stderr"]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(15)

    def kill(self) -> None:
        self.send_signal(9)


def run(argv, timeout: float = 300, **options) -> subprocess.CompletedProcess:
    """As ``subprocess.run(..., capture_output=True, text=True)``."""
    program = Program(argv, **options)
    try:
        out, err = program.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        program.kill()
        raise
    return subprocess.CompletedProcess(program.args, program.returncode, out, err)


FUNCTION = """
import importlib, sys
import torch, torch.distributed as dist
module, name, arguments = sys.argv[1:]
torch.set_num_threads(1)
dist.init_process_group("gloo")
getattr(importlib.import_module(module), name)(dist.get_rank(), *torch.load(arguments, weights_only=False))
dist.destroy_process_group()
"""


def spawn(function, folder: Path, *arguments, processes: int) -> None:
    """``function(rank, *arguments)`` in each process of a gloo group; ``folder`` is for the arguments."""
    torch.save(arguments, folder / "arguments.pt")
    words = ["-c", FUNCTION, function.__module__, function.__qualname__, folder / "arguments.pt"]
    done = run(words, processes=processes)
    assert done.returncode == 0, done.stderr
