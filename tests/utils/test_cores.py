"""Cores: by affinity and by the quota of a container; those that other programs keep busy."""

from types import SimpleNamespace

import pytest

from coss_hf.utils import cores


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 6),
        ({"cpu.max": "max 100000"}, 6),
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "900000 100000"}, 6),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 6),
        ({"cpu.max": "strange"}, 6),
    ],
)
def test_usable_cores(tmp_path, monkeypatch, files, expected):
    """A container of 2 cores on a machine of 64 once got 64 workers in other projects."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cores, "CGROUP", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(6))
    assert cores.usable_cores() == expected


def test_other_load_counts_neither_this_process_nor_forbidden_cores(monkeypatch):
    times = iter([(10.0, 3.0, 50.0), (14.0, 4.0, 99.0)])  # of three cores
    own = iter([1.0, 2.0])
    clock = iter([0.0, 4.0])

    def of_cores(percpu):
        return [Core(user=busy, idle=7.0) for busy in next(times)]

    class Core(tuple):
        def __new__(cls, user, idle):
            core = super().__new__(cls, (user, idle))
            core.idle = idle
            return core

    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(cores.psutil, "cpu_times", of_cores)
    # Another process of the training and a loader worker, both busy all the time, are no other programs.
    children = [SimpleNamespace(pid=number, cpu_times=lambda: (0, 0, 0, 0)) for number in (2, 3)]
    process = SimpleNamespace(pid=1, cpu_times=lambda: (next(own), 0, 0, 0), children=lambda recursive: children)
    monkeypatch.setattr(cores.psutil, "Process", lambda: process)
    monkeypatch.setattr(cores.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(cores, "_quota", lambda: None)
    assert cores.OtherLoad().cores() == pytest.approx((4 + 1 - 1) / 4)


def test_processes_of_the_same_training_are_no_other_programs(monkeypatch):
    """Ranks beside this one, and the loader workers of all of them."""
    worker = SimpleNamespace(pid=3)
    rank = SimpleNamespace(pid=1)
    parent = SimpleNamespace(children=lambda recursive: [rank, SimpleNamespace(pid=2), worker])
    rank.parent = lambda: parent
    rank.children = lambda recursive: [worker]
    monkeypatch.setattr(cores.OtherLoad, "_busy_seconds", lambda self: 0.0)
    monkeypatch.setattr(cores.psutil, "Process", lambda: rank)
    pids = {}
    for count in ("1", "2"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", count)
        pids[count] = [one.pid for one in cores.OtherLoad()._own_processes()]
    assert pids == {"1": [1, 3], "2": [1, 2, 3]}


def test_other_containers_are_no_other_programs(monkeypatch):
    """With a quota of 2 of a busy machine's 64 cores it was said that other programs keep 20 of 2 cores busy."""
    monkeypatch.setattr(cores, "_quota", lambda: 2.0)
    assert cores.OtherLoad().cores(at_least=0) is None


def test_other_load_is_not_known_at_once():
    assert cores.OtherLoad().cores() is None
