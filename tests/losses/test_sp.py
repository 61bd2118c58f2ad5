from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from coss_hf.features import Features
from coss_hf.losses.at import ATLoss
from coss_hf.losses.combination import parse_methods
from coss_hf.losses.registry import build_loss
from coss_hf.losses.sp import SPLoss
from tests.helpers.loss_cases import (
    assert_full_precision_under_autocast,
    assert_gradients,
    draw,
    features,
    maps,
)
from tests.helpers.loss_references import reference_cases
from tests.helpers.processes import spawn


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_equal_the_reference(shared, dtype):
    cases = list(reference_cases(shared, "sp"))
    for _, _, x in cases:
        s, t = maps(x, dtype)
        value = SPLoss(beta=1.0)(features(s), features(t))["loss"]
        value.backward()
        rtol = 1e-9 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(value.double(), x["out.loss"], rtol=rtol, atol=0)
        named = {f"in.f_s{i}": one.grad for i, one in enumerate(s)}
        assert_gradients(named, {f"grad.{name}": x[f"grad.{name}"] for name in named})
        assert all(one.grad is None for one in t)
    assert len(cases) >= 2 and max(len(maps(x, dtype)[0]) for _, _, x in cases) == 2


def test_a_run_compares_the_last_map():
    s, t = draw((5, 2, 4, 4), (5, 3, 2, 2), seed=0), draw((5, 2, 4, 4), (5, 3, 2, 2), seed=1)
    loss = build_loss(parse_methods("sp"), features(s), features(t))
    assert loss(features(s), features(t))["loss"] == SPLoss()(features(s[1:]), features(t[1:]))["loss"]


def test_equals_a_loop_over_pairs_of_images():
    s, t = draw((4, 3), (4, 6), dtype=torch.float64)
    total = 0.0
    for i in range(4):
        rows = [torch.stack([x[i].dot(x[j]) for j in range(4)]) for x in (s, t)]
        total += sum((row / row.norm() * sign) for row, sign in zip(rows, (1, -1))).square().sum()
    torch.testing.assert_close(SPLoss(beta=2.0)(Features(s), Features(t))["loss"], 2 * total / 16)


def test_rotation_of_the_features_does_not_matter():
    s, t = draw((6, 5), (6, 7))
    rotation = torch.linalg.qr(torch.randn(5, 5))[0]
    base, rotated = (SPLoss()(Features(x), Features(t))["loss"] for x in (s, 4 * s @ rotation))
    torch.testing.assert_close(rotated, base)


def test_an_image_without_features_gets_a_bounded_gradient():
    s, t = draw((4, 5), (4, 5))
    s[2] = 0
    s.requires_grad_()
    SPLoss()(Features(s), Features(t))["loss"].backward()
    assert s.grad.abs().max() < 1e4  # the literal derivative of the clamped norm: 1e12 times as much


def step(rank: int, sizes: dict, x, t, weight, results: Path) -> None:
    out = {}
    for name, loss in (("sp", SPLoss()), ("at", ATLoss())):
        student = nn.Conv2d(*weight.shape[1::-1], 1, bias=False, dtype=torch.float64)
        student.weight.data.copy_(weight)
        student = DistributedDataParallel(student)
        start = sum(sizes[name][:rank])
        rows = slice(start, start + sizes[name][rank])
        value = loss(features([student(x[rows])]), features([t[rows]]))["loss"]
        value.backward()
        mean = value.detach().clone()
        dist.all_reduce(mean)
        out[name] = value.detach(), mean / 2, student.module.weight.grad
    torch.save(out, results / f"{rank}.pt")


def test_two_processes_equal_one(tmp_path):
    """SP whatever the shards; AT, for all losses that are means over images, at equal shards."""
    x, t, weight = draw((8, 3, 2, 2), (8, 5, 2, 2), (4, 3, 1, 1), dtype=torch.float64)
    sizes = {"sp": [3, 5], "at": [4, 4]}
    spawn(step, tmp_path, sizes, x, t, weight, tmp_path, processes=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, loss in (("sp", SPLoss()), ("at", ATLoss())):
        w = weight.clone().requires_grad_()
        whole = loss(features([torch.nn.functional.conv2d(x, w)]), features([t]))["loss"]
        whole.backward()
        for value, mean, gradient in (result[name] for result in results):
            torch.testing.assert_close(value if name == "sp" else mean, whole.detach(), rtol=1e-10, atol=0)
            torch.testing.assert_close(gradient, w.grad, rtol=0, atol=1e-10 * w.grad.abs().max().item())


def test_full_precision_under_autocast():
    assert_full_precision_under_autocast(SPLoss(), draw((4, 3, 4, 4)), draw((4, 5, 2, 2)))
    assert_full_precision_under_autocast(SPLoss(), draw((4, 3)), draw((4, 5)))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="beta=nan"):
        SPLoss(beta=float("nan"))
    with pytest.raises(ValueError, match="student gives 0 and the teacher 1"):
        SPLoss()(Features(torch.randn(2, 3)), features(draw((2, 3, 4, 4))))
