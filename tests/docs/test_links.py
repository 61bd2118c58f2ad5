"""Links inside the documentation lead to files and headings that exist."""

import re

import pytest

import tests.helpers.documents as d

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub and MyST make them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", d.PAGES, ids=lambda page: str(page.relative_to(d.ROOT)))
def test_links_lead_somewhere(page):
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if target.startswith(("https://", "http://", "data:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text()), target


def test_every_page_is_reached():
    listed = (d.ROOT / "docs" / "index.md").read_text()
    for page in (d.ROOT / "docs").rglob("*.md"):
        name = str(page.relative_to(d.ROOT / "docs").with_suffix(""))
        if name not in ("index", "README") and not name.startswith(("methods/", "api/", "_build/")):
            assert f"\n{name}\n" in listed, name
