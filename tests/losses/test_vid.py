import pytest
import torch
from torch.distributions import Normal

from coss_hf.features import Features
from coss_hf.losses.combination import parse_methods
from coss_hf.losses.registry import build_loss
from coss_hf.losses.vid import VIDLoss
from tests.helpers.loss_cases import (
    assert_full_precision_under_autocast,
    assert_reference,
    draw,
    features,
    load,
    maps,
)
from tests.helpers.loss_references import reference_cases
from tests.helpers.loss_tolerances import TOLERANCES


def build(x: dict) -> VIDLoss:
    return VIDLoss(student_dim=x["in.f_s0"].shape[1], teacher_dim=x["in.f_t0"].shape[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_equal_the_reference(shared, dtype):
    cases = list(reference_cases(shared, "vid"))
    for _, _, x in cases:
        assert_reference(build(x), x, dtype)
    assert len(cases) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_embedding_is_a_map_of_one_position(shared, dtype):
    x = {name: tensors for name, _, tensors in reference_cases(shared, "vid")}["c2_embeddings_1x1"]
    loss = load(build(x), x, dtype)
    s, t = (Features(side[0].flatten(1)) for side in maps(x, dtype))
    value = loss(s, t)["loss"]
    torch.testing.assert_close(value.double(), x["out.loss"], rtol=TOLERANCES[dtype][0], atol=0)
    # A convolutional student of a transformer: its map is averaged to one position.
    student = Features(torch.empty(6, 1), (s.embedding[:, :, None, None] + torch.tensor([[-1.0, 1.0], [2.0, -2.0]]),))
    torch.testing.assert_close(loss(student, t)["loss"], value)


def test_starts_as_the_likelihood_of_a_normal_of_variance_five():
    loss = VIDLoss(student_dim=3, teacher_dim=4, beta=2.0).double()
    s, t = draw((5, 3, 2, 2), (5, 4, 2, 2), dtype=torch.float64)
    expected = -Normal(loss.regressor(s), 5**0.5).log_prob(t).mean() - 0.5 * torch.tensor(2 * torch.pi).log()
    torch.testing.assert_close(loss(features([s]), features([t]))["loss"], 2 * expected, rtol=1e-7, atol=0)


def test_of_several_maps_the_last_is_compared():
    loss = VIDLoss(student_dim=3, teacher_dim=4)
    s, t = draw((2, 5, 8, 8), (2, 3, 4, 4)), draw((2, 6, 8, 8), (2, 4, 4, 4))
    assert loss(features(s), features(t))["loss"] == loss(features(s[1:]), features(t[1:]))["loss"]


def test_all_stages_are_the_sum_of_a_loss_for_each():
    dims = {"student_dims": (5, 3), "teacher_dims": (6, 4)}
    loss = VIDLoss(student_dim=3, teacher_dim=4, **dims, beta=2.0)
    s, t = draw((2, 5, 8, 8), (2, 3, 4, 4)), draw((2, 6, 8, 8), (2, 4, 4, 4))
    first = VIDLoss(student_dim=5, teacher_dim=6)
    first.load_state_dict(loss.earlier[0].state_dict())
    last = VIDLoss(student_dim=3, teacher_dim=4)
    last.load_state_dict({k: v for k, v in loss.state_dict().items() if not k.startswith("earlier")})
    expected = first(s[:1], t[:1])["loss"] + last(s[1:], t[1:])["loss"]
    value = loss(features(s), features(t))["loss"]
    torch.testing.assert_close(value, 2 * expected)
    value.backward()
    assert all(p.grad.any() for p in loss.parameters())


def test_all_stages_of_a_run_and_of_networks_without_maps():
    s, t = draw((2, 5, 8, 8), (2, 3, 4, 4)), draw((2, 6, 8, 8), (2, 4, 4, 4))
    (method,) = parse_methods("vid")
    loss = build_loss([method], features(s), features(t))
    (alone,) = parse_methods("vid(stages=last)")
    assert not build_loss([alone], features(s), features(t)).earlier
    assert len(loss.earlier) == 1 and loss(features(s), features(t))["loss"].isfinite()
    without = Features(torch.randn(2, 3)), Features(torch.randn(2, 4))
    assert not build_loss([method], *without).earlier


def test_full_precision_under_autocast():
    loss = VIDLoss(student_dim=3, teacher_dim=4)
    assert_full_precision_under_autocast(loss, draw((4, 3, 4, 4)), draw((4, 4, 2, 2)))
    assert all(p.grad.any() for p in loss.parameters())


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="beta=-2"):
        VIDLoss(student_dim=3, teacher_dim=4, beta=-2.0)
    with pytest.raises(ValueError, match="stages='some' is unknown: choose one of all, last"):
        VIDLoss(student_dim=3, teacher_dim=4, stages="some")
    with pytest.raises(ValueError, match="student_dims=.3,. and teacher_dims=..: give as many of both"):
        VIDLoss(student_dim=3, teacher_dim=4, student_dims=(3,))
    with pytest.raises(ValueError, match="student_dim=3 .* 5 and 4 channels"):
        VIDLoss(student_dim=3, teacher_dim=4)(Features(torch.randn(2, 5)), Features(torch.randn(2, 4)))
