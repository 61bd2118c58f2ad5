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
    monkeypatch.setattr(cores.psutil, "Process", lambda: SimpleNamespace(cpu_times=lambda: (next(own), 0, 0, 0)))
    monkeypatch.setattr(cores.time, "monotonic", lambda: next(clock))
    assert cores.OtherLoad().cores() == pytest.approx((4 + 1 - 1) / 4)


def test_other_load_is_not_known_at_once():
    assert cores.OtherLoad().cores() is None
