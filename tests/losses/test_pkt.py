import pytest
import torch
from torch.nn.functional import cosine_similarity, kl_div

from coss_hf.features import Features
from coss_hf.losses.pkt import PKTLoss
from tests.helpers.loss_references import reference_cases
from tests.helpers.loss_tolerances import DTYPES, assert_gradients, assert_values


def run(s, t, beta=1.0):
    s, t = s.clone().requires_grad_(), t.clone().requires_grad_()
    out = PKTLoss(beta)(Features(s), Features(t))
    out["loss"].backward()
    assert t.grad is None
    return out, s.grad


def pair(*shapes, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=g, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_equal_the_reference(shared, dtype):
    for case, _, x in reference_cases(shared, "pkt"):
        out, gradient = run(x["in.f_s0"].to(dtype), x["in.f_t0"].to(dtype))
        assert_values(out, {"loss": x["out.loss"]}, dtype, case)
        assert_gradients({"s": gradient}, {"s": x["grad.in.f_s0"]}, dtype, case)


def test_agrees_with_the_divergence_of_rows():
    s, t = pair((6, 3), (6, 5))
    kernels = [(cosine_similarity(x[:, None], x[None], dim=-1) + 1) / 2 for x in (s, t)]
    p_s, p_t = (k / k.sum(1, keepdim=True) for k in kernels)
    divergence = kl_div(p_s.log(), p_t, reduction="batchmean") / 6
    # The original adds 1e-7 within the logarithm.
    torch.testing.assert_close(run(s, t, beta=7.0)[0]["loss"].detach(), 7 * divergence, rtol=1e-4, atol=0)


def test_turning_or_scaling_rows_changes_nothing_and_scaling_columns_does():
    s, t = pair((6, 4), (6, 4))
    turn = torch.linalg.qr(pair((4, 4))[0])[0]
    base = run(s, t)[0]["loss"]
    torch.testing.assert_close(run(s, 5 * t @ turn)[0]["loss"], base, rtol=1e-5, atol=0)
    assert abs(run(s, t * torch.arange(1, 5))[0]["loss"] - base) > 1e-3 * base


def test_an_image_without_activation_has_no_gradient():
    s, t = pair((5, 3), (5, 3))
    s[2] = 0
    out, gradient = run(s, t)
    assert out["loss"].isfinite() and gradient.isfinite().all()
    assert not gradient[2].any() and gradient[0].any()


def test_stays_float32_under_autocast():
    s, t = pair((6, 4), (6, 5), dtype=torch.float32)
    expected, _ = run(s.bfloat16().float(), t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, gradient = run(s.bfloat16(), t)
    assert out["loss"].dtype == torch.float32 and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)


def test_bad_weights_are_refused():
    with pytest.raises(ValueError, match="beta=-1"):
        PKTLoss(beta=-1)
