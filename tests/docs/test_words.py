"""Plain English in what a user reads: help, errors, log lines, docstrings and pages."""

import ast
import dataclasses
import re
import tokenize

import tests.helpers.documents as d
from coss_hf.cli.help import PAGES as HELP_PAGES
from coss_hf.cli.help import own_help
from coss_hf.cli.main import COMMANDS
from coss_hf.cli.options import SENTENCES
from coss_hf.cli.pages import load_recipe

# What is not written, and what is written instead.
BANNED = {
    r"\brooms?\b(?! for)": "module, package; free space",
    r"\bwatch(?:es|ed|ing)?\b": "evaluate, evaluation",
    r"(?<!--)\bpanels?\b(?!\.)(?! \d)": "evaluation, diagnostics",
    r"\bfinished cells?\b|\bcells? of (?:a|the) study\b": "trial",
    r"\bcontrols\b": "baselines",
    r"\brests\b": "totals of the other micro-batches",
    r"\bsuspects?\b": "unchecked",
    r"\bstandby\b": "unsharded copy",
    r"\bforgets?\b": "reset",
    r"\b(?:is|are|and|was|were) said\b": "is printed, is reported",
    r"\bstock\b": "`Trainer`'s",
    r"\bwhole\b(?! number)": "full, complete, atomic, unsharded",
    r"(?<!memory )\bbanks?\b": "train features, gallery",
    r"\bgo(?:es)? on\b|\bwent on\b|\bgone on\b": "resume, continue",
    r"\bcannot be(?=[.,;:)]|$)": "is invalid",
    r"\bbeside\b": "next to, together with",
    r"\b(?:images|numbers?|operations|steps|lines|seconds|ms) an? (?:second|device|process|step|epoch|image)\b": "per",
}
SOURCES = [*sorted((d.ROOT / "coss_hf").rglob("*.py")), *sorted((d.ROOT / "recipes").rglob("*.py"))]


def user_texts(source: str) -> list[tuple[int, str]]:
    """Docstrings and all other strings of more than one word, with their lines."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return [(node.lineno, node.value) for node in nodes if isinstance(node.value, str) and " " in node.value.strip()]


def complaints(text: str) -> list[str]:
    """Banned terms in a text, with what to write; code in backticks is left out."""
    text = re.sub(r"`+[^`]*`+", "CODE", " ".join(text.split()))
    found = []
    for pattern, better in BANNED.items():
        for one in re.finditer(pattern, text, re.IGNORECASE):
            around = text[max(0, one.start() - 40) : one.end() + 40]
            found.append(f"{one[0]!r} (write {better}): ...{around}...")
    return found


def test_strings_of_the_code():
    found = []
    for path in SOURCES:
        for line, value in user_texts(path.read_text()):
            found += [f"{path.relative_to(d.ROOT)}:{line}: {text}" for text in complaints(value)]
    assert not found, "\n".join(found)


def test_comments_of_the_code():
    found = []
    for path in SOURCES:
        with path.open("rb") as file:
            comments = [token for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT]
        for comment in comments:
            place = f"{path.relative_to(d.ROOT)}:{comment.start[0]}"
            found += [f"{place}: {text}" for text in complaints(comment.string)]
    assert not found, "\n".join(found)


def test_pages():
    found = []
    for path in d.PAGES:
        prose = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        found += [f"{path.relative_to(d.ROOT)}: {text}" for part in prose.split("\n\n") for text in complaints(part)]
    assert not found, "\n".join(found)


def test_help_pages():
    for page in HELP_PAGES.glob("*.txt"):
        assert not complaints(page.read_text()), page.name


def all_own_help() -> dict[str, str]:
    """Help of all options, by command, but those whose text is that of transformers and that nothing overrides."""
    found = {}
    for command in COMMANDS:
        if command == "env":
            continue
        recipe = load_recipe(command)
        if not hasattr(recipe, "ARGUMENTS"):
            actions = recipe.build_parser()._actions
            found |= {f"{command}: {action.dest}": action.help for action in actions if action.dest != "help"}
            continue
        for kind in recipe.ARGUMENTS:
            own = {name for base in kind.__mro__ if base.__module__.startswith("coss_hf") for name in annotations(base)}
            own |= {*SENTENCES}
            for field in dataclasses.fields(kind):
                if field.init and field.name in own:
                    found[f"{command}: {field.name}"] = own_help(kind, field)
    return found


def annotations(kind: type) -> set[str]:
    return {*kind.__dict__.get("__annotations__", {})}


def test_no_help_is_a_fragment():
    """Of 143 texts 56 had five words or fewer, such as "Of SGD."."""
    fragments = {
        name: text
        for name, text in all_own_help().items()
        if len(text.split()) <= 5 or not text.endswith(".") or text[0] != text[0].upper()
    }
    assert not fragments


def test_help_of_a_command_is_its_own():
    """`coss-hf neighbors --push_to_hub` was shown the sentence of `coss-hf distill`: "Push the finished student"."""
    found = all_own_help()
    assert found["neighbors: push_to_hub"] == "Repository on the Hub to push the dataset to, as USER/NAME."
    assert found["distill: push_to_hub"] == SENTENCES["push_to_hub"]
    assert not [name for name, text in found.items() if text.startswith("Images to train on")]


def test_help_pages_name_commands():
    """`coss-hf push --help` showed `python recipes/push.py`."""
    assert not [page.name for page in HELP_PAGES.glob("*.txt") if "python recipes/" in page.read_text()]


def test_no_page_names_a_folder_of_the_workplace():
    paths = [*d.PAGES, *SOURCES, *(d.ROOT / "recipes" / "configs").glob("*.yaml"), *HELP_PAGES.glob("*.txt")]
    assert not [str(path) for path in paths if "../shared/" in path.read_text()]


def test_the_check_finds_them():
    assert complaints("An interrupted run goes on.") and complaints("2,000 images a second")
    assert complaints("a name that cannot be, and") and not complaints("`whole` cannot be read")
