"""Runs Python programs in forks of a process that holds the imports of several seconds; started by ``processes.py``.

    python fork_server.py SOCKET MODULE...

A request names a program, its environment and its pipes; the answer is its process id, and later its exit status.
"""

import atexit
import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import sys
import time

GRACE = 30.0  # seconds between SIGTERM and SIGKILL, as torch's launcher


def serve(connection: socket.socket) -> dict:
    """Answers requests until the other side is gone. Returns, in each child, the request to run."""
    answers = {}  # by process id, where its exit status is written
    while True:
        ready, _, _ = select.select([connection], [], [], 0.02 if answers else None)
        if ready:
            message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 4)
            if not message:
                sys.exit()
            child = os.fork()
            if not child:
                connection.close()
                for answer in answers.values():
                    os.close(answer)
                os.close(descriptors.pop())
                return prepare(json.loads(message), descriptors)
            answers[child] = descriptors.pop()
            os.write(answers[child], f"{child}\n".encode())
            for descriptor in descriptors:
                os.close(descriptor)
        for child in list(answers):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                answer = answers.pop(child)
                os.write(answer, f"{os.waitstatus_to_exitcode(status)}\n".encode())
                os.close(answer)


def prepare(request: dict, pipes: list[int]) -> dict:
    """What ``subprocess`` does between fork and exec: session, pipes, folder, environment, limits."""
    os.setsid()
    for number, descriptor in enumerate(pipes):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["largest_file"] != resource.RLIM_INFINITY:
        sys.dont_write_bytecode = True
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (request["largest_file"], resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        )
    return request


def launch(processes: int) -> None:
    """Returns in each of ``processes`` children, which torch.distributed finds as behind a launcher; this process
    waits for them and, as a launcher, ends all where one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(processes))
    os.environ.update(LOCAL_WORLD_SIZE=str(processes), ACCELERATE_MIXED_PRECISION="no")
    children = []
    for rank in range(processes):
        child = os.fork()
        if not child:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            return
        children.append(child)
    signal.signal(signal.SIGTERM, lambda *_: [os.kill(child, signal.SIGTERM) for child in children])
    os._exit(wait(children))


def wait(children: list[int]) -> int:
    """0 where all children end with 0, else 1."""
    failed, end = False, None
    while children:
        for child in list(children):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                children.remove(child)
                failed |= status != 0
        if failed and end is None:
            end = time.monotonic() + GRACE
            for child in children:
                os.kill(child, signal.SIGTERM)
        elif failed and time.monotonic() > end:
            for child in children:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return int(failed)


if __name__ == "__main__":
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a collection in a child would look at, and so copy, all of it
    atexit.register(gc.unfreeze)  # else bindings of C++ report what was not collected as leaked
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    if request["processes"] > 1:
        launch(request["processes"])
    sys.argv = request["argv"]
    if sys.argv[0] == "-c":
        sys.path[0] = ""
        code = sys.argv.pop(1)
        exec(code, {"__name__": "__main__"})
    else:
        sys.path[0] = os.path.dirname(sys.argv[0])
        runpy.run_path(sys.argv[0], run_name="__main__")
