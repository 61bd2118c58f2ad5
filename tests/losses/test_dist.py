import pytest
import torch

from coss_hf.features import Features
from coss_hf.losses.dist import DISTLoss, inter_and_intra
from tests.helpers.loss_references import reference_cases
from tests.helpers.loss_tolerances import DTYPES, assert_gradients, assert_values

VARIANTS = {"logits": "softmax", "features_raw": "features_raw", "features_coss_authors": "coss_authors"}


def run(s, t, **options):
    s, t = s.clone().requires_grad_(), t.clone().requires_grad_()
    out = DISTLoss(**options)(Features(s), Features(t))
    out["loss"].backward()
    assert t.grad is None
    return out, s.grad


def pair(*shapes, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=g, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_equal_the_reference(shared, dtype):
    for case, meta, x in reference_cases(shared, "dist"):
        s, t = x["in.z_s"].to(dtype), x["in.z_t"].to(dtype)
        options = {"variant": VARIANTS[meta["variant"]]}
        if "s_temp" in meta:
            options |= {"student_temperature": meta["s_temp"], "teacher_temperature": meta["t_temp"]}
        if s.dim() == 2:
            weights = {"inter_weight": meta["beta"], "intra_weight": meta["gamma"]}
            out, gradient = run(s, t, **options, **weights)
        else:
            s.requires_grad_()
            inter, intra = inter_and_intra(s, t, **options)
            out = {"loss": meta["beta"] * inter + meta["gamma"] * intra, "loss_inter": inter, "loss_intra": intra}
            out["loss"].backward()
            gradient = s.grad
        expected = {name: x[f"out.{name}"] for name in ("loss", "loss_inter", "loss_intra")}
        assert_values(out, expected, dtype, case)
        assert_gradients({"s": gradient}, {"s": x["grad.in.z_s"]}, dtype, case)


def test_agrees_with_the_correlation_matrix_of_torch():
    s, t = pair((6, 4), (6, 4))
    inter = 1 - torch.stack([torch.corrcoef(torch.stack(rows))[0, 1] for rows in zip(s, t)]).mean()
    intra = 1 - torch.stack([torch.corrcoef(torch.stack(columns))[0, 1] for columns in zip(s.T, t.T)]).mean()
    out, _ = run(s, t, beta=2.0, inter_weight=3.0, intra_weight=5.0)
    torch.testing.assert_close(out["loss"].detach(), 2 * (3 * inter + 5 * intra), rtol=1e-7, atol=0)


def test_shifting_and_scaling_images_leaves_inter_and_dimensions_intra():
    s, t = pair((6, 4), (6, 4))
    rows, columns = torch.rand(6, 1) + 0.5, torch.rand(1, 4) + 0.5
    base, by_row, by_column = (run(x, t)[0] for x in (s, s * rows + rows, s * columns + columns))
    torch.testing.assert_close(by_row["loss_inter"], base["loss_inter"], rtol=1e-6, atol=0)
    torch.testing.assert_close(by_column["loss_intra"], base["loss_intra"], rtol=1e-6, atol=0)
    assert not torch.allclose(by_row["loss_intra"], base["loss_intra"])
    assert not torch.allclose(by_column["loss_inter"], base["loss_inter"])


def test_a_dead_dimension_does_not_blow_up_the_gradient():
    s, t = pair((6, 4), (6, 4))
    s[:, 1] = 0
    _, gradient = run(s, t)
    assert gradient.isfinite().all() and gradient.abs().max() < 1e3


def mean_correlation(a, b):
    """Of the rows, in float64; 0 for those that are constant."""
    found = [
        0.0 if (x == x[0]).all() or (y == y[0]).all() else torch.corrcoef(torch.stack([x, y]).double())[0, 1].item()
        for x, y in zip(a, b)
    ]
    return sum(found) / len(found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("constant", [0.1, 1e3, 1e-3, -7.3])
@pytest.mark.parametrize("images", [7, 300])
def test_a_constant_image_or_dimension_has_no_correlation(images, constant, dtype):
    """Its mean is rounded: what is left is noise, by whose length the gradient was divided."""
    s, t = pair((images, 40), (images, 40), dtype=dtype)
    for one in (s, t):  # of the student, then of both
        one[:, 1] = constant
        one[2] = constant
        out, gradient = run(s, t)
        expected = torch.tensor([1 - mean_correlation(s, t), 1 - mean_correlation(s.T, t.T)])
        got = torch.stack([out["loss_inter"], out["loss_intra"]]).detach().float()
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        assert gradient.isfinite().all() and gradient.abs().max() < 1
        assert not gradient[2, 1].any(), "the entry of nothing but constants"


def test_stays_float32_under_autocast():
    s, t = pair((6, 4), (6, 4), dtype=torch.float32)
    expected, _ = run(s.bfloat16().float(), t, variant="softmax")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, gradient = run(s.bfloat16(), t, variant="softmax")
    assert out["loss"].dtype == torch.float32 and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    "options", [{"beta": -1.0}, {"intra_weight": float("nan")}, {"variant": "x"}, {"student_temperature": 0}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DISTLoss(**options)


def test_dimension_mismatch_names_the_remedy():
    with pytest.raises(ValueError, match="dist.*--head"):
        DISTLoss()(Features(torch.randn(4, 3)), Features(torch.randn(4, 5)))
