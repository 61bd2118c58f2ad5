"""Draw the kept help pages anew: ``python -m coss_hf.cli.pages``, after an option was changed."""

import importlib.util
from types import ModuleType

from coss_hf.cli.help import PAGES, render
from coss_hf.cli.main import COMMANDS, recipe_path


def pages() -> dict[str, str]:
    """The page of each command, by its name."""
    found = {}
    for command in COMMANDS:
        if command == "env":
            continue
        recipe = load_recipe(command)
        if hasattr(recipe, "ARGUMENTS"):
            found[command] = render(command, recipe.__doc__, recipe.ARGUMENTS)
        else:
            found[command] = recipe.build_parser().format_help()
    return found


def load_recipe(command: str) -> ModuleType:
    """The module of a recipe, which is not run."""
    specification = importlib.util.spec_from_file_location(f"recipe_{command}", recipe_path(command))
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


if __name__ == "__main__":
    PAGES.mkdir(exist_ok=True)
    for name, page in pages().items():
        (PAGES / f"{name}.txt").write_text(page)
