"""Runs a loss on the tensors of a reference case, and what every loss of maps must do."""

import torch
from torch import Tensor, nn

from coss_hf.features import Features
from tests.helpers import loss_tolerances as comparing
from tests.helpers.loss_tolerances import TOLERANCES

WITHOUT_REFERENCE = ("running_mean", "running_var", "num_batches_tracked")


def features(tensors: list[Tensor]) -> Features:
    """Maps, or one embedding where the tensor is ``(b, d)``; the embedding beside maps is one that nobody may read."""
    if tensors[0].dim() == 2:
        return Features(tensors[0])
    return Features(torch.full((len(tensors[0]), 1), torch.nan), tuple(tensors))


def maps(x: dict[str, Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Student's and teacher's tensors of a case."""
    sides = ([x[key] for key in sorted(x) if key.startswith(f"in.f_{side}")] for side in "st")
    return tuple([tensor.to(dtype).requires_grad_() for tensor in side] for side in sides)


def load(loss: nn.Module, x: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """The loss with the weights of a case; all of them, but for running statistics."""
    weights = {key.removeprefix("param."): value for key, value in x.items() if key.startswith("param.")}
    missing, unexpected = loss.load_state_dict(weights, strict=False)
    assert not unexpected and not [key for key in missing if not key.endswith(WITHOUT_REFERENCE)]
    return loss.to(dtype).train()


def assert_gradients(got: dict[str, Tensor | None], x: dict[str, Tensor], prefix: str = "grad.") -> None:
    """``got``, by the names of the case, are its gradients, all of them."""
    expected = {key.removeprefix(prefix): value for key, value in x.items() if key.startswith(prefix)}
    found = {name: gradient for name, gradient in got.items() if gradient is not None}
    comparing.assert_gradients(found, expected, next(iter(found.values())).dtype, prefix)


def assert_reference(loss: nn.Module, x: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Values, gradients of inputs and parameters, and none for the teacher; returns what the loss returned."""
    s, t = maps(x, dtype)
    load(loss, x, dtype)
    out = loss(features(s), features(t))
    out["loss"].backward()
    for key, value in out.items():
        assert value.dtype == dtype and value.shape == ()
        torch.testing.assert_close(value.double(), x[f"out.{key}"], rtol=TOLERANCES[dtype][0], atol=0, msg=key)
    got = {f"in.f_s{i}": tensor.grad for i, tensor in enumerate(s)}
    assert_gradients(got | {f"param.{name}": p.grad for name, p in loss.named_parameters()}, x)
    assert all(tensor.grad is None for tensor in t)
    return out


def assert_full_precision_under_autocast(loss: nn.Module, s: list[Tensor], t: list[Tensor]) -> None:
    """bfloat16 maps under autocast: the loss of their float32 copies, and gradients of each tensor's own type."""
    s, t = ([tensor.bfloat16().requires_grad_() for tensor in side] for side in (s, t))
    expected = loss(features([x.float() for x in s]), features([x.float() for x in t]))["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(features(s), features(t))["loss"]
    got.backward()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert any(x.grad is not None for x in s) and all(x.grad is None for x in t)
    assert all(p.grad.dtype == torch.float32 for p in loss.parameters() if p.grad is not None)


def draw(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
