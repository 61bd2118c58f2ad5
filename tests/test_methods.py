"""Every method through the trainer, alone and summed, and the maps that some of them read."""

import pytest
import torch

import tests.helpers as h
from coss_hf.backbones import Backbone
from coss_hf.losses import LOSSES
from coss_hf.losses.combination import Method, parse_methods
from tests.networks import NETWORKS, half


@pytest.mark.parametrize(
    ("text", "methods"),
    [
        ("coss", [Method("coss", {})]),
        ("coss+rkd", [Method("coss", {}), Method("rkd", {})]),
        (" rkd + coss( lambda_co=0,beta=2.5e+1 )", [Method("rkd", {}), Method("coss", {"lambda_co": 0, "beta": 25.0})]),
    ],
)
def test_a_sum_of_methods_is_read(text, methods):
    assert parse_methods(text) == methods
    assert parse_methods(" + ".join(map(str, methods))) == methods


@pytest.mark.parametrize("text", ["", "coss+", "coss(1)", "coss(beta=1", "coss rkd)", "coss+coss"])
def test_a_sum_that_cannot_be_read(text):
    with pytest.raises(ValueError, match="^--method="):
        parse_methods(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "coss+nothing"}, "--method='nothing' is unknown: choose one of coss, at"),
        ({"method": "coss+rkd", "beta": 2.0}, r"--beta=2.0 of which\? Write --method"),
        ({"method": "rkd(beta=2, angel_weight=1)"}, "rkd has no option 'angel_weight'; it has beta, distance_weight"),
        ({"method": "coss(beta=much)"}, r"--method=coss\(.*beta=much\)"),
        ({"method": "at", "head": "mlp"}, "--head=mlp: at compares feature maps"),
        ({"method": "coss+rkd", "exact_accumulation": True}, "--exact_accumulation works with --method coss, not"),
    ],
)
def test_bad_methods_are_refused(tmp_path, image_parquet, networks, options, message):
    with pytest.raises(ValueError, match=message):
        h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, **options)


# The small student has another dimension than the teacher, the ViT tokens and other sizes of map.
@pytest.mark.parametrize("student", ["small", "vit"])
@pytest.mark.parametrize("method", [*LOSSES, "at(beta=10) + coss + rkd"])
def test_every_method_trains_a_student(tmp_path, image_parquet, networks, method, student):
    options = {"max_steps": 2, "logging_steps": 1, "head_hidden_size": 12, "learning_rate": 1e-5}
    trainer = h.make_trainer(
        tmp_path, image_parquet, networks.teacher, getattr(networks, student), method=method, **options
    )
    before = h.state(trainer)
    before = {name: value.clone() for name, value in before.items()}
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 2 and all(torch.tensor(losses).isfinite())
    moved = [name for name, value in h.state(trainer).items() if not torch.equal(value, before[name])]
    assert any("weight" in name for name in moved)


def test_a_sum_is_the_sum_and_logs_its_parts(tmp_path, image_parquet, networks):
    options = {"max_steps": 1, "logging_steps": 1}
    logs = []
    for method in ("coss(beta=2)", "rkd", "coss(beta=2) + rkd"):
        trainer = h.make_trainer(
            tmp_path / str(len(logs)), image_parquet, networks.teacher, networks.resnet, method=method, **options
        )
        trainer.train()
        logs.append(trainer.state.log_history[0])
    assert logs[2]["loss"] == pytest.approx(logs[0]["loss"] + logs[1]["loss"], rel=1e-5)
    assert logs[2]["rkd"] == pytest.approx(logs[1]["loss"], rel=1e-5)
    assert logs[2]["coss_l_ss"] == pytest.approx(logs[0]["l_ss"], rel=1e-5)


# timm's transformers take images of one size alone, its classifiers no AutoModel.
@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in ("timm_resnet", "timm_vit", "timm_swin")])
def test_every_network_gives_maps(name):
    backbone = Backbone(NETWORKS[name].model(), (NETWORKS[name].processor or half)())
    maps = backbone.example(maps=True).maps
    assert len(maps) >= 2 and all(m.dim() == 4 and len(m) == 2 for m in maps)
    heights = [m.shape[2] for m in maps]
    assert heights == sorted(heights, reverse=True) and all(m.shape[2] == m.shape[3] for m in maps)
    assert len(set(heights)) in (1, len(heights)), "a map a stage, or a map a layer"
    backbone.maps = 2
    pixels = torch.randn(3, 3, *backbone.size)
    with torch.no_grad():
        backbone.model.eval()
        features = backbone.features(pixels)
        backbone.maps = 0
        assert torch.equal(features.embedding, backbone.features(pixels).embedding)
    assert len(features.maps) == 2 and features.maps[-1].shape[1:] == maps[-1].shape[1:]


def test_what_a_loss_learns_is_trained_and_resumed(tmp_path, image_parquet, networks):
    options = {"method": "vid", "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    runs = []
    for checkpoint in (None, str(tmp_path / "out" / "checkpoint-2")):
        trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.small, **options)
        start = trainer.model.criterion.log_scale.detach().clone()
        trainer.train(resume_from_checkpoint=checkpoint)
        assert not torch.equal(start, trainer.model.criterion.log_scale)
        runs.append({name: value.clone() for name, value in h.state(trainer).items()})
    h.assert_same(*runs)
