"""Damaged checkpoints are found before they are trained on.

A missing optimizer or scheduler gave another student without a word, a flipped byte weights that were blamed on images,
and a truncated file a traceback.
"""

import json
import shutil
from pathlib import Path

import pytest

import tests.helpers.runs as h
from coss_hf.trainer.checkpoint_files import find_checkpoint, newest_complete, set_damaged_aside
from coss_hf.trainer.manifest import MANIFEST, find_damage, write_manifest


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A finished run of 6 steps, with checkpoints at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("world")
    teacher, student = (h.save_resnet(folder / name, seed=seed) for seed, name in enumerate(("teacher", "student")))
    images = h.write_images(folder / "images")

    def make(output):
        options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None, "method": "crd(negatives=5)"}
        return h.make_trainer(folder, images, teacher, student, **options, output_dir=str(output))

    trainer = make(folder / "run")
    trainer.train()
    return {"run": folder / "run", "make": make, "state": h.state(trainer)}


@pytest.fixture
def run(world, tmp_path):
    """A copy of the run without its last checkpoint, whose files may be damaged."""
    for step in (2, 4):
        shutil.copytree(world["run"] / f"checkpoint-{step}", tmp_path / "out" / f"checkpoint-{step}")
    return tmp_path / "out"


def remove(path: Path) -> None:
    path.unlink()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


FILES = ("model.safetensors", "criterion.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json")


@pytest.mark.parametrize("damage", [remove, flip, truncate, empty])
@pytest.mark.parametrize("name", FILES)
def test_the_newest_complete_checkpoint_is_found(run, capsys, damage, name):
    damage(run / "checkpoint-4" / name)
    assert find_checkpoint(str(run), "auto") == str(run / "checkpoint-2")
    said = capsys.readouterr().out
    assert said.startswith(f"Damaged, and passed over for {run}/checkpoint-2: {run}/checkpoint-4: ")
    assert name in said or name == "config.json"
    find_checkpoint(str(run), "auto")
    assert capsys.readouterr().out == "", "a run looks for its checkpoint several times, and says so once"
    with pytest.raises(ValueError, match=rf"checkpoint-4 is not a complete.*Give {run}/checkpoint-2, which is\."):
        find_checkpoint(str(run), str(run / "checkpoint-4"))
    shutil.rmtree(run / "checkpoint-2")
    with pytest.raises(ValueError, match=rf"no checkpoint in {run} is complete .*checkpoint-4: .*Put back"):
        find_checkpoint(str(run), True)


def test_incomplete_first_checkpoint_does_not_stop_a_run(tmp_path, capsys):
    half = tmp_path / "checkpoint-1"
    half.mkdir()
    (half / "config.json").write_text("{}")
    assert find_checkpoint(str(tmp_path), "auto") is None
    assert f"passed over for a fresh start: {half}: it is not complete" in capsys.readouterr().out


def test_a_run_resumes_before_the_damage_to_the_same_student(world, run, capsys):
    flip(run / "checkpoint-4" / "optimizer.pt")
    trainer = world["make"](run)
    trainer.train(resume_from_checkpoint="auto")
    out = capsys.readouterr().out
    assert "checkpoint-4: optimizer.pt does not hold what was written" in out and "checkpoint-2, step 2." in out
    h.assert_same(h.state(trainer), world["state"])
    # Written again; what was damaged is kept, where it does not count as the newest.
    assert find_damage(run / "checkpoint-4") is None and find_damage(run / "damaged-checkpoint-4") is not None


def test_every_file_of_a_checkpoint_is_in_its_manifest(world):
    folder = world["run"] / "checkpoint-4"
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    assert {*listed, MANIFEST} == {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} and {
        *FILES
    } < {*listed}


def test_unreadable_manifest_counts_as_damage(run):
    for content in ("", "[]", '{"files": 3}', '{"files": {"model.safetensors": {}}}'):
        (run / "checkpoint-4" / MANIFEST).write_text(content)
        assert find_damage(run / "checkpoint-4") == f"{MANIFEST} cannot be read"


def test_unreadable_checkpoint_file_counts_as_damaged(run, monkeypatch):
    def broken(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("coss_hf.trainer.manifest._checksum", broken)
    assert find_damage(run / "checkpoint-4").endswith(" cannot be read (Input/output error)")


def test_a_checkpoint_without_manifest_is_not_complete(run, capsys):
    (run / "checkpoint-4" / MANIFEST).unlink()
    assert find_checkpoint(str(run), "auto") == str(run / "checkpoint-2")
    assert f"checkpoint-4: {MANIFEST} is missing" in capsys.readouterr().out


def test_damage_is_looked_for_again_where_a_file_changed(run):
    folder = run / "checkpoint-4"
    assert newest_complete(run) == (str(folder), {})
    flip(folder / "model.safetensors")
    assert newest_complete(run)[0] == str(run / "checkpoint-2")
    write_manifest(folder)
    assert newest_complete(run)[0] == str(folder)
    set_damaged_aside(str(folder))
    assert folder.is_dir()
