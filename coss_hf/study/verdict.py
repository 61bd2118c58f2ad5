"""Did it help? In words, from the rows of a report."""

import math
import statistics

from coss_hf.evaluation.tables import COLUMNS
from coss_hf.study.baselines import COSINE, PLAIN
from coss_hf.study.tables import difference, half_interval, ranked


def verdict(rows: list[dict], metric: str, costs: dict[str, dict]) -> list[str]:
    """Sentences: whether the distilled student beats what it started from, what its parts add, what is saved.

    A difference counts where its 95 % t-interval, paired by seed, leaves out zero.

    Args:
        rows: results of ``trained_cells`` and ``untrained_cells``.
        metric: to judge by, a fraction.
        costs: of ``student`` and ``teacher``.
    """
    groups = {name: found for name, group in ranked(rows, metric).items() if (found := _values(group, metric))}
    if "coss" not in groups:
        reasons = {row["failed"] for row in rows if row["method"] == "coss" and "failed" in row}
        return [f"It did not help: every run of CoSS failed ({'; '.join(sorted(reasons))})."]
    return [_helped(groups, metric), *_parts(groups, metric), _saved(costs)]


def _values(group: list[dict], metric: str) -> list[dict]:
    return [row for row in group if row.get(metric) is not None]


def _gain(group: list[dict], other: list[dict], metric: str) -> tuple[float, float]:
    """Mean difference in points and half its interval; against a single row, of all seeds."""
    if len(other) == 1:
        values = [row[metric] - other[0][metric] for row in group]
        return 100 * statistics.fmean(values), 100 * half_interval(values)
    # Without a common seed, since others failed, there is a difference but no interval.
    means = [statistics.fmean(row[metric] for row in rows) for rows in (group, other)]
    mean, half = difference(group, other, metric) or (means[0] - means[1], math.inf)
    return 100 * mean, 100 * half


def _helped(groups: dict[str, list[dict]], metric: str) -> str:
    start, what = ("initial", "the student's own weights") if "initial" in groups else ("random", "random weights")
    reached = {name: 100 * statistics.fmean(row[metric] for row in groups[name]) for name in (start, "coss", "teacher")}
    gain, half = _gain(groups["coss"], groups[start], metric)
    missing = reached["teacher"] - reached["coss"]
    to_teacher = f"{abs(missing):.1f} {'below' if missing > 0 else 'above'} the teacher"
    if math.isinf(half):
        return (
            f"Whether it helped cannot be said: too few runs came to an end. By {COLUMNS[metric][0]} the distilled "
            f"student has {reached['coss']:.1f} %, {what} have {reached[start]:.1f} %."
        )
    if gain <= half:
        return (
            f"It did not help: by {COLUMNS[metric][0]} the distilled student has {reached['coss']:.1f} %, {what} have "
            f"{reached[start]:.1f} % (difference {gain:.1f} ± {half:.1f} points), the teacher "
            f"{reached['teacher']:.1f} %."
        )
    way = gain / (reached["teacher"] - reached[start]) if reached["teacher"] > reached[start] else None
    share = f", {100 * way:.0f} % of the way to it" if way is not None and way <= 1 else ""
    return (
        f"It helped: by {COLUMNS[metric][0]} the distilled student has {reached['coss']:.1f} %, {gain:.1f} ± "
        f"{half:.1f} points above {what}, and {to_teacher}{share}."
    )


def _parts(groups: dict[str, list[dict]], metric: str) -> list[str]:
    found = []
    for control, part, verbs in (
        (COSINE, "Space similarity", ("adds", "takes")),
        (PLAIN, "Neighbours", ("add", "take")),
    ):
        if control not in groups:
            continue
        gain, half = _gain(groups["coss"], groups[control], metric)
        if math.isinf(half):
            found.append(f"The part of {part.lower()} cannot be said: too few runs came to an end.")
            continue
        noise = "inside the noise of these seeds" if abs(gain) <= half else "more than the noise of these seeds"
        found.append(f"{part} {verbs[gain <= 0]} {abs(gain):.1f} ± {half:.1f} points, {noise}.")
    return found


def _saved(costs: dict[str, dict]) -> str:
    student, teacher = costs["student"], costs["teacher"]
    share = {name: student[name] / teacher[name] for name in ("parameters", "macs", "bytes")}
    time = {batch: student[f"batch_{batch}"]["ms"] / teacher[f"batch_{batch}"]["ms"] for batch in (1, 64)}
    return (
        f"Of the teacher's, the student has {share['parameters']:.2f} of the parameters, {share['macs']:.2f} of the "
        f"multiply-adds and {share['bytes']:.2f} of the bytes, and takes {time[1]:.2f} of the time for one image, "
        f"{time[64]:.2f} for 64."
    )
