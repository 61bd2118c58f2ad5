"""Functions, networks and objects are told apart by what they do."""

import functools
import sys
import types

import torch
from torch import nn

from coss_hf.utils.code_identity import code_identity


def all_differ(*values) -> bool:
    return len({code_identity(value) for value in values}) == len(values)


def test_two_functions_of_one_line_differ():
    first, second, same = (lambda o: o[:, 0]), (lambda o: o.mean(1)), (lambda o: o[:, 0])
    assert all_differ(first, second) and code_identity(first) == code_identity(same)


def scaled(factor):
    return lambda o: o * factor


def power(x, exponent):
    return x**exponent


class Crop:
    def __init__(self, side):
        self.side = side

    def __call__(self, image):
        return image[: self.side]


def test_values_that_code_closes_over_or_holds_differ():
    assert all_differ(scaled(1), scaled(2), scaled(torch.ones(2)), scaled(torch.zeros(2)))
    assert all_differ(functools.partial(power, exponent=1), functools.partial(power, exponent=2))
    assert all_differ(Crop(8), Crop(9), Crop(8).__call__, [Crop(8), Crop(9)])
    assert code_identity(Crop(8)) == code_identity(Crop(8))


def module_of(text: str) -> types.ModuleType:
    """A user's module of the name `augmentations`."""
    module = types.ModuleType("augmentations")
    sys.modules["augmentations"] = module
    exec(text, vars(module))
    return module


def test_globals_helpers_and_base_classes_of_a_users_module_differ():
    """Each has the same name in the same module."""
    text = """
SIDE = 8
def helper(x): return x[:SIDE]
def transform(x): return helper(x)
class Base:
    def step(self, x): return helper(x) + 1
class Own(Base):
    def __call__(self, x): return self.step(x)
"""
    texts = [text, text.replace("SIDE = 8", "SIDE = 9"), text.replace("x[:SIDE]", "x[SIDE:]")]
    functions = [module_of(text).transform for text in texts]
    objects = [module_of(text).Own() for text in (*texts, text.replace("+ 1", "+ 2"))]
    assert all_differ(*functions) and all_differ(*objects)
    assert code_identity(module_of("# a comment" + text).transform) == code_identity(functions[0])


class Net(nn.Module):
    def __init__(self, activation=nn.ReLU, scale=1.0):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), activation())
        self.scale = scale

    def forward(self, x):
        return self.body(x) * self.scale


class Edited(Net):
    def forward(self, x):
        return self.body(x) + self.scale


Edited.__qualname__ = Edited.__name__ = "Net"


def test_networks_of_equal_weights_differ_by_layers_options_forward_and_hooks():
    hooked, patched = Net(), Net()
    hooked.body.register_forward_hook(lambda module, inputs, output: output + 1)
    patched.forward = types.MethodType(lambda self, x: self.body(x), patched)
    assert all_differ(Net(), Net(nn.GELU), Net(scale=2.0), Edited(), hooked, patched)
    assert code_identity(Net()) == code_identity(Net().train().double())
