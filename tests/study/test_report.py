"""Costs, the verdict in words, and the baselines of a report."""

import pytest
import torch

import tests.helpers.runs as h
from coss_hf.models.loading import load_backbone
from coss_hf.reporting.plots import quality_plot
from coss_hf.study.baselines import trained_trials, untrained_trials
from coss_hf.study.costs import costs
from coss_hf.study.verdict import verdict
from coss_hf.trainer.arguments import ModelArguments
from coss_hf.trainer.training_args import DistillationArguments
from tests.helpers.networks import save

TIMES = {f"batch_{n}": {"ms": 10.0 * n, "images_per_second": 1} for n in (1, 64)}
COSTS = {"teacher": {"parameters": 400, "macs": 1000, "bytes": 50} | TIMES}
COSTS["student"] = {"parameters": 100, "macs": 300, "bytes": 25} | TIMES


def rows(**groups) -> list[dict]:
    return [
        {"method": name.replace("_", " "), "seed": seed, "linear": value}
        for name, values in groups.items()
        for seed, value in enumerate(values, start=1)
    ]


def test_it_helped():
    group = {"random": [0.3, 0.3, 0.31], "coss": [0.7, 0.7, 0.71], "teacher": [0.8]}
    plain = [row | {"method": "coss, no neighbours", "linear": row["linear"] - 0.1} for row in rows(**group)[3:6]]
    said = verdict(rows(**group) + plain, "linear", COSTS)
    assert said[0].startswith(
        "It helped: by linear evaluation the distilled student has 70.3 %, 40.0 ± 0.0 points above"
    )
    assert said[0].endswith("above random weights, and 9.7 below the teacher, 81 % of the way to it.")
    assert said[1] == "Neighbours add 10.0 ± 0.0 points, more than the noise of these seeds."
    assert said[2].startswith("Of the teacher's, the student has 0.25 of the parameters, 0.30 of the multiply-adds")


@pytest.mark.parametrize("coss", [[0.3, 0.5, 0.4], [0.2, 0.2, 0.2]])
def test_it_did_not_help(coss):
    said = verdict(rows(random=[0.35, 0.3, 0.4], coss=coss, teacher=[0.8]), "linear", COSTS)
    assert said[0].startswith("It did not help: by linear evaluation") and "random weights have 35.0 %" in said[0]


def test_pretrained_student_is_compared_with_its_own_weights():
    group = {"random": [0.1, 0.1, 0.1], "initial": [0.6], "coss": [0.59, 0.6, 0.61], "teacher": [0.8]}
    said = verdict(rows(**group), "linear", COSTS)
    assert said[0].startswith("It did not help") and "the student's own weights have 60.0 %" in said[0]
    group["coss"] = [0.79, 0.8, 0.84]
    assert "the teacher." in verdict(rows(**group), "linear", COSTS)[0]


def test_a_part_inside_the_noise():
    group = rows(random=[0.1, 0.1, 0.1], coss=[0.5, 0.6, 0.7], teacher=[0.8])
    group += rows(c=[0.52, 0.57, 0.72])[:3]
    said = verdict(
        [row | {"method": row["method"].replace("c", "coss, cosine only", row["method"] == "c")} for row in group],
        "linear",
        COSTS,
    )
    assert said[1].startswith("Space similarity takes 0.3") and said[1].endswith("inside the noise of these seeds.")


def test_too_few_runs_left_for_a_verdict():
    """Single runs have no interval, and runs without a common seed no paired difference."""
    group = rows(random=[0.3, 0.3, 0.31], coss=[0.7], teacher=[0.8])
    cosine = [{"method": "coss, cosine only", "seed": seed, "linear": 0.6} for seed in (2, 3)]
    said = verdict(group + cosine, "linear", COSTS)
    assert said[0].startswith("It is not known whether it helped: too few runs came to an end") and "70.0 %" in said[0]
    assert said[1].startswith("It is not known what space similarity adds: too few") and "inf" not in " ".join(said)


