"""Exact accumulation: n micro-batches are one batch of n times the size."""

import pytest
import torch
from torch import nn

import tests.helpers.runs as h
from coss_hf.features import Features
from coss_hf.losses.base import DistillationLoss
from coss_hf.losses.registry import LOSSES
from coss_hf.trainer.gradient_accumulation import attach_other_totals, scale_gradient


class Linear(nn.Module):
    """A DistillationModel with nothing in it but a matrix."""

    def __init__(self, weight, criterion):
        super().__init__()
        self.weight, self.criterion = nn.Parameter(weight), criterion
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, pixel_values, teacher, index, other_totals=None, only_totals=False):
        self.calls += 1
        student = Features(pixel_values @ self.weight)
        if only_totals:
            return {"totals": self.criterion.totals(student, teacher)}
        return self.criterion(student, teacher, index, other_totals=other_totals)


@pytest.mark.parametrize("sizes", [[3, 3, 3], [1, 5, 2]])
def test_micro_batches_equal_one_batch(sizes):
    g = torch.Generator().manual_seed(0)
    x, t = (torch.randn(sum(sizes), d, generator=g, dtype=torch.float64) for d in (7, 5))
    weight = torch.randn(7, 5, generator=g, dtype=torch.float64)
    whole = Linear(weight.clone(), LOSSES["coss"](beta=3.0, lambda_ss=0.7))
    expected = whole(x, Features(t), None)
    expected["loss"].backward()

    model = Linear(weight.clone(), whole.criterion)
    rows = torch.arange(len(x)).split(sizes)
    batches = [{"pixel_values": x[r], "index": r} for r in rows]
    teacher = {r[0].item(): Features(t[r]) for r in rows}
    lookup = iter(teacher.values())
    attach_other_totals(model, batches, lambda views: next(lookup), lambda totals: totals)
    assert model.calls == 0, "buffers are left as they were"
    for batch in batches:
        output = model(
            batch["pixel_values"], Features(**batch["teacher"]), batch["index"], other_totals=batch["other_totals"]
        )
        torch.testing.assert_close(output["loss"], expected["loss"], rtol=1e-12, atol=0)
        torch.testing.assert_close(output["l_co"], expected["l_co"], rtol=1e-12, atol=0)
        # Trainer divides by the number of micro-batches.
        (scale_gradient(output["loss"], len(batches)) / len(batches)).backward()
    scale = whole.weight.grad.abs().max().item()
    torch.testing.assert_close(model.weight.grad, whole.weight.grad, rtol=0, atol=1e-10 * scale)


def trainer_of(tmp_path, images, networks, micro_batches: int, exact: bool, student=None, **args):
    torch.manual_seed(0)  # of the pooler that the checkpoint lacks
    trainer = h.make_trainer(
        tmp_path / f"{micro_batches}-{exact}",
        images,
        networks.teacher,
        student or networks.vit,
        gradient_accumulation_steps=micro_batches,
        per_device_train_batch_size=24 // micro_batches,
        exact_accumulation=exact,
        **{"max_steps": 3, "logging_steps": 1} | args,
    )
    trainer.model.double()
    trainer.teacher.model.double()
    return trainer


def test_the_trainer_takes_the_same_steps(tmp_path, image_parquet, networks):
    """48 images, 24 a step; the student without batch norm, which sees a micro-batch at a time."""
    states, losses = {}, {}
    for micro_batches, exact in ((1, False), (4, True), (4, False)):
        trainer = trainer_of(tmp_path, image_parquet, networks, micro_batches, exact)
        before = h.state(trainer)
        trainer.train()
        states[micro_batches, exact] = h.state(trainer)
        losses[micro_batches, exact] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    whole = states[1, False]
    largest = max((whole[name] - before[name]).abs().max().item() for name in whole)
    for name, tensor in whole.items():
        torch.testing.assert_close(states[4, True][name], tensor, rtol=0, atol=1e-10 * largest, msg=name)
    assert losses[4, True] == pytest.approx(losses[1, False], rel=1e-6)
    assert any((states[4, False][name] - whole[name]).abs().max() > 1e-3 * largest for name in whole), "not the mean"


