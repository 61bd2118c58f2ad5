"""Files that come with the package: recipes, their YAML files, configurations of accelerate."""

import importlib.util
from pathlib import Path

# Where they lie in a clone that is imported without being installed.
CLONE = Path(__file__).parents[2]


def folder(name: str) -> Path:
    """Folder of ``recipes`` or ``accelerate_configs``: in the installed package, or in the clone."""
    found = importlib.util.find_spec(f"coss_hf.{name}")
    if found is not None and found.submodule_search_locations:
        return Path(next(iter(found.submodule_search_locations)))
    return CLONE / name


def find_yaml(name: str, where: Path, argument: str) -> Path:
    """A YAML file: a path, or the name of one that comes with the package.

    Args:
        name: path or name, such as ``multi_gpu``.
        where: folder of the files that come with the package.
        argument: the command-line flag that errors name.

    Raises:
        ValueError: there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    found = where / f"{name.removesuffix('.yaml')}.yaml"
    if not name or not found.is_file():
        names = ", ".join(sorted(path.stem for path in where.glob("*.yaml")))
        raise ValueError(f"{argument} {name}: no such file; give a file, or one of {names}.")
    return found
