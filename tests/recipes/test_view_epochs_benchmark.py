"""The benchmark of views that come back: one cache for all runs, the same images, resumed where it stopped."""

import json
import sys

import pytest

import tests.helpers.runs as h


@pytest.fixture
def module(monkeypatch):
    return h.load_benchmark("view_epochs", monkeypatch)


def command(module, monkeypatch, output, dataset, teacher, *more):
    options = [f"--output={output}", f"--dataset={dataset}", f"--teacher={teacher}", "--seeds", "1", "2", *more]
    monkeypatch.setattr(sys, "argv", ["view_epochs.py", *options])
    module.main()
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_runs_are_resumed_and_summed_up(module, tmp_path, monkeypatch, capsys):
    ran = []

    def run_trial(trial, config, folder):
        training = config.training
        ran.append((training.get("view_epochs", 0), training["view_seed"], training.get("teacher_cache_dtype")))
        if len(ran) == 3:
            raise KeyboardInterrupt
        score = 0.5 + trial.seed / 100 - 0.1 * (training.get("view_epochs") == 1)
        return {"seed": trial.seed, "images_seen": trial.num_images} | dict.fromkeys(module.METRICS, score)

    monkeypatch.setattr(module, "run_trial", run_trial)
    given = (module, monkeypatch, tmp_path / "out.jsonl", "images", "teacher", "--view_epochs", "0", "1", "2")
    with pytest.raises(KeyboardInterrupt):
        command(*given)
    with (tmp_path / "out.jsonl").open("a") as file:
        file.write('{"view_ep')
    rows = command(*given)
    assert ran[:4] == [(2, 0, "float32"), (1, 0, "float32"), (0, 0, None), (0, 0, None)]
    assert len(rows) == 8 == len(ran) - 1 and {row["images_seen"] for row in rows} == {80_000}
    assert [row["cache_dtype"] for row in rows if row["view_epochs"] == 10] == ["float16", "float16"]
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert any(line.startswith("    1  float32  2 seeds  knn20 41.50 ± 0.71") for line in lines)
    assert any(line.startswith("never     live  2 seeds  knn20 51.50 ± 0.71") for line in lines)


@pytest.mark.slow
def test_one_cache_serves_all_numbers_of_view_epochs(module, tmp_path, image_parquet, networks, monkeypatch):
    monkeypatch.setattr("coss_hf.study.trials.measure", lambda *given: dict.fromkeys(module.METRICS, 0.5))
    small = ["--train_images=12", "--held_out=4", "--batch_size=4", "--epochs=3", "--float16_view_epochs=2"]
    given = (tmp_path / "out.jsonl", image_parquet, networks.teacher, "--view_epochs", "1", "2", "0", *small)
    rows = command(module, monkeypatch, *given)
    assert [row["shared_views"]["epochs"] for row in rows if row["cache_dtype"]] == [2, 1, 2] * 2
    assert {row["images_seen"] for row in rows} == {36} and sum("shared_views" in row for row in rows) == 6
    caches = list((tmp_path / "out.jsonl.files" / "teacher_cache").iterdir())
    assert len(caches) == 2, "one of float32 and one of float16"
