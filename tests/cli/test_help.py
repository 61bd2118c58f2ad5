"""`--help`: kept pages that say what the options are, at once."""

import re
import subprocess
import sys

import pytest

from coss_hf.cli.help import PAGES, as_launched, render
from coss_hf.cli.main import COMMANDS
from coss_hf.cli.options import GROUPS, LAUNCHED, NOT_OFFERED, NOT_READ
from coss_hf.cli.pages import load_recipe, pages
from coss_hf.cli.parser import parse
from coss_hf.cli.shipped import find_yaml, folder
from tests.helpers.runs import ROOT

# Of what imports take seconds.
HEAVY = {"torch", "transformers", "datasets", "accelerate", "numpy"}


def options(page: str) -> list[str]:
    return [line.split()[0] for line in page.splitlines() if line.startswith("  --")]


def test_kept_pages_are_up_to_date():
    for command, page in pages().items():
        kept = (PAGES / f"{command}.txt").read_text()
        assert kept.split() == page.split(), f"{command}: run python -m coss_hf.cli.pages"


def test_every_command_has_one():
    assert {path.stem for path in PAGES.glob("*.txt")} == {*COMMANDS} - {"env"}


def test_distill_shows_what_a_new_user_needs():
    page = (PAGES / "distill.txt").read_text()
    assert len(options(page)) <= 45
    titles = [line[:-1] for line in page.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == [*GROUPS]
    assert "  --teacher VALUE                 Hub name" in page and "coss-hf distill --teacher google" in page
    assert "  --bf16                          Train" in page and "Default: 50." in page
    assert "Default: false" not in page and "Default: see --settings." in page


def test_all_options_but_those_of_no_use():
    distill = load_recipe("distill")
    page = render("distill", distill.__doc__, distill.ARGUMENTS, everything=True)
    shown = {option.removeprefix("--") for option in options(page)}
    assert {"teacher", "adam_beta1", "hub_private_repo", "config"} < shown and not shown & NOT_OFFERED
    assert len(shown) == len(options(page)), "each once"


def test_help_all_lists_them(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipes/distill.py", "--help_all"])
    with pytest.raises(SystemExit) as stop:
        parse(load_recipe("distill").ARGUMENTS)
    assert stop.value.code == 0 and "--adam_beta1 NUMBER" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["-m", "coss_hf", "distill"], ["recipes/distill.py"], ["recipes/push.py"]])
def test_help_needs_none_of_the_imports_that_take_seconds(words):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and done.stdout.startswith("usage: ") and not imported & HEAVY


def test_processes_are_options_of_the_command_alone(monkeypatch, capsys):
    """They were in no page; a script of a clone does not take them, it is launched by accelerate."""
    for command in COMMANDS:
        if command != "env":
            page = (PAGES / f"{command}.txt").read_text()
            assert ("  --num_processes N" in page and "  --accelerate_config FILE" in page) == (command in LAUNCHED)
    page = (PAGES / "distill.txt").read_text()
    monkeypatch.setenv("COSS_HF_COMMAND", "coss-hf distill")
    assert as_launched(page, "distill") == page
    monkeypatch.setenv("COSS_HF_COMMAND", "")
    monkeypatch.setattr(sys, "argv", ["recipes/distill.py"])
    shown = as_launched(page, "distill")
    assert "  --num_processes" not in shown and "  --accelerate_config" not in shown
    assert set(options(page)) - set(options(shown)) == {"--num_processes", "--accelerate_config"}
    assert shown.count("\n\n") == page.count("\n\n") and "python recipes/distill.py --teacher" in shown


def test_pages_list_no_option_that_their_command_does_not_read():
    """`neighbors --help` offered a student, `compare --help` a method, which it refuses."""
    for command, names in NOT_READ.items():
        recipe = load_recipe(command)
        known = {name for kind in recipe.ARGUMENTS for name in kind.__dataclass_fields__}
        page = render(command, recipe.__doc__, recipe.ARGUMENTS, everything=True)
        shown = {option.removeprefix("--") for option in options(page)}
        assert not shown & {*names} and {*names} <= known


def test_examples_name_configurations_that_come_with_the_package():
    """A path of a clone is not there after `pip install`."""
    for command in COMMANDS:
        if command != "env":
            named = re.findall(r"--config (\S+)", (PAGES / f"{command}.txt").read_text())
            assert all(find_yaml(name, folder("recipes") / "configs", "--config") for name in named if name != "FILE")
            assert not any("/" in name for name in named)
