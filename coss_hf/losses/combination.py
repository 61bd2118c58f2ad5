"""Several methods at once, and the text that names them."""

import contextlib
import re
from typing import NamedTuple

from torch import Tensor, nn

from coss_hf.features import Features

_METHOD = re.compile(r"([^+()]+)(?:\(([^()]*)\))?")
_PLUS_OUTSIDE_OF_PARENTHESES = re.compile(r"\+(?![^(]*\))")
_WORDS = {
    "true": True,
    "yes": True,
    "on": True,
    "false": False,
    "no": False,
    "off": False,
    "null": None,
    "none": None,
    "": None,
}


class Method(NamedTuple):
    """A method by its name, with the options that differ from its defaults."""

    name: str
    options: dict

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}({options})" if options else self.name


def parse_methods(text: str) -> list[Method]:
    """Read the methods of a text such as ``coss``, ``coss+rkd`` or ``seed + coss(lambda_co=0, beta=2)``.

    Raises:
        ValueError: A text that cannot be read, or a method that is named twice.
    """
    methods = []
    for part in _PLUS_OUTSIDE_OF_PARENTHESES.split(text):
        method = _method(part.strip())
        if method is None:
            raise ValueError(
                f"--method={text!r}: {part.strip()!r} cannot be read; write coss, coss+rkd or coss(lambda_ss=0.5)+rkd."
            )
        methods.append(method)
    names = {method.name for method in methods}
    if len(names) < len(methods):
        raise ValueError(f"--method={text!r} names a method twice; give it once, with its beta.")
    return methods


def _method(part: str) -> Method | None:
    """Read one method, or return None."""
    match = _METHOD.fullmatch(part)
    if match is None:
        return None
    options = {}
    for pair in (match[2] or "").split(","):
        if not pair.strip():
            continue
        key, equals, value = pair.partition("=")
        if not equals:
            return None
        options[key.strip()] = value
    return Method(match[1].strip(), {key: _value(value) for key, value in options.items()})


def _value(text: str) -> bool | int | float | str | None:
    """What an option's text says: a word for true, false or nothing, a number, or text, in quotes or not."""
    text = text.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    return text[1:-1] if text[0] == text[-1] and text[0] in "'\"" else text


class SumLoss(nn.Module):
    """The sum of several losses, each scaled by its own ``beta``.

    Args:
        losses: Losses by the name of their method.

    Returns (when called): ``loss``, and the value and the parts of each loss by the name of its
    method: ``rkd``, ``rkd_loss_angle``, ...

    Example:
        >>> import torch
        >>> from coss_hf.features import Features
        >>> from coss_hf.losses.combination import SumLoss
        >>> from coss_hf.losses.coss import CoSSLoss
        >>> from coss_hf.losses.pkt import PKTLoss
        >>> loss = SumLoss({"coss": CoSSLoss(beta=2.0), "pkt": PKTLoss()})
        >>> same = Features(torch.eye(2))
        >>> {name: value.item() for name, value in loss(same, same).items()}
        {'loss': -4.0, 'coss': -4.0, 'coss_l_co': -1.0, 'coss_l_ss': -1.0, 'pkt': 0.0}
    """

    def __init__(self, losses: dict[str, nn.Module]):
        super().__init__()
        self.losses = nn.ModuleDict(losses)

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        total = 0
        result = {"loss": total}
        for name, criterion in self.losses.items():
            for key, value in criterion(student, teacher, index).items():
                if key == "loss":
                    total = total + value
                    result[name] = value
                else:
                    result[f"{name}_{key}"] = value
        result["loss"] = total
        return result
