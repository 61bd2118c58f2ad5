"""Whether distillation helped, in sentences, from the rows of a report."""

import math
import statistics

from coss_hf.evaluation.tables import COLUMNS
from coss_hf.study.baselines import COSINE, PLAIN
from coss_hf.study.tables import difference, half_interval, ranked

TOO_FEW = (
    "too few runs came to an end, and two of each at least are needed, with the same seeds, to tell a difference from "
    "noise. The file of results says why runs failed"
)


def verdict(rows: list[dict], metric: str, costs: dict[str, dict]) -> list[str]:
    """Say whether the distilled student beats what it started from, what the method's parts add, and what is saved.

    A difference counts if its 95 % t-interval, paired by seed, excludes zero.

    Args:
        rows: results of ``trained_trials`` and ``untrained_trials``.
        metric: metric that decides, a fraction.
        costs: costs of ``student`` and ``teacher``.
    """
    groups = {}
    for name, group in ranked(rows, metric).items():
        measured = [row for row in group if row.get(metric) is not None]
        if measured:
            groups[name] = measured
    if "coss" not in groups:
        if not any("failed" in row for row in rows if row["method"] == "coss"):
            return [f"Whether it helped is not known: no run of CoSS has a value of {metric}."]
        reasons = {row.get("failed", f"no value of {metric}") for row in rows if row["method"] == "coss"}
        return [f"It did not help: every run of CoSS failed ({'; '.join(sorted(reasons))})."]
    return [_helped(groups, metric), *_parts(groups, metric), _saved(costs)]


def _gain(group: list[dict], other: list[dict], metric: str) -> tuple[float, float]:
    """Return the mean difference in points and half its interval; to a single row, of all seeds."""
    if other[0]["method"] == "initial":  # without a seed
        values = [row[metric] - other[0][metric] for row in group]
        return 100 * statistics.fmean(values), 100 * half_interval(values)
    found = difference(group, other, metric)
    if found is None:
        # Without a common seed, since others failed, there is a difference but no interval.
        means = [statistics.fmean(row[metric] for row in rows) for rows in (group, other)]
        return 100 * (means[0] - means[1]), math.inf
    mean, half = found
    return 100 * mean, 100 * half


def _helped(groups: dict[str, list[dict]], metric: str) -> str:
    start = "random"
    what = "random weights"
    if "initial" in groups:
        start = "initial"
        what = "the student's own weights"
    reached = {name: 100 * statistics.fmean(row[metric] for row in groups[name]) for name in (start, "coss", "teacher")}
    gain, half = _gain(groups["coss"], groups[start], metric)
    by = COLUMNS[metric][0]
    if math.isinf(half):
        return (
            f"It is not known whether it helped: {TOO_FEW}. By {by} the distilled student has {reached['coss']:.1f} %, "
            f"{what} have {reached[start]:.1f} %."
        )
    if gain <= half:
        return (
            f"It did not help: by {by} the distilled student has {reached['coss']:.1f} %, {what} have "
            f"{reached[start]:.1f} % (difference {gain:.1f} ± {half:.1f} points), the teacher "
            f"{reached['teacher']:.1f} %."
        )
    missing = reached["teacher"] - reached["coss"]
    to_teacher = f"{abs(missing):.1f} {'below' if missing > 0 else 'above'} the teacher"
    distance = reached["teacher"] - reached[start]
    if distance > 0 and gain <= distance:
        to_teacher += f", {100 * gain / distance:.0f} % of the way to it"
    return (
        f"It helped: by {by} the distilled student has {reached['coss']:.1f} %, {gain:.1f} ± {half:.1f} points above "
        f"{what}, and {to_teacher}."
    )


def _parts(groups: dict[str, list[dict]], metric: str) -> list[str]:
    sentences = []
    for baseline, part, gains, loses in (
        (COSINE, "Space similarity", "adds", "takes"),
        (PLAIN, "Neighbours", "add", "take"),
    ):
        if baseline not in groups:
            continue
        gain, half = _gain(groups["coss"], groups[baseline], metric)
        if math.isinf(half):
            sentences.append(f"It is not known what {part.lower()} {gains}: {TOO_FEW}.")
            continue
        verb = gains if gain > 0 else loses
        noise = "inside the noise of these seeds" if abs(gain) <= half else "more than the noise of these seeds"
        sentences.append(f"{part} {verb} {abs(gain):.1f} ± {half:.1f} points, {noise}.")
    return sentences


def _saved(costs: dict[str, dict]) -> str:
    student = costs["student"]
    teacher = costs["teacher"]
    share = {name: student[name] / teacher[name] for name in ("parameters", "macs", "bytes")}
    time = {batch: student[f"batch_{batch}"]["ms"] / teacher[f"batch_{batch}"]["ms"] for batch in (1, 64)}
    return (
        f"Of the teacher's, the student has {share['parameters']:.2f} of the parameters, {share['macs']:.2f} of the "
        f"multiply-adds and {share['bytes']:.2f} of the bytes, and takes {time[1]:.2f} of the time for one image, "
        f"{time[64]:.2f} for 64."
    )
