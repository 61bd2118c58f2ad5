"""`--help`: kept pages that say what the options are, at once."""

import subprocess
import sys

import pytest

from coss_hf.cli.help import PAGES, render
from coss_hf.cli.main import COMMANDS
from coss_hf.cli.options import GROUPS, NOT_OFFERED
from coss_hf.cli.pages import load_recipe, pages
from coss_hf.cli.parser import parse
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
