"""Packages whose public names are imported on first use: a module needs no dependencies but its own."""

import importlib
from collections.abc import Callable


def lazy_names(package: str, homes: dict[str, str]) -> Callable[[str], object]:
    """The ``__getattr__`` of a package that offers names of its modules.

    Args:
        package: the package's ``__name__``.
        homes: the module that defines each public name, relative to the package.
    """

    def __getattr__(name: str):
        if name in homes:
            return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__
