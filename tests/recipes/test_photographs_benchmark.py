"""The benchmark of photographs: what is trained, what is chosen on held-out images, and what is read on test images."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

import tests.helpers.runs as h


@pytest.fixture
def world(tmp_path, monkeypatch):
    """The recipe with networks that are not trained; ``scores`` decide how good each is."""
    module = h.load_benchmark("photographs", monkeypatch)
    scores = {"sgd, warm-up, clipping": 0.5, "adamw 5e-4": 0.4, "adamw 2e-3": 0.3, "paper": 0.2}
    trained = []

    def train(self, trial, config, folder):
        folder.mkdir(parents=True)
        training = config.training
        trained.append((trial.method, trial.seed, trial.num_images, trial.neighbors_k, trial.anchors))
        assert training["view_epochs"] == 8 and training["view_seed"] == 0, "the teacher embeds each view once"
        settings = {name: value for name, value in training.items() if name in module.ADAMW or name == "learning_rate"}
        score = next(scores.get(name, 0.1) for name, own in module.WARM_SETTINGS.items() if own == settings)
        return SimpleNamespace(student=score, project=None, images_seen=trial.num_images)

    def measure(trial, config, network, project=None):
        return {"knn20": network if isinstance(network, float) else 0.1, "linear": 0.6, "split": trial.split}

    monkeypatch.setattr(module.Experiment, "_trained", train)
    monkeypatch.setattr(module, "measure", measure)
    network = SimpleNamespace(model=torch.nn.Linear(2, 2), backbone=0.7, head=None)
    monkeypatch.setattr(module.Student, "from_pretrained", lambda folder: network)
    monkeypatch.setattr(module, "load", lambda config, pair: (None, network))
    monkeypatch.setattr(module.ModelArguments, "load_student", lambda self, teacher: network)
    monkeypatch.setattr(module, "costs", lambda networks, device, rounds: dict.fromkeys(networks, {"bytes": 1}))

    def run(stage, *more):
        given = ["--images=photos", "--other_images=others", "--teacher=teacher", f"--output_dir={tmp_path / 'out'}"]
        argv = ["photographs.py", *given, f"--stage={stage}", "--students", "mobilenetv3", *more]
        monkeypatch.setattr(sys, "argv", argv)
        trained.clear()
        module.main()
        return [json.loads(line) for line in (tmp_path / "out" / "photographs.jsonl").read_text().splitlines()]

    return SimpleNamespace(module=module, run=run, trained=trained, scores=scores)


def test_settings_are_chosen_on_held_out_images(world):
    with pytest.raises(SystemExit, match=r"mobilenetv3: not all settings have run; give --stage settings"):
        world.run("methods")
    rows = world.run("settings")
    assert len(world.trained) == 4 * 3 and {row["split"] for row in rows} == {"validation"}
    assert [(row["seed"], row["images_seen"]) for row in rows[:6]] == [(1, 0), *[(1, 6400)] * 4, (2, 0)], "seed by seed"
    assert len(rows) == 4 * 3 + 3, "with random weights"
    assert {method[2:] for method in world.trained} == {(6400, 3, 16)}
    assert len(world.run("settings")) == 15 and not world.trained, "finished runs are not repeated"


def test_some_settings_are_enough(world):
    some = ("--settings", "paper", "adamw 5e-4")
    world.run("settings", *some)
    assert len(world.trained) == 2 * 3
    with pytest.raises(SystemExit, match="not all settings have run"):
        world.run("methods")
    with pytest.raises(SystemExit, match="settings='adamw 5e-4'.* has no run of seed 1: give --stage methods"):
        world.run("test", *some)
    world.run("methods", *some, "--methods", "coss", "--other_settings")
    world.run("settings")
    rows = world.run("methods", *some, "--methods", "coss", "--num_images=640", "--other_settings")
    assert {row["settings"] for row in rows if row["num_images"] == 640} == {"sgd, warm-up, clipping"}, (
        "of all that ran"
    )


def test_long_runs_are_of_the_best_settings_and_the_defaults(world):
    world.run("settings")
    rows = world.run("methods")[15:]
    kinds = {(row["settings"], row["method"]) for row in rows}
    best = "sgd, warm-up, clipping"
    assert kinds == {(best, method) for method in world.module.METHODS} | {("adamw 5e-4", "coss"), ("paper", "coss")}
    assert len(rows) == 5 * 3 and {row["images_seen"] for row in rows} == {19_200}
    assert ("coss, no neighbours", 1, 19_200, 0, 64) in world.trained, "as many views a step"
    fewer = world.run("methods", "--num_images=640", "--methods", "coss")[30:]
    assert {row["method"] for row in fewer} == {"coss"} and len(fewer) == 3 * 3
    best_alone = world.run("methods", "--num_images=1280", "--methods", "coss", "--other_settings")[39:]
    assert [(row["settings"], row["seed"]) for row in best_alone] == [(best, 1), (best, 2), (best, 3)]


def test_test_images_are_read_once(world):
    world.run("settings")
    world.run("methods")
    world.run("warm")
    before = len(world.run("warm"))
    rows = world.run("test")[before:]
    assert {row["split"] for row in rows} == {"test"} and not world.trained
    assert sum(row["method"] == "teacher" for row in rows) == 1
    assert sum(row["method"] == "random weights" for row in rows) == 3
    long = [row for row in rows if row["num_images"] == 19_200]
    assert len(long) == 5 * 3 and {row["images_seen"] for row in long} == {19_200}
    warm = [row for row in rows if row["student"] == world.module.WARM]
    assert [row["method"] for row in warm] == ["initial weights", "coss", "coss", "coss"]
    assert len(world.run("test")) == before + len(rows)


def test_costs_are_measured_in_one_run(world, tmp_path):
    world.run("settings")
    world.run("costs")
    found = json.loads((tmp_path / "out" / "photographs_costs.json").read_text())
    assert found["networks"] == {"teacher": {"bytes": 1}, "mobilenetv3": {"bytes": 1}}
    assert found["rounds"] == 30 and found["hardware"] and "--stage=costs" in found["command"]