def as_totals(student, teacher) -> torch.Tensor:
    """Sum and number of squared distances between the last of the maps that a loss was given."""
    distances = student.maps[-1].mean((1, 2, 3)) - teacher.maps[-1].mean((1, 2, 3))
    return torch.stack([distances.square().sum(), distances.new_tensor(len(distances))])


class OfAnyModule(nn.Module):
    separable = True
    uses_maps = True
    same_dim = False

    def totals(self, student, teacher):
        return as_totals(student, teacher)

    def forward(self, student, teacher, index=None, other_totals=None):
        totals = self.totals(student, teacher)
        total, count = totals if other_totals is None else totals + other_totals
        return {"loss": (1e-3 + total / count).sqrt()}


class OfOneMap(DistillationLoss):
    reads = "middle_map"
    separable = True
    totals = OfAnyModule.totals
    forward = OfAnyModule.forward


@pytest.mark.parametrize("loss", [OfAnyModule, OfOneMap])
def test_a_separable_loss_of_maps_takes_the_same_steps(tmp_path, image_parquet, networks, loss):
    """Passes with gradient were given the teacher's embedding alone."""
    states = {}
    for micro_batches in (1, 4):
        exact = micro_batches > 1
        trainer = trainer_of(tmp_path, image_parquet, networks, micro_batches, exact, criterion=loss())
        before = h.state(trainer)
        trainer.train()
        states[exact] = h.state(trainer)
    largest = max((states[False][name] - before[name]).abs().max().item() for name in before)
    assert largest > 0
    for name, tensor in states[False].items():
        torch.testing.assert_close(states[True][name], tensor, rtol=0, atol=1e-9 * largest, msg=name)


def test_only_what_a_loss_reads_is_kept(tmp_path, image_parquet, networks):
    trainer = trainer_of(tmp_path, image_parquet, networks, 4, True, max_steps=1)
    trainer.teacher.maps = 2
    kept, real = [], trainer.compute_loss

    def count(model, inputs, **kwargs):
        kept.append(inputs["teacher"]["maps"])
        return real(model, inputs, **kwargs)

    trainer.compute_loss = count
    trainer.train()
    assert kept == [()] * 4


def test_the_last_step_of_an_epoch_may_be_short(tmp_path, image_parquet, networks):
    """6 micro-batches of 8 in an epoch of 48 images: steps of 4 and of 2."""
    trainer = h.make_trainer(
        tmp_path,
        image_parquet,
        networks.teacher,
        networks.vit,
        gradient_accumulation_steps=4,
        exact_accumulation=True,
        per_device_train_batch_size=8,
        max_steps=2,
    )
    counted, real = [], trainer.compute_loss

    def count(model, inputs, **kwargs):
        assert inputs["other_totals"][1] == 8 * (trainer.current_gradient_accumulation_steps - 1)
        counted.append(trainer.state.global_step)
        return real(model, inputs, **kwargs)

    trainer.compute_loss = count
    trainer.train()
    assert counted == [0] * 4 + [1] * 2


def test_batch_norm_counts_an_image_once(tmp_path, image_parquet, networks):
    statistics = {}
    for exact in (False, True):
        trainer = trainer_of(tmp_path, image_parquet, networks, 4, exact, networks.resnet, learning_rate=0.0)
        trainer.train()
        statistics[exact] = {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}
    assert statistics[True] and statistics[True].keys() == statistics[False].keys()
    for name, buffer in statistics[False].items():
        torch.testing.assert_close(statistics[True][name], buffer, msg=name)


def test_dropout_is_refused(tmp_path, image_parquet, networks):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig.from_pretrained(networks.vit)
    config.hidden_dropout_prob = 0.1
    ViTModel(config).save_pretrained(tmp_path / "dropping")
    h.processor().save_pretrained(tmp_path / "dropping")
    arguments = (tmp_path, image_parquet, networks.teacher, str(tmp_path / "dropping"))
    with pytest.raises(ValueError, match="--student_config_overrides hidden_dropout_prob=0"):
        h.make_trainer(*arguments, exact_accumulation=True)
    h.make_trainer(*arguments, exact_accumulation=False)
