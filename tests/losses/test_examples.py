"""The examples in the docstrings of the losses run as they are."""

import doctest
import importlib
import pkgutil

import pytest

import coss_hf.losses
from coss_hf.losses.registry import LOSSES

MODULES = [module.name for module in pkgutil.iter_modules(coss_hf.losses.__path__, "coss_hf.losses.")]


def examples() -> dict[str, doctest.DocTest]:
    finder = doctest.DocTestFinder()
    found = [test for name in MODULES for test in finder.find(importlib.import_module(name), globs={})]
    return {test.name: test for test in found if test.examples}


EXAMPLES = examples()


def test_every_loss_has_an_example():
    classes = [*LOSSES.values(), coss_hf.losses.DistillationLoss]
    assert {loss.__name__ for loss in classes} <= {name.rsplit(".")[-1] for name in EXAMPLES}


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_docstring_example_runs(name):
    runner = doctest.DocTestRunner()
    runner.run(EXAMPLES[name])
    assert runner.tries and not runner.failures
