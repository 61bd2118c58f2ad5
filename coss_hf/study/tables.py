"""Choices, means with intervals, and the tables that show them."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from coss_hf.evaluation.tables import COLUMNS, unit_of
from coss_hf.study.trials import UNTRAINED

# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
METRICS = ("linear", "probe", "knn10", "knn20", "map", "asymmetric_map", "overlap10", "cosine")


def half_interval(values: list[float]) -> float:
    """Return half the width of the 95 % t-interval of a mean; infinite for a single value."""
    if len(values) < 2:
        return math.inf
    return T_QUANTILES[min(len(values) - 2, 29)] * statistics.stdev(values) / math.sqrt(len(values))


def best(rows: list[dict], metric: str) -> dict | None:
    """Return the row with the highest value, the first of equals; None if none has one."""
    scored = [row for row in rows if row.get(metric) is not None and math.isfinite(row[metric])]
    return max(scored, key=lambda row: row[metric], default=None)


def ranked(rows: list[dict], metric: str) -> dict[str, list[dict]]:
    """Group rows by method, the highest mean first; methods without a value last."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["method"], []).append(row)

    def mean(name: str) -> float:
        values = [row[metric] for row in groups[name] if row.get(metric) is not None]
        return statistics.fmean(values) if values else -math.inf

    return {name: groups[name] for name in sorted(groups, key=mean, reverse=True)}


def difference(rows: list[dict], other: list[dict], metric: str) -> tuple[float, float] | None:
    """Return the mean difference of two methods paired by seed, and half of its 95 % t-interval.

    Args:
        rows: results of the first method.
        other: results of the method that is subtracted.
        metric: the metric.

    Returns:
        None without a common seed.
    """
    theirs = {row["seed"]: row[metric] for row in other if row.get(metric) is not None}
    ours = {row["seed"]: row[metric] for row in rows if row.get(metric) is not None}
    if ours and rows[0]["method"] == "initial":  # one network, whatever the seed
        (value,) = ours.values()
        ours = dict.fromkeys(theirs, value)
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if not differences:
        return None
    return statistics.fmean(differences), half_interval(differences)


def _mean_with_interval(rows: list[dict], metric: str) -> str:
    values = [row[metric] for row in rows if row.get(metric) is not None]
    if not values:
        return "-"
    unit = unit_of(metric)
    text = unit.text(statistics.fmean(values))
    half = half_interval(values)
    return f"{text} ± {unit.text(half)}" if math.isfinite(half) else text


def seen_by(rows: list[dict]) -> tuple[int, int] | None:
    """Return the least and the most images that trained students have seen, without those of failed runs.

    Args:
        rows: results of trials.

    Returns:
        None without any such student.
    """
    seen = [
        row["images_seen"]
        for row in rows
        if row["method"] not in UNTRAINED and "failed" not in row and "images_seen" in row
    ]
    return (min(seen), max(seen)) if seen else None


def images_seen(rows: list[dict]) -> str:
    """Return how many images the trained students have seen, in words; empty without any."""
    found = seen_by(rows)
    if found is None:
        return ""
    least, most = found
    return f"{most:,} images seen" if least == most else f"{least:,} to {most:,} images seen"


def _column_of_images(rows: list[dict]) -> dict[str, Callable[[str], str]]:
    """Return a column of the images that each row has seen, by its header; none where all have seen as many."""
    least, most = seen_by(rows) or (0, 0)
    if least == most:
        return {}
    groups = ranked(rows, METRICS[0])
    return {"images seen": lambda name: images_seen(groups[name]).removesuffix(" images seen")}


