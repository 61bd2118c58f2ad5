import pytest
import torch
from torch.nn.functional import conv2d, leaky_relu

from coss_hf.features import Features
from coss_hf.losses.factor import FactorLoss
from tests.helpers.loss_cases import (
    assert_full_precision_under_autocast,
    assert_gradients,
    assert_reference,
    draw,
    features,
    maps,
)
from tests.helpers.loss_references import reference_cases
from tests.helpers.loss_tolerances import TOLERANCES

CASES = ["c0_repdistiller", "c1_repdistiller_student_larger", "c2_author_no_bn"]
DIMS = {"student_dim": 3, "teacher_dim": 4}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_reference(shared, case, dtype):
    meta, x = {name: (meta, tensors) for name, meta, tensors in reference_cases(shared, "ft")}[case]
    dims = {"student_dim": x["in.f_s0"].shape[1], "teacher_dim": x["in.f_t0"].shape[1]}
    loss = FactorLoss(**dims, beta=1.0, variant=meta["variant"], rate=meta["k"])
    assert_reference(loss, x, dtype)
    # The reconstruction reaches the paraphraser and nothing else.
    loss.zero_grad()
    loss.paraphraser.requires_grad_(True)
    (t,) = maps(x, dtype)[1]
    error = loss.reconstruction(features([t]))
    error.backward()
    expected = x["out.rec_loss_l1" if meta["variant"] == "author" else "out.rec_loss_mse"]
    torch.testing.assert_close(error.double(), expected, rtol=TOLERANCES[dtype][0], atol=0)
    assert_gradients({f"param.{name}": p.grad for name, p in loss.named_parameters()}, x, "grad_rec.")
    assert t.grad is None


def test_is_author_by_default_as_computed_from_the_weights():
    loss = FactorLoss(**DIMS, beta=3.0).double()
    s, t = draw((2, 3, 4, 4), (2, 4, 4, 4), dtype=torch.float64)
    units = []
    for x, network in ((s, "translator"), (t, "paraphraser")):
        weights = loss.get_submodule(network).state_dict()
        for i in range(3):
            x = leaky_relu(conv2d(x, weights[f"conv{i}.weight"], weights[f"conv{i}.bias"], padding=1), 0.1)
        units.append(x / x.square().sum((1, 2, 3), keepdim=True).sqrt())
    expected = (units[0] - units[1]).abs().sum() / (2 * 2 * 16)
    torch.testing.assert_close(loss(features([s]), features([t]))["loss"], 3 * expected)


@pytest.mark.parametrize("variant", ["author", "repdistiller"])
def test_the_student_does_not_train_the_paraphraser(variant):
    loss = FactorLoss(**DIMS, variant=variant).requires_grad_(True)
    s, t = draw((2, 3, 4, 4), (2, 4, 8, 8))
    value = loss(features([s]), features([t]))["loss"]
    value.backward()
    assert all(p.grad is None for p in loss.paraphraser.parameters())
    assert all(p.grad is not None for p in loss.translator.parameters())


@pytest.mark.parametrize("variant", ["author", "repdistiller"])
def test_the_length_of_a_factor_does_not_matter(variant):
    loss = FactorLoss(**DIMS, variant=variant).eval()
    s, t = draw((2, 3, 4, 4), (2, 4, 4, 4))
    base = loss(features([s]), features([t]))["loss"]
    last = [module for module in loss.translator.modules() if next(module.parameters(False), None) is not None][-1]
    for parameter in last.parameters():
        parameter.data *= 5
    torch.testing.assert_close(loss(features([s]), features([t]))["loss"], base)


def test_an_embedding_is_a_map_of_one_position():
    loss = FactorLoss(**DIMS)
    s, t = draw((5, 3), (5, 4))
    value = loss(Features(s), Features(t))["loss"]
    assert value == loss(features([s[:, :, None, None]]), features([t[:, :, None, None]]))["loss"]


def test_full_precision_under_autocast():
    loss = FactorLoss(**DIMS)
    s, t = draw((4, 3, 4, 4)), draw((4, 4, 2, 2))
    assert_full_precision_under_autocast(loss, s, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        error = loss.reconstruction(features([t[0].bfloat16()]))
    torch.testing.assert_close(error, loss.reconstruction(features([t[0].bfloat16().float()])), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1.0}, "beta=-1"),
        ({"rate": 0.1}, "rate=0.1 .* 0.25"),
        ({"variant": "ours"}, "variant='ours' .*author"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FactorLoss(**DIMS, **options)


def test_maps_of_other_widths_are_refused():
    with pytest.raises(ValueError, match="--method factor .*teacher_dim=4.* 3 and 5 channels"):
        FactorLoss(**DIMS)(features(draw((2, 3, 4, 4))), features(draw((2, 5, 4, 4))))
