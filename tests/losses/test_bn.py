import pytest
import torch
from torch.nn.functional import batch_norm

from coss_hf.features import Features
from coss_hf.losses.bn import BNLoss
from tests.helpers.loss_cases import assert_gradients, draw
from tests.helpers.loss_references import reference_cases
from tests.helpers.loss_tolerances import TOLERANCES


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_equal_the_reference(shared, dtype):
    for case, _, x in reference_cases(shared, "bn"):
        s, t = (x[f"in.{name}"].to(dtype).requires_grad_() for name in ("A_s", "A_t"))
        loss = BNLoss(teacher_dim=t.shape[1], beta=1.0).to(dtype)
        loss.load_state_dict({"weight": x["in.gamma"], "bias": x["in.beta"]}, strict=False)
        value = loss(Features(s), Features(t))["loss"]
        value.backward()
        torch.testing.assert_close(value.double(), x["out.loss"], rtol=TOLERANCES[dtype][0], atol=0)
        gradients = {"A_s": s.grad, "gamma": loss.weight.grad, "beta": loss.bias.grad}
        if dtype == torch.float64 or case != "c2_constant_column":  # there a difference of equals over sqrt(eps)
            assert_gradients(gradients, x)
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(loss, name).double(), x[f"out.{name}"], rtol=1e-5, atol=1e-6)
        assert t.grad is None


def test_evaluation_takes_the_running_statistics():
    loss = BNLoss(teacher_dim=3, beta=2.0)
    s, t = draw((6, 3), (6, 3))
    loss(Features(s), Features(t))
    mean, variance = loss.running_mean.clone(), loss.running_var.clone()
    expected = 2 * (batch_norm(s, mean, variance) - t).square().mean()
    torch.testing.assert_close(loss.eval()(Features(s), Features(t))["loss"], expected)
    assert torch.equal(loss.running_mean, mean)


def test_scale_and_shift_of_the_student_do_not_matter():
    loss = BNLoss(teacher_dim=3)
    s, t = draw((6, 3), (6, 3), dtype=torch.float64)
    base = loss(Features(s), Features(t))["loss"]
    torch.testing.assert_close(loss(Features(1e4 * s + 1e5), Features(t))["loss"], base, rtol=1e-4, atol=0)


def test_stays_float32_under_autocast():
    loss, (s, t) = BNLoss(teacher_dim=3), draw((6, 3), (6, 3))
    expected = loss(Features(s.bfloat16().float()), Features(t))["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(Features(s.bfloat16()), Features(t))["loss"]
    assert value.dtype == torch.float32 and value == expected


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="beta=-1"):
        BNLoss(teacher_dim=3, beta=-1.0)
    with pytest.raises(ValueError, match="--method bn .*head"):
        BNLoss(teacher_dim=3)(Features(torch.randn(2, 4)), Features(torch.randn(2, 3)))
    with pytest.raises(ValueError, match="one image"):
        BNLoss(teacher_dim=3)(Features(torch.randn(1, 3)), Features(torch.randn(1, 3)))
