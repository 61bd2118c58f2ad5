"""Imports of installed packages, and which extra installs one that is missing."""

import importlib
import importlib.util
import sys
from types import ModuleType

# By package: the extra of `setup.py` that brings it.
EXTRAS = {
    "executorch": "executorch",
    "matplotlib": "plots",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "openvino": "openvino",
    "sklearn": "quickstart",
    "tensorboard": "tensorboard",
    "timm": "timm",
    "trackio": "trackio",
}


class MissingPackage(ValueError):
    """A package of an extra is not installed; the message names the extra."""


def is_installed(name: str) -> bool:
    """Whether a package can be imported; it is not imported.

    Example:
        >>> is_installed("json"), is_installed("no_such_package")
        (True, False)
    """
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # it is loaded, by other means than an import
        return True
    # A folder of that name in the working directory, such as onnx/, has no origin.
    return spec is not None and spec.origin is not None


def check_extra(*names: str, needed_by: str) -> None:
    """Check that packages of an extra are installed.

    Args:
        names: of the packages, as they are imported; see ``EXTRAS``.
        needed_by: what needs them, as the beginning of the message: an argument and its value.

    Raises:
        MissingPackage: one is not installed.

    Example:
        >>> check_extra("json", needed_by="--log_format=json")
    """
    for name in names:
        if not is_installed(name):
            raise MissingPackage(f"{needed_by} needs {name}, which is not installed: {how_to_install(name)}.")


def how_to_install(name: str) -> str:
    """The command that installs a package of an extra: ``pip install 'coss-hf[timm]'``.

    Where this package is installed, from a clone or from an index, pip keeps it and adds what the extra names.
    """
    return f"pip install 'coss-hf[{EXTRAS[name]}]'" if name in EXTRAS else f"pip install {name}"


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
