"""The documentation site: ``make docs``."""

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from coss_hf import __version__  # noqa: E402

project = "coss_hf"
author = "The coss_hf authors"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "README.md"]  # index.md includes README.md, which GitHub shows for the folder
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_custom_sections = [("Returns (when called)", "returns_style")]
napoleon_use_ivar = True

# Of `make linkcheck`: pages of the Hub that need a login, and examples that nobody made.
linkcheck_ignore = [r"https://huggingface\.co/(?:USER|datasets/USER)"]
linkcheck_timeout = 30

html_theme = "furo"
html_title = "coss_hf"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#12805c", "color-brand-content": "#12805c"},
    "dark_css_variables": {"color-brand-primary": "#4fc79a", "color-brand-content": "#4fc79a"},
}

# A link to a file outside of docs/, which GitHub follows and the site cannot: the site shows its path.
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(((?:\.\./)+[^)#]+)\)")


def _paths_of_outside_files(app, docname: str, content: list[str]) -> None:
    def replaced(found: re.Match) -> str:
        target = (HERE / docname).parent.joinpath(found[1]).resolve()
        return found[0] if HERE in target.parents else f"`{target.relative_to(HERE.parent)}`"

    content[0] = LINK.sub(replaced, content[0])


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _paths_of_outside_files)
