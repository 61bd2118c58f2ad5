"""Every method through the trainer, alone and summed, and the maps that some of them read."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import ViTForImageClassification

import tests.helpers.runs as h
from coss_hf.losses.combination import Method, parse_methods
from coss_hf.losses.registry import LOSSES
from coss_hf.models.backbone import Backbone
from coss_hf.models.cifar.configuration_cifar_resnet import CifarResNetConfig
from coss_hf.models.cifar.modeling_cifar_resnet import CifarResNetForImageClassification
from coss_hf.models.classifier_head import find_classifier
from coss_hf.models.loading import load_backbone
from coss_hf.trainer.inputs import as_backbone
from coss_hf.trainer.pretraining import pretraining_images
from coss_hf.trainer.trainer import DistillationTrainer
from coss_hf.trainer.training_args import DistillationArguments
from tests.helpers.networks import NETWORKS, half


@pytest.mark.parametrize(
    ("text", "methods"),
    [
        ("coss", [Method("coss", {})]),
        ("coss+rkd", [Method("coss", {}), Method("rkd", {})]),
        ("coss(beta=1e-3)", [Method("coss", {"beta": 0.001})]),
        (" rkd + coss( lambda_co=0,beta=2.5e+1 )", [Method("rkd", {}), Method("coss", {"lambda_co": 0, "beta": 25.0})]),
    ],
)
def test_a_sum_of_methods_is_read(text, methods):
    assert parse_methods(text) == methods
    assert parse_methods(" + ".join(map(str, methods))) == methods


@pytest.mark.parametrize("text", ["", "coss+", "coss(1)", "coss(beta=1", "coss rkd)", "coss+coss"])
def test_invalid_sum_of_methods_is_rejected(text):
    with pytest.raises(ValueError, match="^--method="):
        parse_methods(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "coss+nothing"}, "--method='nothing' is unknown: choose one of coss, at"),
        ({"method": "coss+rkd", "beta": 2.0}, r"--beta=2.0 of which\? Write --method"),
        ({"method": "rkd(beta=2, angel_weight=1)"}, "rkd has no option 'angel_weight'; it has beta, distance_weight"),
        ({"method": "coss(beta=much)"}, r"--method=coss\(.*beta=much\)"),
        ({"method": "at", "head": "mlp"}, "--head=mlp: --method=at compares feature maps"),
        ({"method": "kd"}, "--method kd: --teacher .* no linear classifier"),
        ({"method": "seed(queue_size=12)"}, "queue_size=12 must be a multiple of the batch of 8 images and at most 48"),
        ({"method": "seed(queue_size=56)"}, "queue_size=56 must be .* at most 48"),
        ({"method": "crd(negatives=48)"}, "negatives=48 must lie between 1 and the 47 others"),
        ({"method": "crd(negatives=2.5)"}, r"--method=crd\(negatives=2.5.*\): negatives=2.5 must be a whole number"),
        ({"method": "crd(negatives=1e400)"}, "negatives=inf must be a whole number"),
        ({"method": "seed(queue_size=true)"}, "queue_size=True must be a whole number"),
        ({"method": "factor(pretraining_steps=0.5)"}, "pretraining_steps=0.5 must be a whole number"),
        ({"method": "coss + rkd(beta=-1)"}, r"--method=rkd\(beta=-1\): beta=-1 must be"),
        ({"method": "vid(student_dim=3)"}, "vid has no option 'student_dim'"),
        ({"method": "coss+rkd", "exact_accumulation": True}, "--exact_accumulation works with --method coss, not"),
    ],
)
def test_bad_methods_are_refused(tmp_path, image_parquet, networks, options, message):
    with pytest.raises(ValueError, match=message):
        h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, **options)


def test_counts_may_be_written_as_powers_of_ten(tmp_path, image_parquet, networks):
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, method="crd(negatives=1e1)")
    assert trainer.model.criterion.negatives == 10


def classifying(folder) -> str:
    """A checkpoint with a classifier, as a supervised teacher."""
    config = CifarResNetConfig(depth=8, stem_width=4, hidden_sizes=[4, 8, 16], image_size=16, num_labels=5)
    CifarResNetForImageClassification(config).save_pretrained(folder / "classifying")
    h.processor().save_pretrained(folder / "classifying")
    return str(folder / "classifying")


def test_the_classifier_of_a_teacher_is_found_where_it_reads_the_embedding(tmp_path, networks):
    folder = classifying(tmp_path)
    backbone = load_backbone(folder)
    layer = find_classifier(backbone)
    whole = CifarResNetForImageClassification.from_pretrained(folder).eval()
    assert torch.equal(layer.weight, whole.classifier.weight) and torch.equal(layer.bias, whole.classifier.bias)
    vit = load_backbone(networks.vit)
    assert vit.pooling == "cls" and find_classifier(vit).out_features == 4
    stretched = load_backbone(networks.vit, size=24, interpolate_pos_encoding=True)
    assert torch.equal(find_classifier(stretched).weight, find_classifier(vit).weight)
    assert torch.equal(find_classifier(load_backbone(folder, dtype="bfloat16")).weight, layer.weight.bfloat16().float())
    assert find_classifier(load_backbone(networks.vit, pooling="mean")) is None, "another embedding than it reads"
    assert find_classifier(load_backbone(networks.teacher)) is None, "a checkpoint without a classifier"


def test_a_network_in_memory_has_the_classifier_that_it_carries(networks):
    """That of the files was taken, silently, after the classifier was trained further or made for other classes."""
    torch.manual_seed(0)
    options = {"num_labels": 7, "ignore_mismatched_sizes": True}
    network = ViTForImageClassification.from_pretrained(networks.vit, **options)
    assert torch.equal(find_classifier(as_backbone(network, "teacher")).weight, network.classifier.weight)
    retrained = ViTForImageClassification.from_pretrained(networks.vit)
    nn.init.normal_(retrained.classifier.weight)
    assert torch.equal(find_classifier(as_backbone(retrained, "teacher")).weight, retrained.classifier.weight)
    moved = as_backbone(retrained, "teacher")
    moved.model.to(torch.bfloat16).train()
    retrained.vit.embeddings.dropout.p = 0.9
    weight = retrained.classifier.weight.bfloat16().float()
    assert torch.equal(find_classifier(moved).weight, weight), "dropout of a network in training mode"
    assert retrained.classifier.weight.dtype == torch.float32, "the user's network stays as it is"
    assert moved.model.training
    retrained.vit.float()
    retrained.classifier = nn.Sequential(nn.ReLU(), nn.Linear(16, 4))
    for unlike in (retrained, network.vit):  # of other features; alone
        assert find_classifier(as_backbone(unlike, "teacher")) is None


def test_a_run_is_not_resumed_with_another_classifier(tmp_path, image_parquet, networks):
    options = {"method": "kd", "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    args = DistillationArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=8, **options)
    network = ViTForImageClassification.from_pretrained(networks.vit)
    images = str(image_parquet)
    DistillationTrainer(network, networks.small, args, images).train()
    nn.init.normal_(network.classifier.weight)
    again = DistillationTrainer(network, networks.small, args, images)
    with pytest.raises(ValueError, match="was written with another --teacher's classifier"):
        again.find_checkpoint(True)


def test_srrl_takes_a_classifier_only_of_its_own_features(tmp_path, image_parquet, networks):
    for teacher, expected in ((classifying(tmp_path), True), (networks.vit, False), (networks.teacher, False)):
        trainer = h.make_trainer(tmp_path, image_parquet, teacher, networks.small, method="srrl")
        assert (trainer.model.criterion.teacher_fc is not None) == expected


METHODS = [*LOSSES, "at(beta=10) + coss + rkd", "seed + coss(lambda_co=0)"]
METHODS[METHODS.index("factor")] = "factor(pretraining_steps=3)"  # of 500 by default


# The small student has another dimension than the teacher, the ViT tokens and other sizes of map. With neighbours.
@pytest.mark.parametrize("student", ["small", "vit"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_a_student(tmp_path, image_parquet, networks, method, student):
    options = {"max_steps": 2, "logging_steps": 1, "head_hidden_size": 12, "learning_rate": 1e-5, "bf16": True}
    options |= {"per_device_train_batch_size": 4, "neighbors_k": 1, "neighbors_pool": 2}
    options["neighbors"] = torch.stack([torch.arange(48).roll(-1), torch.arange(48).roll(-2)], 1).numpy()
    needs = [LOSSES[one.name].classifier for one in parse_methods(method)]
    teacher = networks.teacher if set(needs) == {"unused"} else classifying(tmp_path)
    trainer = h.make_trainer(tmp_path, image_parquet, teacher, getattr(networks, student), method=method, **options)
    before = h.state(trainer)
    before = {name: value.clone() for name, value in before.items()}
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 2 and all(torch.tensor(losses).isfinite())
    moved = [name for name, value in h.state(trainer).items() if not torch.equal(value, before[name])]
    assert any("weight" in name for name in moved)


@pytest.mark.parametrize("method", ["at", "nst", "coss + at", "vid", "sp", "hint"])
def test_a_network_without_maps(tmp_path, image_parquet, networks, monkeypatch, method):
    monkeypatch.setattr("coss_hf.models.backbone.feature_maps", lambda *args: ())
    arguments = tmp_path, image_parquet, networks.teacher, networks.vit
    if "at" in method or method == "nst":
        with pytest.raises(ValueError, match="--method (at|nst) compares feature maps, and .* gives none"):
            h.make_trainer(*arguments, method=method)
    else:
        h.make_trainer(*arguments, method=method, max_steps=1).train()


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


QUEUE = "seed(queue_size=24)"  # goes round after three steps


# What they learn, and the state of: a paraphraser, two memories and their constants, a queue, running statistics.
@pytest.mark.parametrize("method", ["vid", "factor(pretraining_steps=3)", "crd", QUEUE, "bn + srrl"])
def test_what_a_loss_learns_and_remembers_is_resumed(tmp_path, image_parquet, networks, method):
    options = {"method": method, "head_hidden_size": 12, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    runs = []
    for checkpoint in (None, str(tmp_path / "out" / "checkpoint-2")):
        trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.small, **options)
        start = {name: value.clone() for name, value in trainer.model.criterion.state_dict().items()}
        trainer.train(resume_from_checkpoint=checkpoint)
        runs.append({name: value.clone() for name, value in h.state(trainer).items()})
        assert not any(torch.equal(value, runs[-1][f"criterion.{name}"]) for name, value in start.items())
    h.assert_same(*runs)


def test_a_loss_whose_value_changed_is_not_resumed(tmp_path, image_parquet, networks, monkeypatch):
    """A run of the former ``vid`` ended in an error about missing keys."""
    options = {"method": "crd", "head_hidden_size": 12, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.small, **options).train()
    monkeypatch.setattr(LOSSES["crd"], "revision", 2)
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.small, **(options | {"max_steps": 2}))
    with pytest.raises(ValueError, match="another .*method .then crd, now crd, revision 2 of crd."):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))


def test_data_parallel_leaves_memories_to_their_loss(tmp_path, image_parquet, networks):
    """It would overwrite those of all processes with the first one's at every forward pass."""
    options = {"method": "crd + seed + bn", "head_hidden_size": 12}
    model = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.small, **options).model
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/port", rank=0, world_size=1)
    try:
        ignored = DistributedDataParallel(model).parameters_to_ignore
    finally:
        dist.destroy_process_group()
    names = {f"criterion.{name}" for name, _ in model.criterion.named_buffers()}
    assert {name.rsplit(".")[-1] for name in names} >= {"memory_s", "memory_t", "log_Z", "queue", "ptr", "running_mean"}
    assert names == set(ignored)


def test_paraphraser_is_trained_first_and_then_frozen(tmp_path, image_parquet, networks):
    method = "factor(pretraining_steps=40)"
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.small, method=method, max_steps=1)
    criterion, views = trainer.model.criterion, h.Recorder(trainer)
    trainer.train()
    after = {name: value.clone() for name, value in criterion.paraphraser.state_dict().items()}
    features = trainer.embed_teacher(views.batches[0]["pixel_values"])
    assert pretraining_images(trainer) == 40 * 8 and not any(
        p.requires_grad for p in criterion.paraphraser.parameters()
    )
    fresh = h.make_trainer(tmp_path / "2", image_parquet, networks.teacher, networks.small, method=method, max_steps=3)
    assert criterion.reconstruction(features) < 0.8 * fresh.model.criterion.reconstruction(features)
    fresh.train()
    h.assert_same(after, fresh.model.criterion.paraphraser.state_dict())
