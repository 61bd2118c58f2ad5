"""The benchmark of the teacher cache goes on where it stopped, and compares the medians of its rounds."""

import json
import sys

import tests.helpers.runs as h


def test_runs_are_resumed_and_compared(tmp_path, monkeypatch, capsys):
    module = h.load_benchmark("teacher_cache", monkeypatch)
    monkeypatch.setattr(module, "restart_with_kept_memory", lambda: None)
    speeds = {"live": 10.0, "cold": 9.0, "warm": 19.0, "student": 20.0}
    runs = []

    def run(mode):
        runs.append(mode)
        if len(runs) == 6:
            raise KeyboardInterrupt
        return {"images_per_second": speeds[mode], "teacher_share": 0.5, "data_wait_share": 0.0}

    def run_trainer(pair, images, cache, steps, workers):
        return run("live" if cache is None else cache.name.rpartition("-")[2])

    monkeypatch.setattr(module, "run_trainer", run_trainer)
    monkeypatch.setattr(module, "run_student", lambda pair, steps: run("student"))
    output = tmp_path / "out.jsonl"
    monkeypatch.setattr(sys, "argv", ["b", f"--output={output}", "--pairs", "resnet", "--rounds=2"])
    try:
        module.main()
    except KeyboardInterrupt:
        assert len(output.read_text().splitlines()) == 4  # five runs, one of which fills the cache
    module.main()
    lines = [json.loads(line)["run"] for line in output.read_text().splitlines()]
    expected = ["live", "cold", "warm", "student", "cold", "warm", "student", "live"]
    assert [line["mode"] for line in lines] == expected
    shown = capsys.readouterr().out
    assert "warm         19.0      1.90        0.95" in shown
