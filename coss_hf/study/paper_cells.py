"""Figures of a study next to the paper's, cell by cell, and whether both rank the rows alike."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coss_hf.evaluation.tables import COLUMNS
from coss_hf.study import paper_tables as paper
from coss_hf.study.tables import METRICS, as_markdown, best, half_interval

# A correlation of fewer rows says nothing.
LEAST_ROWS = 5


@dataclass(frozen=True, eq=False)
class Cell:
    """A figure of the paper, and ours.

    Attributes:
        table: number of the table.
        pair: student and teacher.
        row: name of the row.
        published: the paper's top-1 in %; None where it has none.
        runs: our results of it on test images at one length and one scale, one a seed; empty where it was not run.
        is_without_scale: whether its runs on held-out images failed, so that none was made on test images.
    """

    table: int
    pair: str
    row: str
    published: float | None
    runs: tuple[dict, ...] = ()
    is_without_scale: bool = False

    def values(self, metric: str) -> list[float]:
        """Return ours in %, one a seed."""
        return [100 * row[metric] for row in self.runs if row.get(metric) is not None]

    def text(self, metric: str) -> str:
        """Return our mean in % with the half of its 95 % t-interval; "not run" or "diverged" where there is none."""
        values = self.values(metric)
        if not values:
            return "diverged" if self.runs or self.is_without_scale else "not run"
        text = f"{statistics.fmean(values):.1f}"
        return text if len(values) == 1 else f"{text} ± {half_interval(values):.1f}"

    def seeds(self, metric: str) -> str:
        """Return the number of our runs, and how many of them have no value."""
        failed = len(self.runs) - len(self.values(metric))
        return f"{len(self.runs)} ({failed} failed)" if failed else str(len(self.runs) or "")

    def gap(self, metric: str) -> float | None:
        """Return ours minus the paper's, in points; None where one of them is missing."""
        values = self.values(metric)
        return statistics.fmean(values) - self.published if values and self.published is not None else None


def cells(rows: Sequence[dict], tables: Sequence[int] = tuple(paper.ROWS), metric: str = "linear") -> list[Cell]:
    """Return every cell of the paper's tables, and of ``--table 5``, with what was run of it: one for each length.

    A run belongs to each cell of its pair and its method, whichever table it was run for. Where the test runs of a cell
    have several scales at one length, those of the scale that is best on held-out images count. Evaluations during
    training (``--eval_at``) count in no cell.

    Args:
        rows: results of ``coss-hf reproduce``.
        tables: numbers of the tables.
        metric: metric that chooses among scales.

    Raises:
        ValueError: two runs of one cell, length, scale and seed with different results; or test runs of several scales
            at one length, of which no held-out runs choose one.
    """
    rows = [row for row in rows if "share" not in row]
    found = []
    for table in tables:
        for pair in paper.PUBLISHED[table]:
            for name in paper.ROWS[table]:
                published = paper.figure(table, pair, name)
                runs = [row for row in rows if _is_of_cell(row, table, pair, name)]
                tested = [row for row in runs if row["split"] == "test"]
                held_out = [row for row in runs if row["split"] == "validation"]
                failed = bool(runs) and all("failed" in row for row in runs)
                for length in sorted({row["num_images"] for row in tested}) or [None]:
                    at_length = [row for row in tested if row["num_images"] == length]
                    own = _one_a_seed(_at_one_scale(at_length, held_out, metric))
                    found.append(Cell(table, pair, name, published, own, failed and not own))
    return found


def _is_of_cell(row: dict, table: int, pair: str, name: str) -> bool:
    if row["pair"] != pair or row.get("neighbors_k", 0) != paper.NEIGHBORS.get(name, 0):
        return False
    return row["expression"] == paper.scaled(paper.ROWS[table][name], row["scale"])


