import pytest
import torch

from coss_hf.features import Features
from coss_hf.losses.nst import NSTLoss
from tests.helpers.loss_cases import assert_full_precision_under_autocast, assert_reference, draw, features
from tests.helpers.loss_references import reference_cases

MAPS = [(4, 3, 8, 8), (4, 5, 4, 4)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_equal_the_reference(shared, dtype):
    pairs = sum(len(assert_reference(NSTLoss(beta=1.0), x, dtype)) - 1 for _, _, x in reference_cases(shared, "nst"))
    assert pairs == 3


def test_equals_the_distance_of_gram_matrices_of_positions():
    s, t = draw((3, 4, 3, 3), (3, 6, 3, 3), dtype=torch.float64)
    grams = []
    for x in (s, t):
        x = x.flatten(2) / x.flatten(2).norm(dim=2, keepdim=True)
        grams.append(torch.einsum("ncp,ncq->npq", x, x) / x.shape[1])
    expected = (grams[0] - grams[1]).square().sum((1, 2)).mean()
    torch.testing.assert_close(NSTLoss(beta=2.0)(features([s]), features([t]))["loss"], 2 * expected)


def test_scale_sign_and_order_of_channels_do_not_matter():
    s, t = draw(*MAPS), draw(*MAPS, seed=1)
    scales = torch.tensor([2.0, -3.0, 0.5, 1.0, -1.0])[:, None, None]
    moved = [x.flip(1) * scales[: x.shape[1]] for x in s]
    base, moved = (NSTLoss()(features(x), features(t))["loss"] for x in (s, moved))
    torch.testing.assert_close(moved, base)
    assert abs(NSTLoss()(features(s), features(s))["loss"]) < 1e-5


def test_a_channel_that_is_zero_gets_no_gradient():
    s, t = draw((2, 3, 4, 4), (2, 5, 4, 4))
    s[0, 1] = 0
    s.requires_grad_()
    NSTLoss()(features([s]), features([t]))["loss"].backward()
    assert not s.grad[0, 1].any() and s.grad.isfinite().all() and s.grad[0, 0].any()


def test_full_precision_under_autocast():
    assert_full_precision_under_autocast(NSTLoss(), draw(*MAPS), draw(*MAPS, seed=1))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="beta=inf"):
        NSTLoss(beta=float("inf"))
    with pytest.raises(ValueError, match="student gives 1 and the teacher 2"):
        NSTLoss()(features(draw(MAPS[0])), features(draw(*MAPS)))
    with pytest.raises(ValueError, match="--method nst"):
        NSTLoss()(Features(torch.randn(2, 3)), Features(torch.randn(2, 3)))