def ranked_table(
    rows: list[dict], metric: str, extra: dict[str, Callable[[str], str]] | None = None
) -> list[list[str]]:
    """Return a ranked table: the header, then one line for each method, means over seeds with 95 % t-intervals.

    Where the trained rows have not all seen as many images, a column says how many each has.

    Args:
        rows: results of trials of one pair and split.
        metric: metric that ranks.
        extra: more columns: functions of the method's name, by header.
    """
    extra = _column_of_images(rows) | (extra or {})
    metrics = [name for name in METRICS if any(row.get(name) is not None for row in rows)]
    lines = [["method", "scale", "seeds", *(COLUMNS[name][0] for name in metrics), *extra]]
    for name, group in ranked(rows, metric).items():
        scales = ", ".join(sorted({f"{row['scale']:g}" for row in group}))
        failed = sum("failed" in row for row in group)
        seeds = f"{len(group)} ({failed} failed)" if failed else str(len(group))
        scores = [_mean_with_interval(group, one) for one in metrics]
        lines.append([name, scales, seeds, *scores, *(column(name) for column in extra.values())])
    return lines


def as_markdown(lines: list[list[str]]) -> str:
    """Return a table in Markdown; its first line is the header, and all columns but the first hold numbers."""
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def markdown(rows: list[dict], metric: str, extra: dict[str, Callable[[str], str]] | None = None) -> str:
    """Return ``ranked_table`` in Markdown."""
    return as_markdown(ranked_table(rows, metric, extra))


def pair_section(
    title: str, rows: list[dict], chosen: list[dict], metric: str, held_out: int | None, published: dict[str, float]
) -> str:
    """Return a section in Markdown on a pair: what was reported, what was chosen, and the paper's own figures.

    Args:
        title: networks, images seen and budget.
        rows: results on test images.
        chosen: results on held-out images; the trials alone where nothing was chosen.
        metric: metric that chose and ranks.
        held_out: number of images that chose; None where nothing was chosen.
        published: the paper's top-1 in %, by row.
    """
    parts = [f"## {title}"]
    if held_out is None:
        scales = ", ".join(sorted({f"{row['scale']:g}" for row in chosen}))
        parts += [f"On test images, scale {scales} of each method: nothing was chosen.", comparison(rows, metric)]
    else:
        tried = images_seen(chosen)
        parts += [
            f"On test images; scales chosen on {held_out:,} held-out images by {metric}.",
            comparison(rows, metric),
            f"### The chosen scales, on held-out images: {', '.join(filter(None, ['one seed', tried]))}",
            markdown(chosen, metric),
            *extra_passes(chosen),
        ]
    if published:
        parts.append("### Published: CIFAR-100 (lossless), 240 epochs, the best scale on test, linear top-1")
        parts.append(as_markdown([list(published), [f"{value:.2f}" for value in published.values()]]))
    return "\n\n".join(parts)


@dataclass
class _Standing:
    """How the other rows stand to the best method.

    Attributes:
        first: name of the best method.
        metric: metric that ranks.
        differences: text of each row's difference to it, by name.
        close: rows within the noise.
        better: untrained networks that are better by more than the noise.
        unknown: rows without an interval.
        failed: those of them whose runs failed.
    """

    first: str
    metric: str
    differences: dict[str, str]
    close: list[str] = field(default_factory=list)
    better: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def add(self, name: str, group: list[dict], best_rows: list[dict]) -> None:
        """Add a row by its difference to the best method, paired by seed.

        Args:
            name: name of the row.
            group: its results.
            best_rows: those of the best method.
        """
        label = f"{name} weights" if name in UNTRAINED else name
        found = difference(group, best_rows, self.metric)
        if found is None:
            has_failed = any("failed" in row for row in group)
            why = "failed" if has_failed else "no value"
            has_value = any(row.get(self.metric) is not None for row in group)
            self.differences[name] = "no common seed" if has_value else why
            self.unknown.append(label)
            self.failed += [label] if has_failed else []
            return
        mean, half = found
        unit = unit_of(self.metric)
        self.differences[name] = unit.text(mean)
        if math.isinf(half):
            self.unknown.append(label)
            return
        self.differences[name] += f" ± {unit.text(half)}"
        if mean > half and name in UNTRAINED:
            self.better.append(label)
        elif mean > half:
            self.close.append(label)
        elif mean >= -half:
            self.differences[name] += ", inside the noise"
            self.close.append(label)

    def sentence(self) -> str:
        """Say whether the differences mean anything."""
        if self.better:
            return f"No method is better than {_listed(self.better, 'or')}: nothing was learnt here."
        if self.close:
            return (
                f"{self.first} has the highest mean, but its difference to {_listed(self.close)} lies inside the noise "
                f"of these seeds."
            )
        if self.unknown:
            why = " The file of results says why runs failed." if self.failed else ""
            return (
                f"{self.first} has the highest mean. It is not known whether it is better than "
                f"{_listed(self.unknown)}: two runs of each at least must end with a result to tell differences from "
                f"noise.{why}"
            )
        return f"{self.first} is better than every other row by more than the noise of these seeds."


