import pytest
import torch

from coss_hf.features import Features
from coss_hf.losses.crd import CRDLoss
from tests.helpers.loss_cases import assert_gradients, draw
from tests.helpers.loss_references import reference_cases
from tests.helpers.loss_tolerances import TOLERANCES


def build(images: int = 10, **options) -> CRDLoss:
    torch.manual_seed(0)
    return CRDLoss(**{"student_dim": 3, "teacher_dim": 4, "num_images": images, "feature_dim": 5} | options)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_two_steps_equal_the_reference(shared, monkeypatch, dtype, dense):
    if not dense:
        monkeypatch.setattr("coss_hf.losses.memory_bank._is_small", lambda *args: False)
    ((_, meta, x),) = reference_cases(shared, "crd")
    names = {"student_dim": "s_dim", "teacher_dim": "t_dim", "num_images": "n_data", "negatives": "K"}
    names |= {"temperature": "T", "momentum": "m", "feature_dim": "feat_dim"}
    loss = CRDLoss(beta=1.0, **{ours: meta[name] for ours, name in names.items()})
    start = {k.split(".", 1)[1]: v for k, v in x.items() if k.startswith(("param.", "buf."))}
    loss.load_state_dict(start, strict=False)
    loss.to(dtype)
    for step in range(2):
        loss.zero_grad()
        s, t = (x[f"in.f_{side}{step}"].to(dtype).requires_grad_() for side in "st")
        out = loss(Features(s), Features(t), x[f"in.y{step}"], x[f"in.idx{step}"])
        out["loss"].backward()
        rtol = TOLERANCES[dtype][0]
        torch.testing.assert_close(out["loss"].double(), x[f"out.loss_step{step}"].reshape(()), rtol=rtol, atol=0)
        torch.testing.assert_close(loss.Z.double(), x[f"out.Z_step{step}"], rtol=rtol, atol=0)
        got = {f"in.f_s{step}": s.grad} | {f"param.{name}": p.grad for name, p in loss.named_parameters()}
        assert_gradients(got, x, f"grad_step{step}.")
        assert t.grad is None
        for name in ("memory_s", "memory_t"):
            after = x[f"out.{name}_after{step}"].double()
            torch.testing.assert_close(getattr(loss, name).double(), after, rtol=rtol, atol=rtol)


def test_negatives_are_others_and_all_of_them():
    loss = build(negatives=6)
    index = torch.tensor([0, 9, 4])
    drawn = torch.cat([loss.draw(index) for _ in range(200)], 1)
    candidates = loss.draw(index)
    assert candidates.shape == (3, 7) and torch.equal(candidates[:, 0], index)
    for row, own in zip(drawn.view(3, 200, 7)[:, :, 1:].flatten(1), index):
        assert row.unique().tolist() == [i for i in range(10) if i != own]


def test_no_two_processes_draw_the_same(monkeypatch):
    loss = build(images=1000, negatives=4)
    monkeypatch.setattr("coss_hf.losses.crd.world_size", lambda: 2)
    drawn = []
    for rank in range(2):
        monkeypatch.setattr("coss_hf.losses.crd.rank", lambda rank=rank: rank)
        torch.manual_seed(0)
        drawn.append(loss.draw(torch.tensor([0])))
    assert not torch.equal(*drawn)


def test_the_last_of_images_that_are_twice_in_a_batch_is_kept():
    loss = build()
    s, t = draw((3, 3), (3, 4))
    before = loss.memory_s.clone()
    loss(Features(s), Features(t), torch.tensor([2, 5, 2]))
    expected = 0.5 * before[2] + 0.5 * loss.embed_s(s[2:])[0]
    torch.testing.assert_close(loss.memory_s[2], expected / expected.norm())
    assert (loss.memory_s != before).any(1).nonzero().flatten().tolist() == [2, 5]


def test_evaluation_leaves_the_memories():
    loss = build().eval()
    before = loss.memory_s.clone()
    loss(Features(torch.randn(2, 3)), Features(torch.randn(2, 4)), torch.tensor([0, 1]))
    assert torch.equal(loss.memory_s, before)


def test_stays_float32_under_autocast():
    loss = build()
    s, t = draw((3, 3), (3, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(Features(s.bfloat16()), Features(t.bfloat16()), torch.arange(3))["loss"]
    assert value.dtype == torch.float32


def test_a_small_temperature_stays_in_the_range_of_float32():
    """exp(1 / 0.01) does not."""
    found = []
    for dtype in (torch.float64, torch.float32):
        loss = build(temperature=0.01).to(dtype)
        torch.manual_seed(1)
        s, t = (x.to(dtype).requires_grad_() for x in draw((4, 3), (4, 4)))
        for _ in range(2):
            out = loss(Features(s), Features(t), torch.tensor([7, 2, 0, 9]))
        out["loss"].backward()
        found.append([out["loss"].detach().double(), s.grad.double(), loss.embed_t.linear.weight.grad.double()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
    assert found[0][1].any()


def test_memories_without_a_first_call_are_finite():
    """Checkpoints refuse what is not; an untrained loss could not be saved."""
    loss = build()
    assert all(tensor.isfinite().all() for tensor in loss.state_dict().values()) and loss.Z.tolist() == [0, 0]


def test_the_constants_of_earlier_checkpoints_are_read():
    loss, s, t = build(), *draw((4, 3), (4, 4))
    loss(Features(s), Features(t), torch.arange(4))
    saved = loss.state_dict()
    earlier = {name: value for name, value in saved.items() if name != "log_Z"} | {"Z": saved["log_Z"].exp()}
    again = build()
    again.load_state_dict(earlier)
    torch.testing.assert_close(again.log_Z, loss.log_Z)
    assert "Z" in earlier
    again.load_state_dict(earlier | {"Z": torch.zeros(2)})
    again(Features(s), Features(t), torch.arange(4))
    assert (again.Z > 0).all(), "0 was that of no call yet"


@pytest.mark.parametrize("momentum", [-0.1, 1.5, float("nan"), float("inf")])
def test_momentum_is_a_share(momentum):
    with pytest.raises(ValueError, match=f"momentum={momentum} must be a number from 0 to 1"):
        build(momentum=momentum)
    assert [build(momentum=share).momentum for share in (0, 1)] == [0, 1]


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="negatives=10 .* between 1 and the 9 others"):
        build(negatives=10)
    with pytest.raises(ValueError, match="temperature=0"):
        build(temperature=0)
    assert build().negatives == 9
