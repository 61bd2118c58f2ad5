"""Several methods at once, and the words that name them."""

import contextlib
import re
from typing import NamedTuple

import yaml
from torch import Tensor, nn

from coss_hf.features import Features

_METHOD = re.compile(r"([^+()]+)(?:\(([^()]*)\))?")


class Method(NamedTuple):
    """A method by name, with what differs from its defaults."""

    name: str
    options: dict

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}({options})" if options else self.name


def parse_methods(text: str) -> list[Method]:
    """``coss``, ``coss+rkd`` or ``seed + coss(lambda_co=0, beta=2)``.

    Raises:
        ValueError: anything else, or a method named twice.
    """
    methods = []
    for part in re.split(r"\+(?![^(]*\))", text):
        match = _METHOD.fullmatch(part.strip())
        pairs = [pair.partition("=") for pair in (match[2] or "").split(",") if pair.strip()] if match else []
        if match is None or not all(equals for _, equals, _ in pairs):
            raise ValueError(
                f"--method={text!r}: {part.strip()!r} cannot be read; write coss, coss+rkd or coss(lambda_ss=0.5)+rkd."
            )
        methods.append(Method(match[1].strip(), {key.strip(): _value(value) for key, _, value in pairs}))
    names = [method.name for method in methods]
    if len(set(names)) < len(names):
        raise ValueError(f"--method={text!r} names a method twice; give it once, with its beta.")
    return methods


def _value(text: str):
    value = yaml.safe_load(text)
    if isinstance(value, str):
        # YAML takes 1e-3 for a word.
        with contextlib.suppress(ValueError):
            return float(value)
    return value


class OfLastMap(nn.Module):
    """A loss of the last map alone."""

    def __init__(self, criterion: nn.Module):
        super().__init__()
        self.criterion = criterion

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        return self.criterion(*(x._replace(maps=x.maps[-1:]) for x in (student, teacher)), index)


class SumLoss(nn.Module):
    """The sum of several losses, each scaled by its own ``beta``.

    Args:
        losses: by the name of their method.

    Returns, when called as a loss, ``loss`` and each one's own value and parts: ``rkd``, ``rkd_loss_angle``, ...
    """

    def __init__(self, losses: dict[str, nn.Module]):
        super().__init__()
        self.losses = nn.ModuleDict(losses)

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        result = {"loss": 0}
        for name, criterion in self.losses.items():
            parts = criterion(student, teacher, index)
            result["loss"] = result["loss"] + parts["loss"]
            result |= {name if key == "loss" else f"{name}_{key}": value for key, value in parts.items()}
        return result
