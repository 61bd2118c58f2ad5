import pytest
import torch

from coss_hf.features import Features
from coss_hf.losses.kd import KDLoss
from tests.helpers.loss_references import reference_cases
from tests.helpers.loss_tolerances import DTYPES, assert_gradients, assert_values


def features(logits):
    return Features(torch.zeros(len(logits), 1), logits=logits)


def run(s, t, **options):
    s, t = s.clone().requires_grad_(), t.clone().requires_grad_()
    out = KDLoss(**options)(features(s), features(t))
    out["loss"].backward()
    assert t.grad is None
    return out, s.grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_equal_the_reference(shared, dtype):
    for case, meta, x in reference_cases(shared, "kd"):
        out, gradient = run(x["in.z_s"].to(dtype), x["in.z_t"].to(dtype), temperature=meta["T"])
        assert_values(out, {"loss": x["out.loss"]}, dtype, case)
        assert_gradients({"s": gradient}, {"s": x["grad.in.z_s"]}, dtype, case)


def test_two_classes_by_hand():
    z = torch.tensor([[3.0, 3.0], [0.0, 0.0]], dtype=torch.float64)
    t = torch.tensor([[0.0, 2 * torch.tensor(3.0).log()]] * 2, dtype=torch.float64)
    # The teacher says 1/4 and 3/4 at T = 2, the student 1/2 and 1/2.
    expected = 10 * 4 * (0.25 * torch.tensor(0.5).log() + 0.75 * torch.tensor(1.5).log())
    torch.testing.assert_close(run(z, t, beta=10.0, temperature=2.0)[0]["loss"].item(), expected.item())


def test_shifting_logits_changes_nothing():
    s, t = torch.randn(4, 3), torch.randn(4, 3)
    torch.testing.assert_close(run(s + 5, t - 2)[0], run(s, t)[0])


def test_stays_float32_under_autocast():
    s, t = torch.randn(4, 3), torch.randn(4, 3)
    expected, _ = run(s.bfloat16().float(), t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, gradient = run(s.bfloat16(), t)
    assert out["loss"].dtype == torch.float32 and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="temperature=0"):
        KDLoss(temperature=0)
    with pytest.raises(ValueError, match="teacher None.*classifier"):
        KDLoss()(features(torch.zeros(2, 3)), Features(torch.zeros(2, 4)))
    with pytest.raises(ValueError, match="classes"):
        KDLoss()(features(torch.zeros(2, 3)), features(torch.zeros(2, 4)))
