"""Optimizers and schedules that are given to the trainer as objects."""

import logging

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR
from transformers import AutoModel, TrainerCallback

from coss_hf import DistillationTrainer
from tests.trainer.test_front_door import arguments, images  # noqa: F401


def changed(module, before) -> set[str]:
    return {name for name, value in module.named_parameters() if not value.equal(before[name])}


@pytest.mark.parametrize(("student", "method", "built"), [("small", "coss", "head"), ("resnet", "vid", "criterion")])
def test_what_the_trainer_builds_is_trained_too(tmp_path, images, networks, caplog, student, method, built):  # noqa: F811
    """Only what the user could make the optimizer of was trained; the head stayed as it was drawn."""
    network = AutoModel.from_pretrained(getattr(networks, student))
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
    for attempt in range(2):  # a cell that is run again
        caplog.clear()
        with caplog.at_level(logging.INFO):
            args = arguments(tmp_path, f"{attempt}", method=method, save_strategy="steps", save_steps=2)
            trainer = DistillationTrainer(
                networks.teacher, network, args, images.select(range(32)), optimizers=(optimizer, None)
            )
        before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        trainer.train()
        learned = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
        assert changed(trainer.model, before) == learned and any(name.startswith(built) for name in learned)
        assert len(optimizer.param_groups) == 2 and f"trains {built}." in caplog.text


def test_a_resumed_run_has_the_same_groups(tmp_path, images, networks):  # noqa: F811
    def make(**options):
        network = AutoModel.from_pretrained(networks.small)
        args = arguments(tmp_path, save_strategy="steps", save_steps=2, lr_scheduler_type="constant", **options)
        optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
        return DistillationTrainer(networks.teacher, network, args, images, optimizers=(optimizer, None))

    def moments(trainer) -> list[torch.Tensor]:
        optimizer = trainer.optimizer.optimizer
        return [optimizer.state[parameter]["exp_avg"] for parameter in optimizer.param_groups[1]["params"]]

    first = make(max_steps=2)
    first.train()
    resumed = make(max_steps=4)
    loaded = []

    class Keep(TrainerCallback):
        def on_train_begin(self, *_, **__):
            loaded.extend(one.clone() for one in moments(resumed))

    resumed.add_callback(Keep())
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4 and len(resumed.optimizer.param_groups) == 2
    assert loaded and all(one.equal(other) for one, other in zip(loaded, moments(first), strict=True))


def test_a_run_without_the_added_group_is_not_resumed(tmp_path, images, networks, monkeypatch):  # noqa: F811
    """The optimizer of an earlier version's run had none, and torch's error named no remedy."""

    def make(max_steps):
        network = AutoModel.from_pretrained(networks.small)
        args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=max_steps)
        optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
        return DistillationTrainer(networks.teacher, network, args, images, optimizers=(optimizer, None))

    with monkeypatch.context() as patch:
        patch.setattr("coss_hf.trainer.trainer.complete_optimizer", lambda *_: None)
        make(2).train()
    with pytest.raises(ValueError, match="^resume_from_checkpoint=.*the 2 of the optimizer that optimizers gives.*or"):
        make(4).train(resume_from_checkpoint=True)


def test_an_optimizer_that_cannot_be_completed_is_refused(tmp_path, images, networks):  # noqa: F811
    network = AutoModel.from_pretrained(networks.small)
    optimizer = torch.optim.SGD(network.parameters(), 1e-2)

    def make(optimizer, scheduler=None):
        DistillationTrainer(networks.teacher, network, arguments(tmp_path), images, optimizers=(optimizer, scheduler))

    with pytest.raises(ValueError, match=r"^optimizers: .*\(head\.0\.weight.*a schedule was given.*trainer\.optimizer"):
        make(optimizer, ConstantLR(optimizer))
    with pytest.raises(ValueError, match="^optimizers: the optimizer has none of the student's parameters"):
        make(torch.optim.SGD(AutoModel.from_pretrained(networks.small).parameters(), 1e-2))
    with pytest.raises(ValueError, match="^optimizers: LBFGS .* give another"):
        make(torch.optim.LBFGS(network.parameters()))
