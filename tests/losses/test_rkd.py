import pytest
import torch
from torch.nn.functional import huber_loss, normalize

import coss_hf.losses.rkd as module
from coss_hf.features import Features
from coss_hf.losses.rkd import RKDLoss
from tests.helpers.loss_references import reference_cases
from tests.helpers.loss_tolerances import DTYPES, assert_gradients, assert_values


def run(s, t, **options):
    s, t = s.clone().requires_grad_(), t.clone().requires_grad_()
    out = RKDLoss(**options)(Features(s), Features(t))
    out["loss"].backward()
    assert t.grad is None
    return out, s.grad


def pair(*shapes, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=g, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_equal_the_reference(shared, dtype):
    for case, meta, x in reference_cases(shared, "rkd"):
        s, t = x["in.f_s0"].to(dtype), x["in.f_t0"].to(dtype)
        out, gradient = run(s, t, distance_weight=meta["w_d"], angle_weight=meta["w_a"])
        expected = {name: x[f"out.{name}"] for name in ("loss", "loss_distance", "loss_angle")}
        assert_values(out, expected, dtype, case)
        assert_gradients({"s": gradient}, {"s": x["grad.in.f_s0"]}, dtype, case)


def test_agrees_with_loops_over_pairs_and_triples():
    s, t = pair((5, 3), (5, 4))

    def relations(x):
        d = torch.stack([torch.stack([(a - b).norm() for b in x]) for a in x])
        e = [[normalize(b - a, dim=0) for b in x] for a in x]
        return d / (d.sum() / 20), torch.tensor(
            [[[e[i][j] @ e[i][k] for k in range(5)] for j in range(5)] for i in range(5)]
        )

    (ds, a_s), (dt, a_t) = relations(s), relations(t)
    out, _ = run(s, t, beta=2.0, distance_weight=3.0, angle_weight=5.0)
    expected = 2 * (3 * huber_loss(ds, dt) + 5 * huber_loss(a_s, a_t))
    torch.testing.assert_close(out["loss"].detach(), expected)


def test_chunks_of_anchors_change_neither_value_nor_gradient(monkeypatch):
    s, t = pair((7, 3), (7, 9))
    whole, gradient = run(s, t)
    calls = []
    real = module._relations
    monkeypatch.setattr(module, "_relations", lambda a, x: calls.append(len(a)) or real(a, x))
    monkeypatch.setattr(module, "CHUNK", 2 * 7 * 9)
    out, other = run(s, t)
    assert max(calls) == 2, "two anchors at a time"
    torch.testing.assert_close(out, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(other, gradient, rtol=0, atol=1e-12 * gradient.abs().max().item())


def test_moving_turning_and_scaling_the_teacher_changes_nothing():
    s, t = pair((6, 4), (6, 4))
    turned = 3 * t @ torch.linalg.qr(pair((4, 4))[0])[0] + 7
    torch.testing.assert_close(run(s, turned)[0], run(s, t)[0])
    torch.testing.assert_close(
        run(turned, t)[0]["loss"].detach(), torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0
    )


def test_equal_images_have_a_finite_gradient():
    s, t = pair((5, 3), (5, 3))
    s[1] = s[0]
    _, gradient = run(s, t)
    assert gradient.abs().max() < 1e3


def test_stays_float32_under_autocast():
    s, t = pair((6, 4), (6, 5), dtype=torch.float32)
    expected, _ = run(s.bfloat16().float(), t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, gradient = run(s.bfloat16(), t)
    assert out["loss"].dtype == torch.float32 and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="angle_weight=-1"):
        RKDLoss(angle_weight=-1)
    with pytest.raises(ValueError, match="batch"):
        RKDLoss()(Features(torch.randn(1, 3)), Features(torch.randn(1, 3)))
