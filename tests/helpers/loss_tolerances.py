"""How closely a loss must follow its numerical reference."""

import torch
from torch import Tensor

DTYPES = [torch.float64, torch.float32]
# Relative for values, of the largest gradient entry of a case for gradients.
TOLERANCES = {torch.float64: (1e-9, 1e-8), torch.float32: (1e-5, 1e-4)}


def assert_values(got: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype, case: str) -> None:
    """Each expected value is among those given, and equal to it."""
    for name, value in expected.items():
        assert got[name].dtype == dtype, (case, name)
        difference = (got[name].detach().double() - value).abs().max()
        assert difference <= TOLERANCES[dtype][0] * value.abs().max(), (case, name, difference)


def assert_gradients(got: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype, case: str) -> None:
    """The same tensors have gradients, and equal ones."""
    assert got.keys() == expected.keys(), case
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        difference = (got[name].double() - gradient).abs().max()
        assert difference <= TOLERANCES[dtype][1] * scale, (case, name, difference / scale)
