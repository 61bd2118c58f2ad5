import pytest
import torch

from coss_hf.losses.hint import HintLoss
from tests.helpers.loss_cases import assert_full_precision_under_autocast, assert_reference, draw, features
from tests.helpers.loss_references import reference_cases


def build(s: torch.Size, t: torch.Size, **options) -> HintLoss:
    sizes = {"student_size": s[2], "teacher_size": t[2]} if len(s) == 4 else {}
    return HintLoss(student_dim=s[1], teacher_dim=t[1], **sizes, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_equal_the_reference(shared, dtype):
    for _, meta, x in reference_cases(shared, "hint"):
        regressor = "none" if meta["regressor"] == "none" else "auto"
        loss = build(x["in.f_s0"].shape, x["in.f_t0"].shape, beta=1.0, regressor=regressor)
        assert_reference(loss, x, dtype)


@pytest.mark.parametrize(("s", "t"), [(8, 4), (4, 8), (4, 4), (5, 3), (3, 7)])
def test_every_pair_of_sizes_is_served(s, t):
    loss = build((2, 3, s, s), (2, 4, t, t))
    a, b = draw((2, 3, s, s), (2, 4, t, t))
    loss(features([a]), features([b]))["loss"].backward()
    assert loss.conv.weight.grad.any()


def test_of_several_maps_the_middle_is_compared():
    loss = build((2, 3, 4, 4), (2, 4, 4, 4))
    s, t = draw((2, 2, 8, 8), (2, 3, 4, 4), (2, 5, 2, 2)), draw((2, 2, 8, 8), (2, 4, 4, 4), (2, 5, 2, 2))
    assert loss(features(s), features(t))["loss"] == loss(features(s[1:2]), features(t[1:2]))["loss"]


def test_is_zero_for_equal_maps():
    (x,) = draw((2, 3, 4, 4))
    assert build(x.shape, x.shape, regressor="none")(features([x]), features([x]))["loss"] == 0


def test_full_precision_under_autocast():
    assert_full_precision_under_autocast(build((4, 3, 4, 4), (4, 4, 2, 2)), draw((4, 3, 4, 4)), draw((4, 4, 2, 2)))


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="beta=-1"):
        HintLoss(student_dim=3, teacher_dim=4, beta=-1.0)
    with pytest.raises(ValueError, match="regressor='none'"):
        HintLoss(student_dim=3, teacher_dim=4, regressor="none")
