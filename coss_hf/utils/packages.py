"""Imports of installed packages."""

import importlib
import sys
from types import ModuleType


def import_installed(name: str) -> ModuleType:
    """Import an installed package, although a script of that name may lie next to the script that runs.

    ``python recipes/distill.py`` puts ``recipes/`` first on the path of imports, where ``recipes/evaluate.py`` would be
    taken for the package ``evaluate``.

    Args:
        name: of the package.

    Raises:
        ImportError: the package is not installed.

    Example:
        >>> import_installed("json").loads("[1]")
        [1]
    """
    loaded = sys.modules.get(name)
    if loaded is not None and hasattr(loaded, "__path__"):
        return loaded
    sys.modules.pop(name, None)
    path = sys.path
    sys.path = path[1:]  # without the folder of the script that runs
    try:
        return importlib.import_module(name)
    finally:
        sys.path = path
