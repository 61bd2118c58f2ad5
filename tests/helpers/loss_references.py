"""Numerical references of the losses, from the folder beside the repository."""

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor


def reference_cases(shared: Path, name: str) -> Iterator[tuple[str, dict, dict[str, Tensor]]]:
    """Each case's name, hyper-parameters and tensors (``in.f_s0``, ``param.*``, ``out.loss``, ``grad.f_s0``, ...)."""
    with safe_open(shared / "fixtures" / f"{name}-a.safetensors", "pt") as f:
        tensors = {key: f.get_tensor(key) for key in f.keys()}
        for case, meta in json.loads(f.metadata()["cases"]).items():
            prefix = f"{case}."
            yield case, meta, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
