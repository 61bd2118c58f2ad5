"""Choices, means with intervals, and the tables that show them."""

import math
import statistics
from collections.abc import Callable

from coss_hf.evaluation.tables import COLUMNS
from coss_hf.study.trials import UNTRAINED

# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
METRICS = ("linear", "probe", "knn10", "knn20", "map", "asymmetric_map", "overlap10", "cosine")


def half_interval(values: list[float]) -> float:
    """Half the width of the 95 % t-interval of a mean; infinite for a single value."""
    if len(values) < 2:
        return math.inf
    return T_QUANTILES[min(len(values) - 2, 29)] * statistics.stdev(values) / math.sqrt(len(values))


def best(rows: list[dict], metric: str) -> dict | None:
    """The row with the highest value, the first of equals; None where none has one."""
    scored = [row for row in rows if row.get(metric) is not None and math.isfinite(row[metric])]
    return max(scored, key=lambda row: row[metric], default=None)


def ranked(rows: list[dict], metric: str) -> dict[str, list[dict]]:
    """Rows by method, the highest mean first; methods without a value last."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["method"], []).append(row)

    def mean(name: str) -> float:
        values = [row[metric] for row in groups[name] if row.get(metric) is not None]
        return statistics.fmean(values) if values else -math.inf

    return {name: groups[name] for name in sorted(groups, key=mean, reverse=True)}


def difference(rows: list[dict], other: list[dict], metric: str) -> tuple[float, float] | None:
    """Mean difference of two methods paired by seed, and half of its 95 % interval; None without a common seed."""
    seeds = {row["seed"]: row[metric] for row in other if row.get(metric) is not None}
    mine = {row["seed"]: row[metric] for row in rows if row.get(metric) is not None}
    if mine and rows[0]["method"] == "initial":  # one network, whatever the seed
        mine = dict.fromkeys(seeds, *mine.values())
    pairs = [mine[seed] - seeds[seed] for seed in mine if seed in seeds]
    return (statistics.fmean(pairs), half_interval(pairs)) if pairs else None


def _cell(rows: list[dict], metric: str) -> str:
    values = [row[metric] for row in rows if row.get(metric) is not None]
    if not values:
        return "-"
    factor, digits = (1, 3) if metric == "cosine" else (100, 1)
    text = f"{factor * statistics.fmean(values):.{digits}f}"
    half = half_interval(values)
    return f"{text} ± {factor * half:.{digits}f}" if math.isfinite(half) else text


def cells_of(rows: list[dict], metric: str, extra: dict[str, Callable[[str], str]] | None = None) -> list[list[str]]:
    """A ranked table, header first: a line a method, means over seeds with 95 % t-intervals; see ``markdown``."""
    extra = extra or {}
    metrics = [name for name in METRICS if any(row.get(name) is not None for row in rows)]
    lines = [["method", "scale", "seeds", *(COLUMNS[name][0] for name in metrics), *extra]]
    for name, group in ranked(rows, metric).items():
        scales = ", ".join(sorted({f"{row['scale']:g}" for row in group}))
        scores = [_cell(group, one) for one in metrics]
        failed = sum("failed" in row for row in group)
        seeds = f"{len(group)} ({failed} failed)" if failed else str(len(group))
        lines.append([name, scales, seeds, *scores, *(column(name) for column in extra.values())])
    return lines


def as_markdown(lines: list[list[str]]) -> str:
    """Of a table, header first, whose columns but the first hold numbers."""
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def markdown(rows: list[dict], metric: str, extra: dict[str, Callable[[str], str]] | None = None) -> str:
    """A ranked table: a line a method, means over seeds with 95 % t-intervals.

    Args:
        rows: results of cells of one pair and split.
        metric: that ranks.
        extra: more columns, from the method's name.
    """
    return as_markdown(cells_of(rows, metric, extra))


def pair_section(
    title: str, rows: list[dict], chosen: list[dict], metric: str, held_out: int, published: dict[str, float]
) -> str:
    """Markdown of a pair: what was reported, what was chosen, and the paper's figures as what they are.

    Args:
        title: with networks, images seen and budget.
        rows, chosen: results on test and on held-out images.
        metric: that chose and ranks.
        held_out: number of images that chose.
        published: by row, top-1 in %.
    """
    tried = max(row["images_seen"] for row in chosen)
    parts = [
        f"## {title}",
        f"On test images; scales chosen on {held_out:,} held-out images by {metric}.",
        comparison(rows, metric),
        f"### The chosen scales, on held-out images: one seed, {tried:,} images seen",
        markdown(chosen, metric),
        *extra_passes(chosen),
    ]
    if published:
        table = [list(published), [f"{value:.2f}" for value in published.values()]]
        parts += [
            "### Published: CIFAR-100 (lossless), 240 epochs, the best scale on test, linear top-1",
            as_markdown(table),
        ]
    return "\n\n".join(parts)


def comparison(rows: list[dict], metric: str) -> str:
    """A ranked table of a comparison, each method's difference to the best, and in words whether it says anything."""
    groups = ranked(rows, metric)
    first = next(name for name in groups if name not in UNTRAINED)
    words, close, better, unknown = {first: "-"}, [], [], []
    for name, group in groups.items():
        if name in (first, "teacher"):
            continue
        found = difference(group, groups[first], metric)
        label = f"{name} weights" if name in UNTRAINED else name
        words[name] = "failed" if found is None else f"{100 * found[0]:.1f}"
        if found is None or math.isinf(found[1]):
            unknown.append(label)
            continue
        mean, half = found
        words[name] += f" ± {100 * half:.1f}"
        if mean > half and name in UNTRAINED:
            better.append(label)
        elif mean >= -half:
            words[name] += ", inside the noise" if mean <= half else ""
            close.append(label)
    table = markdown(rows, metric, {f"difference to {first}, paired": lambda name: words.get(name, "")})
    if all(row.get(metric) is None for row in groups[first]):
        verdict = "Every run failed."
    elif better:
        verdict = f"No method is better than {' or '.join(better)}: nothing was learnt here."
    elif close:
        verdict = f"{first} leads, but what separates it from {'; '.join(close)} lies inside the noise of these seeds."
    elif unknown:
        verdict = f"{first} leads; too few runs ended to say whether by more than noise over {'; '.join(unknown)}."
    else:
        verdict = f"{first} is ahead of every other row by more than the noise of these seeds."
    header = f"In %, means over seeds with 95 % t-intervals, ranked by {metric}."
    return "\n\n".join([header, table, verdict, *extra_passes(rows)])


def extra_passes(rows: list[dict]) -> list[str]:
    """A sentence on what methods cost beside their steps, where any does."""
    extra = {row["method"]: row["extra_teacher_images"] for row in rows if row.get("extra_teacher_images")}
    passes = "; ".join(f"{count:,} images for {name}" for name, count in extra.items())
    return [f"Teacher passes beside those of training, once each: {passes}."] if extra else []