def _at_one_scale(tested: list[dict], held_out: list[dict], metric: str) -> list[dict]:
    """Return the test runs of one length at the scale that was chosen; all of them where they have one scale."""
    scales = sorted({row["scale"] for row in tested})
    if len(scales) < 2:
        return tested
    images = tested[0]["num_images"]
    chosen = _chosen_scale(held_out, images, metric)
    if chosen in scales:
        return [row for row in tested if row["scale"] == chosen]
    if chosen is None:
        why = f"no held-out runs of several scales, with at most as many images, choose one by {metric}"
    else:
        why = f"the held-out runs choose scale {chosen:g} by {metric}, which was not run"
    name = f"{tested[0]['pair']} {tested[0]['method']}"
    listed = ", ".join(f"{scale:g}" for scale in scales)
    raise ValueError(
        f"the test runs of {name} with {images:,} images have the scales {listed}, and {why}: keep the rows of one "
        f"scale, or add the rows of the study that chose one."
    )


def _chosen_scale(held_out: list[dict], images: int, metric: str) -> float | None:
    """Return the scale that is best on held-out images; None where nothing was chosen.

    Runs of different lengths are not compared with each other. Those for a test run of ``images`` images are the
    longest that have several scales and are not longer than it: a choice is as long as the report, or shorter.
    """
    by_length: dict[int, list[dict]] = {}
    for row in held_out:
        if row["num_images"] <= images:
            by_length.setdefault(row["num_images"], []).append(row)
    lengths = [length for length, found in by_length.items() if len({row["scale"] for row in found}) > 1]
    chosen = best(by_length[max(lengths)], metric) if lengths else None
    return None if chosen is None else chosen["scale"]


def _one_a_seed(runs: Sequence[dict]) -> tuple[dict, ...]:
    """A run that was repeated counts once."""
    kept: dict[int, dict] = {}
    for row in runs:
        other = kept.setdefault(row["seed"], row)
        differ = [key for key in METRICS if row.get(key) != other.get(key)]
        if differ:
            name = f"{row['pair']} {row['method']} seed {row['seed']}"
            raise ValueError(f"two runs of {name} with {row['num_images']:,} images differ in {', '.join(differ)}.")
    return tuple(kept.values())


def cells_table(found: Sequence[Cell], metric: str = "linear") -> str:
    """Return the cells of one pair as a table in Markdown: the paper's figure, ours, the gap, and how ours was made.

    Args:
        found: the cells.
        metric: metric of ours that is compared with the paper's top-1.
    """
    ranks = _ranks(found, metric)
    head = ["row", "paper", f"{COLUMNS[metric][0]}, here", "gap", "k-NN 20, here", "seeds", "images seen", "scale"]
    lines = [head + (["rank in the paper", "rank here"] if ranks else [])]
    for cell in found:
        gap = cell.gap(metric)
        line = [
            f"`{cell.row}`",
            "" if cell.published is None else f"{cell.published:.2f}",
            cell.text(metric),
            "" if gap is None else f"{gap:+.1f}",
            cell.text("knn20") if cell.runs else "",
            cell.seeds(metric),
            f"{max(row['images_seen'] for row in cell.runs):,}" if cell.runs else "",
            ", ".join(sorted({f"{row['scale']:g}" for row in cell.runs})),
        ]
        lines.append(line + (list(ranks.get(cell, ("", ""))) if ranks else []))
    return as_markdown(lines)


def compared(found: Sequence[Cell], metric: str = "linear") -> list[Cell]:
    """Return the cells that both have, ours and the paper's, at the length that most rows have, the longest of equals.

    Empty where they are too few to be ranked.

    Args:
        found: the cells of one pair.
        metric: metric that ranks ours.
    """
    both = at_usual_length([cell for cell in found if cell.gap(metric) is not None])
    return both if len(both) >= LEAST_ROWS else []


