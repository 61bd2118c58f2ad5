"""What the pages take from results and docstrings is what these say now."""

import importlib.util

import pytest

from tests.helpers.runs import ROOT


@pytest.fixture(scope="module")
def generate():
    specification = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_pages_are_up_to_date(generate):
    for path, text in generate.pages().items():
        assert path.is_file() and path.read_text() == text, f"{path.relative_to(ROOT)}: run python docs/generate.py"


def test_no_page_of_a_method_that_is_gone(generate):
    pages = {path.stem for path in (ROOT / "docs" / "methods").glob("*.md")}
    assert pages == {*generate.own_losses()}


def test_every_section_of_a_method_says_something(generate):
    for name in generate.own_losses():
        page = generate.method_page(name)
        parts = [part.split("\n", 1)[1].strip() for part in page.split("\n## ")[1:]]
        assert len(parts) == 7 and all(parts), name


def test_photographs_are_compared_at_equal_images_seen(generate, monkeypatch):
    """With runs of two lengths each row was paired with both, and a row of one seed had an infinite interval."""

    def row(method, settings, seed, seen, value, split="test"):
        found = {"student": "resnet18", "method": method, "settings": settings, "seed": seed, "split": split}
        return found | {"images_seen": seen, "num_images": seen, "knn20": value, "linear": value}

    rows = [row("coss", "new", seed, 100, 0.5, "validation") for seed in (1, 2, 3)]
    for seed in (1, 2, 3):
        rows += [row("coss", "new", seed, seen, 0.5 + seen / 1000) for seen in (100, 200)]
        rows += [row("cosine alone", "new", seed, 200, 0.4), row("coss", "old", seed, 100, 0.3)]
        rows.append(row("random weights", "", seed, 0, 0.1))
    rows.append(row("initial weights", "", 1, 0, 0.2))
    monkeypatch.setattr(generate, "json_lines", lambda name: rows)
    found = [[cell.strip() for cell in line.split("|")[2:6]] for line in generate.photographs_paired().splitlines()[2:]]
    assert found == [
        ["100", "coss (old)", "3", "+30.0 ± 0.0"],
        ["100", "random weights", "3", "+50.0 ± 0.0"],
        ["100", "initial weights", "3", "+40.0 ± 0.0"],
        ["200", "cosine alone", "3", "+30.0 ± 0.0"],
        ["200", "random weights", "3", "+60.0 ± 0.0"],
        ["200", "initial weights", "3", "+50.0 ± 0.0"],
    ]
