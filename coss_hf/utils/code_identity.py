"""What tells code apart: functions, classes, networks and objects by what they do, not by their names."""

import functools
import hashlib
import re
import sys
import sysconfig
import types
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from torch import Tensor, nn

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_LIBRARIES = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")}
# Of every nn.Module: what does not change its output, or is described in another form.
_OF_MODULES = set(vars(nn.Module())) | {"name_or_path", "argument"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def code_identity(*values, ignored: tuple[str, ...] = ()) -> str:
    """Return a hash of what functions, networks and other objects do.

    It covers the byte code of functions, what they close over, their defaults, the global values and helpers that they
    name, and the attributes and classes of objects; of a network its layers, options and hooks. Code of installed
    packages counts by its name and main version. Weights of a network are left out.

    Args:
        values: any objects.
        ignored: names of attributes of layers that do not change what a network does.

    Example:
        >>> from functools import partial
        >>> code_identity(partial(max, 1)) == code_identity(partial(max, 2))
        False
    """
    description = _Description(ignored)
    for value in values:
        description.add(value)
    return hashlib.blake2b("\n".join(description.parts).encode(), digest_size=8).hexdigest()


def code_entry(name: str, code: str, packages: Sequence[str] = ()) -> dict[str, str]:
    """Return the entry of a run's identity that holds a hash of code, which each version of Python compiles otherwise.

    Args:
        name: of the entry.
        code: the hash; empty where there is no code of one's own, and then there is no entry.
        packages: names of packages on whose versions the hash depends as well.
    """
    if not code:
        return {}
    versions = "".join(f", {package} {version(package)}" for package in packages)
    return {name: f"{code}, Python {sys.version_info.major}.{sys.version_info.minor}{versions}"}


def is_of_another_python(first: str | None, second: str | None) -> bool:
    """Whether two values of ``code_entry`` cannot be compared: their versions differ."""
    return bool(first and second) and first.partition(", ")[2] != second.partition(", ")[2]


def without_addresses(text: str) -> str:
    """Return what ``repr`` says of an object without its place in memory, which differs from process to process.

    Example:
        >>> without_addresses("<Crop object at 0x7f12ab>")
        '<Crop object>'
    """
    return _ADDRESS.sub("", text)


class _Description:
    """Texts that describe objects; each object once."""

    def __init__(self, ignored: tuple[str, ...] = ()):
        self.parts: list[str] = []
        self._ignored = _OF_MODULES.union(ignored)
        self._seen: dict[int, object] = {}  # keeps them, so that no number comes twice
        self._kinds = (
            ((bool, int, float, complex, str, bytes, type(None)), self._plain),
            (types.FunctionType, self._function),
            (types.CodeType, self._code),
            (types.MethodType, lambda value: self._all("method", [value.__func__, value.__self__])),
            (functools.partial, lambda value: self._all("partial", [value.func, value.args, value.keywords])),
            ((staticmethod, classmethod), lambda value: self._all("method", [value.__func__])),
            (property, lambda value: self._all("property", [value.fget])),
            (types.ModuleType, self._module),
            (type, self._class),
            ((list, tuple), lambda value: self._all(f"{type(value).__name__} {len(value)}", value)),
            ((set, frozenset), lambda value: self._all("set", sorted(value, key=repr))),
            (dict, self._dict),
            (Tensor, lambda value: self._all(str(value.dtype), [value.detach().cpu().double().numpy()])),
            (np.ndarray, self._array),
            (nn.Module, self._network),
        )

    def add(self, value) -> None:
        """Describe an object."""
        describe = next((describe for kind, describe in self._kinds if isinstance(value, kind)), self._object)
        if describe != self._plain:
            if id(value) in self._seen:
                return
            self._seen[id(value)] = value
        try:
            describe(value)
        except Exception as error:  # attributes of any origin
            self.parts.append(type(error).__name__)

    def _all(self, kind: str, values) -> None:
        self.parts.append(kind)
        for value in values:
            self.add(value)

    def _plain(self, value) -> None:
        self.parts.append(f"{type(value).__name__} {value!r}")

    def _dict(self, value: dict) -> None:
        for key, entry in value.items():
            self.add(key)
            self.add(entry)

    def _array(self, value: np.ndarray) -> None:
        digest = hashlib.blake2b(np.ascontiguousarray(value).tobytes(), digest_size=8).hexdigest()
        self.parts.append(f"{value.dtype} {value.shape} {digest}")

    def _function(self, value) -> None:
        if _is_installed(value.__module__):
            self.parts.append(_installed(value))
            return
        self.add(value.__code__)
        self._all("defaults", [value.__defaults__, value.__kwdefaults__])
        for cell in value.__closure__ or ():
            self.add(_content(cell))
        for name in sorted(_names(value.__code__)):
            if name in value.__globals__:
                self._all(f"global {name}", [value.__globals__[name]])

    def _code(self, code: types.CodeType) -> None:
        """Not the source text: two lambdas may share a line, and a comment changes nothing."""
        self.parts.append(f"{code.co_code.hex()} {code.co_names} {code.co_varnames}")
        self.add(code.co_consts)

    def _module(self, value: types.ModuleType) -> None:
        self.parts.append(value.__name__)
        if not _is_installed(value.__name__) and getattr(value, "__file__", None):
            self.parts.append(Path(value.__file__).read_text())

    def _class(self, value: type) -> None:
        self.parts.append(_installed(value))
        if _is_installed(value.__module__):
            return
        for base in value.__bases__:
            self.add(base)
        for name, entry in sorted(vars(value).items()):
            # What Python keeps there by other names is none of its code, and may come later, as __slotnames__ does.
            if not name.startswith("__") or isinstance(entry, (types.FunctionType, staticmethod, classmethod)):
                self._all(name, [entry])

    def _network(self, value: nn.Module) -> None:
        self.parts.append(without_addresses(repr(value)))
        for name, module in value.named_modules():
            self._all(f"layer {name}", [type(module)])
            if isinstance(getattr(module, "code", None), str):  # of TorchScript, and of torch.fx
                self.parts.append(module.code)
            for hooks in _HOOKS:
                self._all(hooks, getattr(module, hooks, {}).values())
            for buffer in sorted(getattr(module, "_non_persistent_buffers_set", ())):
                self.add(module._buffers[buffer])
            for key, entry in sorted(vars(module).items()):
                if key not in self._ignored and _is_option(module, entry):
                    self._all(key, [entry])

    def _object(self, value) -> None:
        self.add(type(value))
        if callable(value) or not _is_installed(type(value).__module__):
            self._dict(dict(sorted(getattr(value, "__dict__", {}).items())))
        self.parts.append(without_addresses(repr(value)))


def _is_option(module: nn.Module, value) -> bool:
    """Whether an attribute of a layer may decide what it does: of a layer of one's own any, else plain values."""
    if isinstance(value, (bool, int, float, str, types.FunctionType, types.MethodType)):
        return True
    return not isinstance(value, nn.Module) and not _is_installed(type(module).__module__)


def _names(code: types.CodeType) -> set[str]:
    """Names that a function reads from its module, and those of the functions within."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*inner)


def _content(cell):
    try:
        return cell.cell_contents
    except ValueError:  # not set yet
        return None


@functools.cache
def _is_installed(module: str | None) -> bool:
    """Whether a module comes with Python or a package, of which the version tells what it does."""
    root = (module or "__main__").partition(".")[0]
    if root == "__main__":
        return False
    if root in sys.stdlib_module_names or root == "coss_hf":
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is not None and any(folder in Path(file).resolve().parents for folder in _LIBRARIES)


def _installed(value) -> str:
    module = getattr(value, "__module__", None) or "builtins"
    version = str(getattr(sys.modules.get(module.partition(".")[0]), "__version__", ""))
    main = version.partition(".")[0] if _is_installed(module) else ""
    return f"{module}.{getattr(value, '__qualname__', value)} {main}"
