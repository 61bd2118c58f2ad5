"""A loss that this file defines is a method like those of the package, and nothing else knows of it."""

import datasets
import numpy as np
import pytest
import torch
from torch import nn

import tests.helpers.runs as h
from coss_hf import DistillationTrainer
from coss_hf.losses.base import Citation, DistillationLoss
from coss_hf.losses.combination import SumLoss
from coss_hf.losses.coss import CoSSLoss
from coss_hf.trainer.pretraining import pretrain, pretraining_images
from coss_hf.trainer.training_args import DistillationArguments
from tests.helpers.loss_registry import losses_of_a_test


@pytest.fixture(autouse=True)
def toy():
    """The smallest loss that has everything: an option, weights, state, pre-training and a paper."""
    with losses_of_a_test():

        class ToyLoss(DistillationLoss):
            name = "toy"
            reads = "last_map"
            keeps_state = True
            citation = Citation(authors="Maker, T.", title="Toys", venue="Attic", year=2026, arxiv="2601.00001")

            def __init__(self, *, student_dim: int, teacher_dim: int, beta: float = 1.0, pretraining_steps: int = 0):
                super().__init__()
                self.beta = beta
                self.pretraining_steps = pretraining_steps
                self.translate = nn.Linear(student_dim, teacher_dim)
                self.average = nn.Linear(teacher_dim, teacher_dim).requires_grad_(False)
                self.register_buffer("seen", torch.zeros(teacher_dim))

            def pretraining_module(self):
                return self.average

            def pretraining_loss(self, teacher):
                t = teacher.maps[-1].mean((2, 3))
                return (self.average(t) - t).square().mean()

            def forward(self, student, teacher, index=None):
                s, t = (x.maps[0].float().mean((2, 3)) for x in (student, teacher))
                error = (self.translate(s) - self.average(t - self.seen)).square().mean()
                if self.training:
                    self.seen.lerp_(t.mean(0), 0.1)
                return {"loss": self.beta * error, "error": error}

        yield ToyLoss


def test_trains_and_resumes(tmp_path, image_parquet, networks):
    options = {"method": "toy(beta=2, pretraining_steps=2)", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    states = []
    for checkpoint in (None, str(tmp_path / "out" / "checkpoint-2")):
        trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.small, **options)
        start = h.state(trainer)
        trainer.train(resume_from_checkpoint=checkpoint)
        states.append(h.state(trainer))
    h.assert_same(*states)
    for name in ("translate.weight", "average.weight", "seen"):
        assert not torch.equal(start[f"criterion.{name}"], states[0][f"criterion.{name}"]), name
    assert pretraining_images(trainer) == 2 * 8
    assert trainer.model.head is None, "maps need no head"


@pytest.mark.parametrize("k", [0, 2])
def test_the_teacher_embeds_as_many_images_in_the_pretraining_as_are_counted(tmp_path, image_parquet, networks, k):
    """With neighbours it embedded fewer than a batch of the training has, and others were counted."""
    neighbors = (np.arange(48)[:, None] + np.arange(1, 6)) % 48
    options = {"method": "toy(pretraining_steps=3)", "neighbors_k": k, "neighbors_pool": 5, "neighbors": neighbors}
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.small, **options)
    pretrain(trainer)
    assert trainer.teacher_images == pretraining_images(trainer) == 3 * 8 * (1 + k)


def test_is_a_summand_with_logged_parts(tmp_path, image_parquet, networks):
    options = {"method": "coss + toy(beta=2)", "max_steps": 2, "logging_steps": 1, "head_hidden_size": 12}
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.small, **options)
    trainer.train()
    for line in trainer.state.log_history:
        if "loss" in line:
            assert line["toy"] == pytest.approx(2 * line["toy_error"], rel=1e-5)
            assert line["loss"] == pytest.approx(line["coss"] + line["toy"], rel=1e-5)


def test_is_cited_on_the_card(tmp_path, image_parquet, networks):
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.small, method="toy")
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "* [Toys](https://arxiv.org/abs/2601.00001)" in card
    assert "@inproceedings{toy2026,\n  title = {{Toys}},\n  author = {Maker, T.},\n  booktitle = {Attic}," in card


def test_a_card_without_papers(toy, tmp_path, image_parquet, networks):
    toy.citation = None
    h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.small, method="toy").create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Citation" not in card and "bibtex" not in card


def test_errors_name_it_as_any_method(tmp_path, image_parquet, networks):
    arguments = tmp_path, image_parquet, networks.teacher, networks.small
    with pytest.raises(ValueError, match="'nothing' is unknown: choose one of coss, at, .*, toy, vid"):
        h.make_trainer(*arguments, method="nothing")
    with pytest.raises(ValueError, match=r"toy has no option 'gamma'; it has beta, pretraining_steps"):
        h.make_trainer(*arguments, method="toy(gamma=1)")
    with pytest.raises(ValueError, match="--exact_accumulation works with --method coss, not toy"):
        h.make_trainer(*arguments, method="toy", exact_accumulation=True)


