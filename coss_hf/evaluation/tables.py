"""Metrics as a table."""

from typing import NamedTuple

from coss_hf.evaluation.diagnostics import overlap_on


class Unit(NamedTuple):
    """How values of a metric are written.

    Attributes:
        factor: what a value is multiplied by.
        digits: number of digits after the point.
        sign: sign of the unit; empty without one.
    """

    factor: int
    digits: int
    sign: str

    def text(self, value: float) -> str:
        """Return a value, or a difference of two, without the sign."""
        return f"{self.factor * value:.{self.digits}f}"

    def axis(self, name: str) -> str:
        """Return the label of an axis that shows the metric called ``name``."""
        return f"{name} ({self.sign})" if self.sign else name


PERCENT = Unit(100, 1, "%")
COSINE = Unit(1, 3, "")


def unit_of(metric: str) -> Unit:
    """Return the unit of a metric: percent, except of the cosine."""
    return COSINE if metric == "cosine" else PERCENT


_percent = PERCENT.text


COLUMNS = {
    "parameters": ("parameters", lambda value: f"{value:,}"),
    "knn10": ("k-NN 10", _percent),
    "knn20": ("k-NN 20", _percent),
    "probe": ("linear probe", _percent),
    "linear": ("linear evaluation", _percent),
    "overlap10": ("overlap 10", _percent),
    "map": ("mAP", _percent),
    "asymmetric_map": ("mAP in the teacher's gallery", _percent),
    "cosine": ("cosine", COSINE.text),
}


def cells(results: dict[str, dict]) -> list[list[str]]:
    """:func:`table` as text, header first."""
    columns = {key: column for key, column in COLUMNS.items() if any(key in row for row in results.values())}
    lines = [["", *(title for title, _ in columns.values())]]
    for name, row in results.items():
        values = [(row.get(key), text) for key, (_, text) in columns.items()]
        lines.append([name, *("-" if value is None else text(value) for value, text in values)])
    return lines


def table(results: dict[str, dict]) -> str:
    """A Markdown table, aligned to be read as plain text too.

    Args:
        results: for each row's name (teacher, student, ...) what :func:`evaluate_embeddings` returned, with the
            network's number of ``parameters`` where it has any.

    Returns:
        Rows in the given order; of the columns those that some row has. Percent, except the cosine and the number
        of parameters; ``-`` for None or missing. Entries that are none of these are left out.
    """
    rows = cells(results)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |" for line in rows
    ]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def sample_of_overlap(record: dict) -> str:
    """A sentence, after a space, on how many images the overlap of a table was measured; empty where none was.

    The evaluations during training may use others.

    Args:
        record: what ``run.json`` holds.
    """
    images = record.get("evaluated_images")
    return f" {overlap_on(images)}" if images else ""
