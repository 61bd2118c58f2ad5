"""Students that come in frozen: by the user, who means it, or by coss_hf, as copies of a teacher or loaded."""

import copy

import pytest
import torch
from transformers import AutoModel

from coss_hf import DistillationTrainer, Student
from coss_hf.models.backbone import unfreeze
from coss_hf.models.loading import load_backbone
from coss_hf.trainer.distillation_model import DistillationModel
from tests.trainer.test_front_door import arguments, images, trained  # noqa: F401


def build(student, head=None) -> set[str]:
    """Names of what is trained."""
    model = DistillationModel(student, torch.nn.Identity(), head)
    return {name for name, value in model.named_parameters() if value.requires_grad}


def test_what_the_user_froze_as_a_whole_stays_so(networks):
    student = load_backbone(networks.resnet)
    student.model.requires_grad_(False)
    with pytest.raises(ValueError, match="^--student=.*: all its parameters are frozen.*--head linear"):
        build(student)
    assert build(student, torch.nn.Linear(16, 16)) == {"head.weight", "head.bias"}


def test_copies_of_a_teacher_are_trained(networks):
    teacher = load_backbone(networks.vit)
    teacher.model.embeddings.requires_grad_(False)
    before = build(copy.deepcopy(teacher))
    assert before and not any(name.startswith("network.embeddings") for name in before)
    teacher.freeze().freeze()
    copied = copy.deepcopy(teacher)
    assert build(copied) == before and not any(value.requires_grad for value in teacher.model.parameters())
    copied.model.requires_grad_(False)  # by the user, after it was trained
    unfreeze(copied.model)
    assert not any(value.requires_grad for value in copied.model.parameters())


def test_a_copy_that_was_trained_in_part_may_be_frozen_as_a_whole(networks):
    """It was trained as a whole then: the mark of the teacher's freezing had stayed."""
    copied = copy.deepcopy(load_backbone(networks.resnet).freeze())
    next(copied.model.parameters()).requires_grad_(True)
    assert len(build(copied)) == 1
    copied.model.requires_grad_(False)
    assert build(copied, torch.nn.Linear(16, 16)) == {"head.weight", "head.bias"}


def test_layers_of_a_copy_may_be_changed(networks):
    """An AttributeError named neither the student nor what to do."""
    copied = copy.deepcopy(load_backbone(networks.vit).freeze())
    layers = [module for module in copied.model.modules() if isinstance(module, torch.nn.Linear)]
    layers[0].bias = None
    torch.nn.utils.parametrizations.weight_norm(layers[1])
    build(copied)
    assert all(value.requires_grad for layer in layers[:2] for value in layer.parameters())


def test_a_student_in_the_hand_does_not_stop_the_training(networks):
    """A callback that embeds by ``Student(trainer.student, trainer.model.head)`` froze what was trained."""
    backbone = load_backbone(networks.resnet)
    head = torch.nn.Linear(16, 16)
    Student(backbone, head)
    assert all(value.requires_grad for value in [*backbone.model.parameters(), *head.parameters()])


def test_a_loaded_student_is_a_network_like_any_other(tmp_path, images, networks):  # noqa: F811
    def make(teacher, student, name):
        return DistillationTrainer(teacher, student, arguments(tmp_path, name, max_steps=1), images.select(range(16)))

    trained(make(networks.teacher, networks.resnet, "first"))
    student = Student.from_pretrained(tmp_path / "first")
    assert not any(value.requires_grad for value in student.parameters())
    again = make(networks.teacher, student, "again")
    assert again.arguments["student"] == str(tmp_path / "first")
    before = {name: value.clone() for name, value in again.student.model.named_parameters()}
    again.train()
    after = again.student.model.named_parameters()
    assert any(not value.equal(before[name].to(value.device)) for name, value in after)
    trained(make(student, AutoModel.from_pretrained(networks.small), "from it"))
    with pytest.raises(ValueError, match=r"^teacher is a Student with a projection head.*8 dim.*\(teacher\.backbone\)"):
        make(Student.from_pretrained(tmp_path / "from it"), networks.small, "headed")
