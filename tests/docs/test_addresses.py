"""Addresses of other sites, as far as they can be checked without a network; `make linkcheck` asks the sites."""

import re

import pytest
import yaml

import tests.helpers.documents as d

ADDRESS = re.compile(r"https?://[^\s)>\"'`\]}]+")
FILES = [
    *d.PAGES,
    *(d.ROOT / name for name in ("CITATION.cff", ".pre-commit-config.yaml", "setup.py")),
    *sorted((d.ROOT / "coss_hf" / "losses").glob("*.py")),
    *sorted((d.ROOT / "coss_hf" / "evaluation").glob("*.py")),
]
FORMS = {
    "arxiv.org": r"/abs/\d{4}\.\d{4,5}",
    "github.com": r"/[\w-]+/[\w.-]+(/.*)?",
    "huggingface.co": r"(/.*)?",
    "keepachangelog.com": r"/en/\d\.\d\.\d/",
    "nlp.stanford.edu": r"/IR-book/",
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(d.ROOT)))
def test_addresses_have_the_form_of_their_site(path):
    for address in ADDRESS.findall(path.read_text()):
        if "{" in address:
            continue  # filled in by the code
        host, _, place = address.rstrip(".,").removeprefix("https://").partition("/")
        assert address.startswith("https://") and host in FORMS, f"{address}: add the form of its addresses here"
        assert re.fullmatch(FORMS[host], f"/{place}"), address


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(d.ROOT)))
def test_identifiers_of_papers_have_a_month(path):
    for month in re.findall(r"arXiv[: ](?:abs/)?\d\d(\d\d)\.\d{4,5}\b", path.read_text()):
        assert 1 <= int(month) <= 12


def test_no_address_of_the_repository_is_invented():
    """There is none yet: readers are told to install in a clone."""
    for path in [*sorted((d.ROOT / "docs").rglob("*.md")), d.ROOT / "README.md", d.ROOT / "setup.py"]:
        assert not re.search(r"git clone|ADDRESS-OF", path.read_text()), path


def test_the_workflow_checks_links_apart_from_the_tests():
    jobs = yaml.safe_load((d.ROOT / ".github" / "workflows" / "tests.yml").read_text())["jobs"]
    assert jobs["links"]["continue-on-error"] is True and "continue-on-error" not in jobs["tests"]
    assert jobs["links"]["steps"][-1]["run"] == "make linkcheck"
