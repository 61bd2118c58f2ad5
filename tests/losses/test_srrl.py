import pytest
import torch
from torch import nn

from coss_hf.features import Features
from coss_hf.losses.srrl import SRRLLoss
from tests.helpers.loss_cases import assert_full_precision_under_autocast, assert_reference, draw, features
from tests.helpers.loss_references import reference_cases


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_equal_the_reference(shared, dtype):
    for case, meta, x in reference_cases(shared, "srrl"):
        shapes = x["in.f_s0"].shape[1], x["in.f_t0"].shape[1]
        classifier = nn.Linear(shapes[1], len(x["param.teacher_fc.bias"])) if meta["classifier"] else None
        loss = SRRLLoss(student_dim=shapes[0], teacher_dim=shapes[1], classifier=classifier, weight=meta["weight"])
        out = assert_reference(loss, x, dtype)
        assert ("loss_sr" in out) == (case == "c0_maps_with_classifier")


def test_the_classifier_is_a_frozen_copy():
    classifier = nn.Linear(4, 7)
    loss = SRRLLoss(student_dim=3, teacher_dim=4, classifier=classifier)
    assert loss.teacher_fc is not classifier and classifier.weight.requires_grad
    s, t = draw((5, 3, 2, 2), (5, 4, 2, 2))
    loss(features([s]), features([t]))["loss"].backward()
    assert loss.teacher_fc.weight.grad is None and loss.connector.conv.weight.grad.any()


def test_the_position_does_not_matter():
    loss = SRRLLoss(student_dim=3, teacher_dim=4, classifier=nn.Linear(4, 2))
    s, t = draw((5, 3, 2, 2), (5, 4, 2, 2))
    torch.testing.assert_close(
        loss(features([s.flip(2)]), features([t.flip(3)])), loss(features([s]), features([t])), rtol=1e-5, atol=1e-6
    )


def test_full_precision_under_autocast():
    loss = SRRLLoss(student_dim=3, teacher_dim=4, classifier=nn.Linear(4, 2))
    assert_full_precision_under_autocast(loss, draw((4, 3, 4, 4)), draw((4, 4, 2, 2)))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="weight=-1"):
        SRRLLoss(student_dim=3, teacher_dim=4, weight=-1.0)
    with pytest.raises(ValueError, match="--method srrl .*student_dim=3"):
        SRRLLoss(student_dim=3, teacher_dim=4)(Features(torch.randn(2, 5)), Features(torch.randn(2, 4)))