def test_an_instance_reads_what_its_class_declares(toy, tmp_path, image_parquet, networks):
    """Given as a module, a loss of the last map got all maps, and compared the first."""
    for network in ("small", "resnet"):
        width = 8 if network == "small" else 16
        loss = toy(student_dim=width, teacher_dim=16)
        options = {"max_steps": 1, "criterion": loss, "output_dir": str(tmp_path / network)}
        trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, getattr(networks, network), **options)
        trainer.train()
        assert loss.seen.abs().sum() > 0 and trainer.method == repr(loss)


def test_an_instance_is_checked_as_a_method_is(toy, tmp_path, image_parquet, networks):
    loss = toy(student_dim=16, teacher_dim=16)
    arguments = tmp_path, image_parquet, networks.teacher, networks.resnet
    with pytest.raises(ValueError, match="--exact_accumulation needs the sums .* --criterion=ToyLoss does not declare"):
        h.make_trainer(*arguments, criterion=loss, exact_accumulation=True)
    loss.separable = True  # without totals
    with pytest.raises(ValueError, match="--exact_accumulation needs the sums"):
        h.make_trainer(*arguments, criterion=loss, exact_accumulation=True)
    with pytest.raises(ValueError, match="--head=mlp: --criterion=ToyLoss compares feature maps"):
        h.make_trainer(*arguments, criterion=loss, head="mlp")
    args = DistillationArguments(str(tmp_path / "out"), max_steps=1, use_cpu=True)
    stream = datasets.load_dataset("parquet", data_dir=str(image_parquet), split="train", streaming=True)
    loss.pretraining_steps = 3
    with pytest.raises(ValueError, match="^criterion=ToyLoss learns from images in random order"):
        DistillationTrainer(networks.teacher, networks.resnet, args, stream, criterion=loss)
    loss.pretraining_steps = 0
    loss.needs_image_rows = True
    with pytest.raises(ValueError, match="^criterion=ToyLoss keeps a memory with a row for each training image"):
        DistillationTrainer(
            networks.teacher, networks.resnet, args, stream, criterion=SumLoss({"coss": CoSSLoss(), "toy": loss})
        )


def test_a_sum_as_a_module_reads_what_its_losses_declare(toy, tmp_path, image_parquet, networks):
    """It was no loss of the package, got no maps, and compared embeddings instead."""
    loss = toy(student_dim=16, teacher_dim=16)
    criterion = SumLoss({"coss": CoSSLoss(), "toy": loss})
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, criterion=criterion)
    trainer.train()
    assert loss.seen.abs().sum() > 0 and trainer.student.maps > 0


def test_a_loss_that_leaves_parts_out(tmp_path, image_parquet, networks):
    class Quiet(CoSSLoss):
        name = None

        def forward(self, student, teacher, index=None):
            return {"loss": super().forward(student, teacher, index)["loss"]}

    trainer = h.make_trainer(
        tmp_path, image_parquet, networks.teacher, networks.resnet, criterion=Quiet(), max_steps=1, logging_steps=1
    )
    trainer.train()
    (line,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert -1 <= line["cosine_sample"] <= 1


def test_parts_that_are_called_as_those_of_coss_are_no_cosines(tmp_path, image_parquet, networks):
    """Any two parts of these names were logged as the cosines to the teacher."""
    with losses_of_a_test():

        class Named(DistillationLoss):
            name = "named"
            same_dim = True

            def forward(self, student, teacher, index=None):
                error = (student.embedding - teacher.embedding).square().mean()
                return {"loss": error, "l_co": error * 0 + 7.0, "l_ss": error * 0 + 9.0}

        options = {"method": "named", "max_steps": 1, "logging_steps": 1}
        trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, **options)
        trainer.train()
    (line,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert (line["l_co"], line["l_ss"]) == (7.0, 9.0)
    assert -1 <= line["cosine_sample"] <= 1 and -1 <= line["cosine_dimension"] <= 1


class Plain(nn.Module):
    """A user's module that is no ``DistillationLoss``, with the two attributes that were always read."""

    uses_maps = True
    same_dim = True

    def __init__(self):
        super().__init__()
        self.maps = []

    def forward(self, student, teacher, index):
        self.maps.append((len(student.maps), len(teacher.maps)))
        assert student.embedding.shape == teacher.embedding.shape
        return {"loss": (student.embedding - teacher.embedding).square().mean()}


def test_a_plain_module_is_still_a_criterion(tmp_path, image_parquet, networks):
    criterion = Plain()
    options = {"max_steps": 1, "criterion": criterion}
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, **options)
    trainer.train()
    assert criterion.maps == [(3, 3)]
    assert trainer.student.model.config.teacher_space is not None
