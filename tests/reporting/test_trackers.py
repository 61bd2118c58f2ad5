"""Trackio and TensorBoard: runs on this machine, read back."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TOKEN = "hf_abcdefghijklmnop"


@pytest.fixture(scope="session")
def trackio_folder(tmp_path_factory):
    """Trackio reads its folder once, at its import."""
    if "trackio" not in sys.modules:
        os.environ["TRACKIO_DIR"] = str(tmp_path_factory.mktemp("trackio"))
    trackio = pytest.importorskip("trackio", reason="trackio is not installed: pip install 'coss-hf[trackio]'")
    return Path(trackio.TRACKIO_DIR)


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.slow
def test_trackio_is_told_what_wandb_is_told(distill_command, trackio_folder):
    from trackio import Api
    from trackio.sqlite_storage import SQLiteStorage

    options = {"logging_steps": 2, "eval_steps": 3, "validation_size": 12, "save_strategy": "steps", "save_steps": 3}
    options |= {"report_to": "trackio", "hub_token": TOKEN, "run_name": "mine", "project": "ours"}
    distill_command.run(num_images=24, **options)
    distill_command.run("--resume_from_checkpoint", **options)
    logs = SQLiteStorage.get_logs("ours", "mine")
    (run,) = Api().runs("ours")
    assert [line["images_seen"] for line in logs if "train/loss" in line] == [16, 32, 48]
    panels = [line for line in logs if "agreement/overlap10" in line]
    assert [line["images_seen"] for line in panels] == [0, 24, 48]
    assert {"student/effective_rank", "teacher/effective_rank", "labels/knn10", "eval/loss"} <= panels[0].keys()
    assert (
        run.config["arguments"]["dataset"] == distill_command.images and len(run.config["fingerprints"]["teacher"]) > 10
    )
    record = json.loads((distill_command.out / "run.json").read_text())
    end = logs[-1]
    media = trackio_folder / "media"
    assert end["final/student/knn10"] == record["results"]["student"]["knn10"]
    for name in ("loss", "panel", "neighbors", "projection"):
        kept = Image.open(trackio_folder / "media" / end[f"pictures/{name}"]["file_path"])
        assert (
            np.asarray(kept.convert("RGB"))
            == np.asarray(Image.open(distill_command.out / f"{name}.png").convert("RGB"))
        ).all()
    assert (trackio_folder / "media" / end["report"]["file_path"]).read_text() == (
        distill_command.out / "report.html"
    ).read_text()
    rows = end["neighbors"]["_value"]
    assert len(rows) == 8 and list(rows[0])[:3] == ["query", "shared", "teacher 1"]
    assert Image.open(media / rows[0]["teacher 1"]["file_path"]).size == (16, 16)
    assert len(end["projection"]["_value"]) == 24
    assert not any(TOKEN.encode() in path.read_bytes() for path in trackio_folder.rglob("*") if path.is_file())


def test_tensorboard_gets_results_and_pictures(distill_command, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "boards"))
    distill_command.run(report_to="tensorboard", logging_steps=2, eval_steps=3, validation_size=12)
    board = EventAccumulator(str(next((tmp_path / "boards").rglob("events*")).parent)).Reload()
    record = json.loads((distill_command.out / "run.json").read_text())
    (event,) = board.Scalars("final/student/knn10")
    assert event.value == pytest.approx(record["results"]["student"]["knn10"]) and event.step == 6
    assert {"pictures/loss", "pictures/panel", "pictures/neighbors", "pictures/projection"} <= {*board.Tags()["images"]}