def test_one_run_of_a_baseline_is_not_one_without_noise():
    group = rows(random=[0.3, 0.3, 0.31], coss=[0.7, 0.7, 0.71], teacher=[0.8])
    said = verdict(group + [{"method": "coss, cosine only", "seed": 2, "linear": 0.6}], "linear", COSTS)
    assert said[1].startswith("It is not known what space similarity adds: too few")


def test_every_run_failed():
    failed = [{"method": "coss", "seed": 1, "failed": "The loss is nan at step 3"}]
    said = verdict(failed + rows(random=[0.1], teacher=[0.8]), "linear", COSTS)
    assert said == ["It did not help: every run of CoSS failed (The loss is nan at step 3)."]
    said = verdict([{"method": "coss", "seed": 1}, *rows(random=[0.1], teacher=[0.8])], "linear", COSTS)
    assert said == ["Whether it helped is not known: no run of CoSS has a value of linear."]


def test_baselines_see_equal_images_per_step():
    training = DistillationArguments(
        use_cpu=True, neighbors_k=3, neighbors_pool=5, per_device_train_batch_size=8, num_images=64
    )
    trials = trained_trials("pair", training, 2, "test", ["rkd", "coss"])
    assert [trial.method for trial in trials[::2]] == ["coss, cosine only", "coss", "coss, no neighbours", "rkd"]
    assert {(trial.anchors or 8) * (1 + trial.neighbors_k) for trial in trials} == {32}
    assert {trial.seed for trial in trials} == {1, 2} and {trial.num_images for trial in trials} == {64}
    names = [trial.method for trial in untrained_trials("pair", ModelArguments(student="x"), 2, "test")]
    assert names == ["random", "random", "initial", "teacher"]
    random = ModelArguments(student="x", student_init="random")
    assert "initial" not in [trial.method for trial in untrained_trials("pair", random, 2, "test")]


def test_costs_equal_calculation_by_hand(tmp_path):
    """Multiply-adds of a ViT layer by layer, and of a residual network against its own layers."""
    vit = load_backbone(h.save_vit(tmp_path / "vit"))
    resnet = load_backbone(h.save_resnet(tmp_path / "resnet"))
    found = costs({"vit": vit, "resnet": resnet}, torch.device("cpu"), rounds=1)
    tokens, width, patch = 5, 16, 8 * 8 * 3
    layer = 4 * tokens * width * width + 2 * tokens * width * 32 + 2 * tokens * tokens * width
    pooler = width * width  # of AutoModel, run at each forward pass
    assert found["vit"]["macs"] == 4 * patch * width + 2 * layer + pooler
    expected = 0

    def count(module, inputs, output):
        nonlocal expected
        expected += output[0].numel() * module.weight[0].numel()

    hooks = [m.register_forward_hook(count) for m in resnet.model.modules() if isinstance(m, torch.nn.Conv2d)]
    resnet.features(torch.zeros(1, 3, 16, 16))
    assert hooks and found["resnet"]["macs"] == expected
    for name, network in (("vit", vit), ("resnet", resnet)):
        assert found[name]["parameters"] == network.num_parameters()
        assert 0 < found[name]["bytes"] - 4 * network.num_parameters() < 20_000
        assert found[name]["batch_1"]["ms"] > 0 and found[name]["batch_64"]["images_per_second"] > 0


def test_costs_of_a_tower_with_its_projection(tmp_path):
    save("clip_two_towers", tmp_path)
    tower = load_backbone(str(tmp_path), space="projected")
    found = costs({"teacher": tower}, torch.device("cpu"), rounds=1)["teacher"]
    assert found["bytes"] == 4 * found["parameters"] > 0


def test_quality_against_latency(tmp_path):
    points = {"teacher": (8.0, [0.8]), "coss": (3.0, [0.7, 0.72]), "random": (3.0, [0.3, 0.31])}
    quality_plot(tmp_path / "q.png", points, "linear", "a → b")
    assert (tmp_path / "q.png").read_bytes().startswith(b"\x89PNG")
