import pytest
import torch
from torch.nn.functional import cosine_similarity

from coss_hf.features import Features
from coss_hf.losses.at import ATLoss
from tests.helpers.loss_cases import assert_full_precision_under_autocast, assert_reference, draw, features
from tests.helpers.loss_references import reference_cases

MAPS = [(4, 3, 8, 8), (4, 5, 4, 4)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_equal_the_reference(shared, dtype):
    pairs = 0
    for _, meta, x in reference_cases(shared, "at"):
        pairs += len(assert_reference(ATLoss(beta=1.0, p=meta["p"]), x, dtype)) - 1
    assert pairs == 5


def test_equals_the_cosine_of_attentions():
    s, t = draw((4, 3, 5, 5), (4, 7, 5, 5), dtype=torch.float64)
    cosine = cosine_similarity(s.square().sum(1).flatten(1), t.square().sum(1).flatten(1))
    out = ATLoss()(features([s]), features([t]))
    torch.testing.assert_close(out["loss"], 1000 * (2 - 2 * cosine).mean() / 25)


def test_scale_and_order_of_channels_do_not_matter():
    s, t = draw(*MAPS), draw(*MAPS, seed=1)
    base, moved = (ATLoss()(features(x), features(t))["loss"] for x in (s, [3 * x.flip(1) for x in s]))
    torch.testing.assert_close(moved, base)
    assert ATLoss()(features(s), features([2 * x for x in s]))["loss"] < 1e-9


def test_a_map_that_is_zero_gets_no_gradient():
    s, (t,) = torch.zeros(2, 3, 4, 4, requires_grad=True), draw((2, 3, 4, 4))
    ATLoss()(features([s]), features([t]))["loss"].backward()
    assert not s.grad.any()


def test_full_precision_under_autocast():
    assert_full_precision_under_autocast(ATLoss(), draw(*MAPS), draw(*MAPS, seed=1))


@pytest.mark.parametrize("p", [1, 1.5, 3])
def test_zeros_of_a_map_have_a_gradient(p):
    s, t = (x.relu() for x in draw(MAPS[0], MAPS[0]))
    s.requires_grad_()
    ATLoss(p=p)(features([s]), features([t]))["loss"].backward()
    assert (s == 0).any() and s.grad.isfinite().all() and s.grad.any()


@pytest.mark.parametrize("p", [0, 0.5, -1, float("nan"), float("inf")])
def test_exponents_without_a_slope_at_zero_are_refused(p):
    with pytest.raises(ValueError, match=f"p={p} must be a finite number >= 1"):
        ATLoss(p=p)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="beta=-1"):
        ATLoss(beta=-1.0)
    with pytest.raises(ValueError, match="student gives 2 and the teacher 1"):
        ATLoss()(features(draw(*MAPS)), features(draw(MAPS[0])))
    with pytest.raises(ValueError, match="--method at"):
        ATLoss()(Features(torch.randn(2, 3)), Features(torch.randn(2, 3)))
