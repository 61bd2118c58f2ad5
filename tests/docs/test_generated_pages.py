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
