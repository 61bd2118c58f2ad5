"""A self-contained web page: text escaped, pictures inside, nothing fetched from elsewhere."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --text: #22272e; --muted: #68707a; --line: #d8dce1; --soft: #f4f6f8; --page: #fff;
        --good: #12805c; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --muted: #9aa3ad; --line: #3a414a; --soft: #242a31;
        --page: #1b2026; --good: #4fc79a; --bad: #f2786f } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 66rem;
       margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; line-height: 1.25 } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
p.lead, p.alarm { font-size: 1.1rem; border-left: 4px solid var(--good); padding-left: .8rem; margin: .6rem 0 }
p.alarm { border-color: var(--bad) }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem }
th, td { padding: .3rem .45rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap }
th { color: var(--muted); font-weight: 600; vertical-align: bottom; white-space: normal }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
figure { margin: 1rem 0 } img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 4px }
figcaption, footer { color: var(--muted); font-size: .85rem }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; font-size: .82rem; white-space: pre-wrap;
      overflow-wrap: anywhere }
@media (max-width: 40rem) { body { margin: 1rem auto } h1 { font-size: 1.3rem; overflow-wrap: anywhere }
        .picture { overflow-x: auto } .picture img { max-width: none; width: 42rem } }
@media (prefers-color-scheme: dark) { img { filter: brightness(.88) } }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A complete document.

    Args:
        title: its heading, plain text.
        parts: HTML of the functions below, in order.
    """
    head = f'<meta charset="utf-8"><title>{escape(title)}</title>'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join([f"<h1>{escape(title)}</h1>", *parts])
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, kind: str | None = None) -> str:
    """Plain text; ``kind`` is ``lead`` for a sentence that says it all, ``alarm`` for one of what went wrong."""
    return f"<p{f' class={kind}' if kind else ''}>{escape(text)}</p>"


def code(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def image(path: str | Path, caption: str = "") -> str:
    """A PNG file, kept in the page."""
    data = base64.b64encode(Path(path).read_bytes()).decode()
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    picture = f'<img alt="{escape(caption, quote=True)}" src="data:image/png;base64,{data}">'
    return f'<figure><div class="picture">{picture}</div>{below}</figure>'


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text; the first row is its header, and all columns but the first hold numbers."""
    lines = []
    for number, row in enumerate(rows):
        kind = "td" if number else "th"
        cells = [
            f"<{kind}{' class=number' if column else ''}>{escape(cell)}</{kind}>" for column, cell in enumerate(row)
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'
