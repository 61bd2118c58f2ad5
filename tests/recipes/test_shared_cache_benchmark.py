"""The benchmark of a shared cache resumes where it stopped, and counts what the teacher embeds."""

import json
import sys

import pytest

import tests.helpers.runs as h


@pytest.fixture
def module(monkeypatch):
    module = h.load_benchmark("shared_cache", monkeypatch)
    monkeypatch.setattr(module, "restart_with_kept_memory", lambda: None)
    monkeypatch.setattr(module.factory, "DistillationTrainer", module.DistillationTrainer)  # put back after the test
    return module


@pytest.mark.slow
def test_passes_of_both_ways(module, tmp_path, image_parquet, monkeypatch, capsys):
    """12 training images, 2 epochs of the same views: a live teacher embeds 24 of them, a shared one 12 at first."""
    monkeypatch.setattr("coss_hf.study.trials.measure", lambda *given: {})
    output = tmp_path / "out.jsonl"
    options = ["--train_images=12", "--held_out=4", "--batch_size=4", "--scales", "1", "2", "--methods", "pkt", "at"]
    monkeypatch.setattr(sys, "argv", ["b", f"--output={output}", f"--dataset={image_parquet}", *options])
    module.main()
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    passes = {(row["method"], row["scale"], row["way"]): row["teacher_images"] for row in rows}
    assert [passes["pkt", scale, "live"] for scale in (1, 2)] == [24, 24]
    assert [passes["pkt", scale, "shared"] for scale in (1, 2)] == [12, 0]
    assert [passes["at", scale, way] for scale in (1, 2) for way in module.WAYS] == [24] * 4
    assert {row["method"] for row in rows if row["cached"]} == {"pkt"}
    # A resume began with an empty cache and another teacher, and failed on a line that was cut short.
    kept = [json.dumps(row) for row in rows if (row["method"], row["scale"], row["way"]) != ("pkt", 2, "shared")]
    output.write_text("\n".join([*kept, '{"method": "pk']))
    module.main()
    resumed = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(resumed) == len(rows) and resumed[-1]["way"] == "shared" and resumed[-1]["teacher_images"] == 0
    ran = []
    monkeypatch.setattr(module, "run_trial", lambda trial, *rest: ran.append(trial.method))
    capsys.readouterr()
    module.main()
    assert ran == ["teacher"], "finished trials are not run again"
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ["all", "4", "live", "96"] and lines[2].split()[:4] == ["all", "4", "shared", "60"]
