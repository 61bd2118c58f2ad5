"""Files of JSON lines that a benchmark adds to, one line a run, and resumes from."""

import json
from pathlib import Path


def read_lines(path: Path) -> list[dict]:
    """Return the rows of a file; empty where there is none.

    A last line that was cut short is removed, so that its run is repeated.
    """
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def add_line(path: Path, row: dict) -> None:
    """Write a row at the end of a file."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