def at_usual_length(found: Sequence[Cell]) -> list[Cell]:
    """Return the cells with runs at the length that most of them have, the longest of equals."""
    lengths = Counter(cell.runs[0]["num_images"] for cell in found if cell.runs)
    usual = max(lengths, key=lambda length: (lengths[length], length), default=None)
    return [cell for cell in found if cell.runs and cell.runs[0]["num_images"] == usual]


def _ranks(found: Sequence[Cell], metric: str) -> dict[Cell, tuple[str, str]]:
    """Places of the compared rows in the paper and here, 1 for the best; equal figures share the better place."""
    both = compared(found, metric)
    theirs = [cell.published for cell in both]
    ours = [statistics.fmean(cell.values(metric)) for cell in both]
    return {
        cell: tuple(str(1 + sum(other > values[i] for other in values)) for values in (theirs, ours))
        for i, cell in enumerate(both)
    }


def rank_correlation(ours: Sequence[float], theirs: Sequence[float], draws: int = 10_000) -> tuple[float, float, float]:
    """Return Spearman's rank correlation and its 95 % interval over rows drawn with replacement.

    Args:
        ours: a figure of each row, ``(n,)``.
        theirs: the same in the paper, ``(n,)``.
        draws: number of draws of n rows; those in which one side has one value alone are left out.

    Returns:
        The correlation, the lower and the upper end of the interval.

    Raises:
        ValueError: fewer than ``LEAST_ROWS`` rows, or a side that has one value alone.

    Example:
        >>> rank_correlation([1, 2, 3, 4, 5], [10, 20, 30, 40, 50])
        (1.0, 1.0, 1.0)
    """
    values = np.array([ours, theirs], dtype=float)
    if values.shape[1] < LEAST_ROWS or (values == values[:, :1]).all(axis=1).any():
        raise ValueError(f"a rank correlation needs {LEAST_ROWS} rows or more that differ, not {values.tolist()}.")
    rng = np.random.default_rng(0)
    drawn = values[:, rng.integers(0, values.shape[1], (draws, values.shape[1]))].swapaxes(0, 1)
    several = _spearman(drawn[(drawn != drawn[..., :1]).any(axis=2).all(axis=1)])
    low, high = np.percentile(several, (2.5, 97.5))
    return float(_spearman(values[None])[0]), float(low), float(high)


def _spearman(pairs: np.ndarray) -> np.ndarray:
    """Correlation of the ranks of each pair of rows, (pairs, 2, values); equal values share the mean of their ranks."""
    other = pairs[..., None, :]
    ranks = (pairs[..., None] > other).sum(-1) + (1 + (pairs[..., None] == other).sum(-1)) / 2
    ranks -= ranks.mean(axis=-1, keepdims=True)
    ranks /= np.linalg.norm(ranks, axis=-1, keepdims=True)
    return ranks.prod(axis=1).sum(axis=-1).round(12)


def ranking_sentence(found: Sequence[Cell], metric: str = "linear") -> str:
    """Say how far our ranking of the rows agrees with the paper's, at the length that most rows have.

    Empty where too few rows were run.

    Args:
        found: the cells of one pair.
        metric: metric that ranks ours.
    """
    both = compared(found, metric)
    ours = [statistics.fmean(cell.values(metric)) for cell in both]
    try:
        rho, low, high = rank_correlation(ours, [cell.published for cell in both])
    except ValueError:
        return ""
    rows = {cell.row for cell in found if cell.published is not None}
    seen = max(row["images_seen"] for cell in both for row in cell.runs)
    text = (
        f"Spearman's rank correlation of {COLUMNS[metric][0]} here with the paper's top-1, over {len(both)} of "
        f"{len(rows)} rows at {seen:,} images seen: {rho:.2f} (95 % interval over draws of the rows: {low:.2f} to "
        f"{high:.2f}; the spread between seeds is not in it)."
    )
    if low <= 0 <= high:
        text += " The interval contains 0: these rows do not show that both rank alike."
    return text
