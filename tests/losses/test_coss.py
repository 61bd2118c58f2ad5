import pytest
import torch
from torch.nn.functional import cosine_similarity

from coss_hf.features import Features
from coss_hf.losses.registry import LOSSES
from tests.helpers.loss_references import reference_cases


def run(s, t, **options):
    s = s.clone().requires_grad_()
    out = LOSSES["coss"](**options)(Features(s), Features(t), None)
    out["loss"].backward()
    return out, s.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_equal_the_reference(shared, dtype):
    rtol, gtol = (1e-9, 1e-8) if dtype == torch.float64 else (1e-5, 1e-4)
    compared = 0
    for name, meta, x in reference_cases(shared, "coss"):
        if dtype == torch.float32 and not meta["float32_ok"]:
            continue
        s, t = x["in.A_s"].to(dtype), x["in.A_t"].to(dtype)
        for lam in meta["lambdas"]:
            out, grad = run(s, t, beta=meta["beta"], lambda_ss=lam)
            expected = x[f"out.loss.lambda{lam:g}"]
            torch.testing.assert_close(out["loss"].double(), expected, rtol=rtol, atol=1e-12, msg=name)
            torch.testing.assert_close(out["l_co"].double(), x["out.l_co"], rtol=rtol, atol=rtol, msg=name)
            torch.testing.assert_close(out["l_ss"].double(), x["out.l_ss"], rtol=rtol, atol=rtol, msg=name)
            reference = x[f"grad.lambda{lam:g}"]
            live = torch.ones_like(reference, dtype=torch.bool)
            live[:, meta["dead_student_cols"]] = False
            live[meta["dead_student_rows"]] = False
            scale = reference[live].abs().max().item()
            if scale < 1e-12:  # gradient zero in mathematics: compare on the scale 1 / |s| of a cosine's derivative
                scale = 1 / s.norm().item()
            assert grad.isfinite().all(), name
            assert (grad.double() - reference)[live].abs().max() <= gtol * scale, (name, lam)
            compared += 1
    assert compared == 40


def test_agrees_with_torch_cosine_similarity():
    g = torch.Generator().manual_seed(0)
    s, t = (torch.randn(12, 7, generator=g, dtype=torch.float64) for _ in range(2))
    out, _ = run(s, t, beta=50.0, lambda_ss=0.5)
    rows, columns = cosine_similarity(s, t, dim=1).mean(), cosine_similarity(s, t, dim=0).mean()
    torch.testing.assert_close(out["loss"].detach(), -50 * (rows + 0.5 * columns))


def test_scaling_rows_leaves_l_co_and_scaling_columns_leaves_l_ss():
    g = torch.Generator().manual_seed(1)
    s, t = (torch.randn(6, 5, generator=g, dtype=torch.float64) for _ in range(2))
    rows = torch.rand(6, 1, generator=g, dtype=torch.float64) + 0.1
    columns = torch.rand(1, 5, generator=g, dtype=torch.float64) + 0.1
    base, by_row, by_column = (run(x, t, beta=1.0)[0] for x in (s, s * rows, s * columns))
    torch.testing.assert_close(by_row["l_co"], base["l_co"])
    torch.testing.assert_close(by_column["l_ss"], base["l_ss"])
    assert not torch.allclose(by_row["l_ss"], base["l_ss"])
    assert not torch.allclose(by_column["l_co"], base["l_co"])


def test_stays_float32_under_autocast_and_float64_outside():
    s, t = torch.randn(8, 4), torch.randn(8, 4)
    expected, _ = run(s.bfloat16().float(), t, beta=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, grad = run(s.bfloat16(), t, beta=1.0)
    assert out["loss"].dtype == torch.float32 and grad.dtype == torch.bfloat16
    torch.testing.assert_close(out["loss"], expected["loss"])
    assert run(s.double(), t.double())[0]["loss"].dtype == torch.float64


def test_the_teacher_gets_no_gradient():
    s, t = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    LOSSES["coss"]()(Features(s), Features(t), None)["loss"].backward()
    assert s.grad is not None and t.grad is None


@pytest.mark.parametrize("options", [{"beta": -1.0}, {"lambda_ss": float("nan")}, {"beta": float("inf")}])
def test_bad_weights_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        LOSSES["coss"](**options)


def test_dimension_mismatch_names_the_remedy():
    with pytest.raises(ValueError, match="--head"):
        LOSSES["coss"]()(Features(torch.randn(4, 3)), Features(torch.randn(4, 5)), None)