def _listed(names: list[str], last: str = "and") -> str:
    """Names as a sentence lists them; methods may be sums, which a comma keeps apart."""
    return f" {last} ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def comparison(rows: list[dict], metric: str) -> str:
    """Return a ranked table with each row's difference to the best method, and whether the differences mean anything.

    Args:
        rows: results of trials of one pair and split.
        metric: metric that ranks.
    """
    groups = ranked(rows, metric)
    unit = "In %, the cosine from -1 to 1" if metric == "cosine" else "In %"
    heading = f"{unit}, means over seeds with 95 % t-intervals, ranked by {metric}."
    first = next((name for name in groups if name not in UNTRAINED), None)
    if first is None:
        return "\n\n".join([heading, markdown(rows, metric), "No trained row is reported."])
    standing = _Standing(first, metric, {first: "-"})
    for name, group in groups.items():
        if name not in (first, "teacher"):
            standing.add(name, group, groups[first])
    extra = {f"difference to {first}, paired": lambda name: standing.differences.get(name, "")}
    has_value = any(row.get(metric) is not None for row in groups[first])
    parts = [
        heading,
        markdown(rows, metric, extra),
        standing.sentence() if has_value else without_value(rows, metric),
        *extra_passes(rows),
        *what_was_shared(rows),
    ]
    return "\n\n".join(parts)


def without_value(rows: list[dict], metric: str) -> str:
    """Say why no trained row has a value: its runs failed, or the metric is not defined for these images."""
    trained = [row for row in rows if row["method"] not in UNTRAINED]
    if all("failed" in row for row in trained):
        return "Every run failed."
    why = " The file of results says why runs failed." if any("failed" in row for row in trained) else ""
    return f"No run has a value of {metric}.{why}"


def extra_passes(rows: list[dict]) -> list[str]:
    """Return a sentence on what the teacher embeds before the first step, if a method needs any."""
    extra = {row["method"]: row["extra_teacher_images"] for row in rows if row.get("extra_teacher_images")}
    if not extra:
        return []
    passes = "; ".join(f"{count:,} images for {name}" for name, count in extra.items())
    return [f"Before the first step of each run the teacher also embedded: {passes}."]


def what_was_shared(rows: list[dict]) -> list[str]:
    """Return sentences on the views that all runs saw, and on whose teacher's embeddings were shared, if any were."""
    views: dict[str, list[dict]] = {}
    for row in rows:
        if row.get("shared_views"):
            views.setdefault(row["method"], []).append(row["shared_views"])
    if not views:
        return []
    first = next(iter(views.values()))[0]
    epochs = f"{first['epochs']} epoch{'s' if first['epochs'] > 1 else ''}"
    parts = [
        f"Views come back after {epochs} and are the same in every run (view seed {first['seed']}): the seeds "
        f"differ in initial weights and in the order of the images."
    ]
    cached = [name for name, found in views.items() if all(one["teacher_cache"] for one in found)]
    live = [name for name in views if name not in cached]
    if cached:
        parts.append(f"The runs of {_listed(cached)} shared the teacher's embeddings of these views.")
    if live:
        parts.append(f"The teacher embedded the views again in the runs of {_listed(live)}.")
    return [" ".join(parts)]
