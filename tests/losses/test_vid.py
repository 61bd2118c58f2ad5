import pytest
import torch
from torch.distributions import Normal

from coss_hf.features import Features
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


def test_full_precision_under_autocast():
    loss = VIDLoss(student_dim=3, teacher_dim=4)
    assert_full_precision_under_autocast(loss, draw((4, 3, 4, 4)), draw((4, 4, 2, 2)))
    assert all(p.grad.any() for p in loss.parameters())


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="beta=-2"):
        VIDLoss(student_dim=3, teacher_dim=4, beta=-2.0)
    with pytest.raises(ValueError, match="student_dim=3 .* 5 and 4 channels"):
        VIDLoss(student_dim=3, teacher_dim=4)(Features(torch.randn(2, 5)), Features(torch.randn(2, 4)))
