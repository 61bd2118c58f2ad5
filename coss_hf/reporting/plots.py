"""Pictures of runs and studies, in one look: neighbours, projections, curves, methods, quality against latency."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from coss_hf.evaluation.diagnostics import chance
from coss_hf.evaluation.tables import unit_of
from coss_hf.utils.messages import get_logger
from coss_hf.utils.packages import how_to_install, is_installed

logger = get_logger(__name__)

SHARED = "#12805c"
OTHER = "#d0d4d9"
# One of each student in a plot, told apart by the colour-blind, too (Okabe and Ito).
STUDENTS = ("#009e73", "#0072b2", "#d55e00", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b")
TEXT = "#22272e"
MUTED = "#68707a"
WRONG = "#c0392b"


def _where_it_can_be_drawn(draw: Callable) -> Callable:
    """Leave a picture out, with a warning, where matplotlib is not installed: it is drawn at the end of long runs."""

    @functools.wraps(draw)
    def drawn(path: str | Path, *args, **kwargs) -> None:
        if is_installed("matplotlib"):
            draw(path, *args, **kwargs)
        else:
            _say_that_none_is_drawn(Path(path).parent.absolute())

    return drawn


@functools.cache  # once for all pictures of a folder
def _say_that_none_is_drawn(folder: Path) -> None:
    logger.warning(
        "Pictures in %s are not drawn, and those that are there stay as they are, since matplotlib is not installed: "
        "%s.",
        *(folder, how_to_install("matplotlib")),
    )


def _figure(width: float, height: float):
    # Not pyplot: no global state, no display, nothing to close.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _dress(axes, title: str, x: str = "", y: str = "", grid: str = "y", bold: bool = False) -> None:
    """The one look of all plots: title above the left edge of the axes, light grid, no frame, units on the axes."""
    axes.set_title(title, loc="left", fontsize=10, color=TEXT, weight="bold" if bold else "normal")
    axes.set_xlabel(x, fontsize=9, color=MUTED)
    axes.set_ylabel(y, fontsize=9, color=MUTED)
    axes.grid(axis=grid, color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=MUTED, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(OTHER)


def _thousands(axes) -> None:
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


@_where_it_can_be_drawn
def neighbor_picture(
    path: str | Path,
    images: Sequence,
    query_rows: Sequence[int],
    student_neighbors: np.ndarray,
    teacher_neighbors: np.ndarray,
    labels: Sequence | None = None,
) -> None:
    """Write a PNG with one row per query: the query, the teacher's and the student's nearest images, best first.

    Images in both lists of a row have a thick frame. Small images are enlarged without smoothing.

    Args:
        path: of the PNG.
        images: PIL images, indexed by row; only those shown are read.
        query_rows: rows of the q queries.
        student_neighbors: ``(q, n)`` rows of ``images``.
        teacher_neighbors: ``(q, n)``.
        labels: what to write below each image, indexed as ``images``, in red where it is not the query's; nothing by
            default.

    Raises:
        ValueError: neighbours that are not (q, n) for both networks.
    """
    from matplotlib.patches import Rectangle

    student_neighbors = np.asarray(student_neighbors)
    teacher_neighbors = np.asarray(teacher_neighbors)
    expected = (len(query_rows), *student_neighbors.shape[1:])
    if student_neighbors.ndim != 2 or not student_neighbors.shape == teacher_neighbors.shape == expected:
        raise ValueError(
            f"student_neighbors and teacher_neighbors must both be (q, n) for q={len(query_rows)} queries, got "
            f"{student_neighbors.shape} and {teacher_neighbors.shape}."
        )
    q, n = student_neighbors.shape
    gap = 0.45
    tile = 1.0 if labels is None else 1.22
    header = 0.55
    columns = 1 + gap + n + gap + n
    figure = _figure(0.85 * (columns + 0.4), 0.85 * (q * tile + header + 0.45))
    width, height = figure.get_size_inches() / 0.85  # in tiles
    # One for all images: axes of their own would take seconds to make.
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")

    def text(x: float, y: float, string: str, **style) -> None:
        figure.text(x / width, 1 - y / height, string, color=style.pop("color", TEXT), **style)

    def show(x: float, y: float, row: int, query: int, color: str, line: float) -> None:
        picture = images[int(row)]
        smooth = "nearest" if max(picture.size) < 100 else "antialiased"
        extent = (x, x + 0.88, y + 0.88, y)
        axes.imshow(np.asarray(picture.convert("RGB")), interpolation=smooth, extent=extent, aspect="auto")
        axes.add_patch(Rectangle((x, y), 0.88, 0.88, fill=False, edgecolor=color, linewidth=line))
        if labels is not None:
            color = MUTED if labels[int(row)] == labels[int(query)] else WRONG
            text(x + 0.44, y + 0.93, str(labels[int(row)]), fontsize=7, color=color, ha="center", va="top")

    starts = {"Query": 0.2, "Teacher": 0.2 + 1 + gap, "Student": 0.2 + 1 + gap + n + gap}
    text(starts["Query"], 0.35, "Query", fontsize=10, weight="bold")
    for name in ("Teacher", "Student"):
        text(starts[name], 0.35, f"{name}’s {n} nearest", fontsize=10, weight="bold")
    for i, query in enumerate(query_rows):
        y = header + i * tile
        show(starts["Query"], y, query, query, TEXT, 0.8)
        for name, ours, others in (
            ("Teacher", teacher_neighbors[i], student_neighbors[i]),
            ("Student", student_neighbors[i], teacher_neighbors[i]),
        ):
            for column, row in enumerate(ours):
                frame = (SHARED, 2.6) if row in others else (OTHER, 0.8)
                show(starts[name] + column, y, row, query, *frame)
    shared = np.mean([np.isin(s, t).mean() for s, t in zip(student_neighbors, teacher_neighbors, strict=True)])
    text(
        starts["Query"],
        height - 0.14,
        f"Green frame: in both lists ({100 * shared:.0f} % here)" + ("" if labels is None else ". Red: another class."),
        fontsize=9,
        color=SHARED,
    )
    figure.savefig(path, format="png")


@_where_it_can_be_drawn
def loss_curve(path: str | Path, log_history: Sequence[dict]) -> None:
    """Write a PNG of the training loss, and below it one plot for each named part, over the images seen.

    Args:
        path: of the PNG.
        log_history: ``trainer.state.log_history``. Entries with ``loss`` are read; parts are the entries ``l_*`` and
            ``loss_*``, the horizontal axis is ``images_seen``, or ``step`` where that is not logged.

    Raises:
        ValueError: a history without ``loss``.
    """
    entries = [entry for entry in log_history if "loss" in entry]
    if not entries:
        raise ValueError("log_history holds no entry with 'loss': log at least once (--logging_steps).")
    axis = "images_seen" if all("images_seen" in entry for entry in entries) else "step"
    names = ["loss", *sorted({key for entry in entries for key in entry if key.startswith(("l_", "loss_"))})]
    figure = _figure(7, 2.6 + 1.5 * (len(names) - 1))
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False, height_ratios=[1.6] + [1] * (len(names) - 1))[
        :, 0
    ]
    for name, axes in zip(names, panels, strict=True):
        points = [(entry[axis], entry[name]) for entry in entries if name in entry]
        axes.plot(
            *zip(*points, strict=True),
            color=SHARED,
            linewidth=1.5,
            marker="o" if len(points) < 30 else None,
            markersize=3,
        )
        _dress(axes, name, bold=name == "loss")
        axes.margins(x=0.01)
    _thousands(panels[-1])
    panels[-1].set_xlabel(axis.replace("_", " "))
    figure.align_ylabels(panels)
    figure.tight_layout()
    figure.savefig(path, format="png")


@_where_it_can_be_drawn
def panel_curves(path: str | Path, evaluations: Sequence[dict], images: int | None = None) -> None:
    """Write a PNG of a run's evaluations over the images seen: overlap, cosines, effective rank, accuracies.

    Args:
        path: of the PNG.
        evaluations: of ``coss_hf.evaluation.diagnostics.evaluations``, one or more.
        images: number of images that were evaluated, which decides what an overlap would be by chance.
    """
    sample = f" ({images:,} images, {100 * chance(images):.1f} % by chance)" if images else ""
    groups = [
        (f"Overlap of the 10 nearest{sample}", {"overlap": "overlap10"}, 100, "%"),
        ("Cosine and CKA", {"per image": "cosine", "per dimension": "dimension_cosine", "CKA": "cka"}, 1, ""),
        ("Effective rank", {"student": "effective_rank", "teacher": "teacher_effective_rank"}, 1, "dimensions"),
        ("Accuracy, with labels", {"k-NN 20": "knn20", "linear probe": "probe"}, 100, "%"),
    ]
    groups = [group for group in groups if any(key in entry for key in group[1].values() for entry in evaluations)]
    figure = _figure(9, 2.3 * -(-len(groups) // 2))
    axes = figure.subplots(-(-len(groups) // 2), 2, squeeze=False).ravel()
    for one in axes[len(groups) :]:
        one.set_visible(False)
    for one, (title, lines, factor, unit) in zip(axes, groups):
        for (name, key), color in zip(lines.items(), (SHARED, "#3867b7", "#b7791f")):
            points = [
                (entry["images_seen"], factor * entry[key]) for entry in evaluations if entry.get(key) is not None
            ]
            if points:
                one.plot(*zip(*points), color=color, linewidth=1.5, marker="o", markersize=3, label=name)
        if len(lines) > 1:
            one.legend(fontsize=8, frameon=False, labelcolor=TEXT)
        _dress(one, title, x="images seen", y=unit)
        _thousands(one)
    figure.tight_layout()
    figure.savefig(path, format="png")


@_where_it_can_be_drawn
def projection_picture(
    path: str | Path,
    student: np.ndarray,
    teacher: np.ndarray,
    labels: Sequence | None,
    names: dict[int, str] | None = None,
) -> None:
    """Write a PNG of both spaces in the plane, side by side, an image in the same colour in both.

    Args:
        path: of the PNG.
        student, teacher: ``(n, 2)`` coordinates of the same images.
        labels: class numbers or names, which colour the images where there are at most 20; else the direction in the
            teacher's plane does. The legend says which.
        names: names of the class numbers, for the legend.
    """
    classes = sorted(set(labels)) if labels is not None else []
    by_class = 0 < len(classes) <= 20
    if by_class:
        shades = [classes.index(label) for label in labels]
        colors = {"c": shades, "cmap": "tab10" if len(classes) <= 10 else "tab20", "vmin": 0}
        colors["vmax"] = 9 if len(classes) <= 10 else 19
    else:
        colors = {"c": np.arctan2(teacher[:, 1], teacher[:, 0]), "cmap": "hsv"}
    figure = _figure(9, 5.2)
    # One scale for both, so that the two can be compared point by point.
    half = 1.05 * max(float(np.abs(points).max(initial=0)) for points in (student, teacher)) or 1
    for axes, name, points in zip(figure.subplots(1, 2), ("Teacher", "Student"), (teacher, student)):
        dots = axes.scatter(points[:, 0], points[:, 1], s=9, alpha=0.65, linewidths=0, **colors)
        y = "second component" if name == "Teacher" else ""
        _dress(axes, name, x="first component (1 = root mean square distance)", y=y, grid="both", bold=True)
        axes.set(xlim=(-half, half), ylim=(-half, half), aspect="equal")
        axes.locator_params(nbins=5)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    if by_class:
        handles = [
            axes.scatter([], [], s=20, color=dots.cmap(dots.norm(shade)), label=str((names or {}).get(one, one)))
            for shade, one in enumerate(classes)
        ]
        figure.legend(handles=handles, loc="lower center", ncols=10, fontsize=8, frameon=False, handletextpad=0.1)
    else:
        text = "Colour: the direction of the image from the centre of the teacher's plane, the same in both."
        figure.text(0.5, 0.04, text, fontsize=8, color=MUTED, ha="center")
    figure.savefig(path, format="png")


@_where_it_can_be_drawn
def method_plot(path: str | Path, rows: dict[str, list[dict]], metric: str, title: str) -> None:
    """Write a PNG with a line a method: a dot a seed, and a stroke at their mean, the best on top.

    Args:
        path: of the PNG.
        rows: results by method, the best first; those without the metric are left out.
        metric: name of the metric, for the axis, too.
        title: what was compared, on what.
    """
    unit = unit_of(metric)
    values = {
        name: [unit.factor * row[metric] for row in group if row.get(metric) is not None]
        for name, group in rows.items()
    }
    values = {name: some for name, some in values.items() if some}
    figure = _figure(7, 0.9 + 0.28 * len(values))
    axes = figure.add_subplot()
    for height, some in enumerate(reversed(values.values())):
        axes.plot(some, [height] * len(some), "o", color=SHARED, alpha=0.55, markersize=5, markeredgewidth=0)
        axes.plot([sum(some) / len(some)] * 2, [height - 0.3, height + 0.3], color=TEXT, linewidth=1.5)
    axes.set_yticks(range(len(values)), reversed(values))
    _dress(axes, title, x=unit.axis(metric), grid="x")
    axes.tick_params(axis="y", labelsize=9, labelcolor=TEXT)
    figure.tight_layout()
    figure.savefig(path, format="png")


@_where_it_can_be_drawn
def published_plot(path: str | Path, rows: dict[str, tuple[float, list[float]]], metric: str, title: str) -> None:
    """Write a PNG of own figures against published ones: a dot a seed, a stroke at their mean, the name next to it.

    Args:
        path: of the PNG.
        rows: by name, the published figure and that of each seed, in %.
        metric: of the own figures, for the axis.
        title: what was compared, on what.
    """
    figure = _figure(7, 4.5)
    axes = figure.add_subplot()
    for name, (published, own) in rows.items():
        mean = sum(own) / len(own)
        axes.plot([published] * len(own), own, "o", color=SHARED, alpha=0.55, markersize=5, markeredgewidth=0)
        axes.plot([published - 0.4, published + 0.4], [mean] * 2, color=TEXT, linewidth=1.5)
        axes.annotate(name, (published, mean), (6, 0), textcoords="offset points", fontsize=8, color=TEXT, va="center")
    _dress(axes, title, x="published top-1 (%)", y=f"{metric}, here (%)", grid="both")
    axes.margins(x=0.12)
    figure.tight_layout()
    figure.savefig(path, format="png")


@_where_it_can_be_drawn
def quality_plot(path: str | Path, points: dict[str, tuple[float, list[float]]], metric: str, title: str) -> None:
    """Write a PNG of quality against latency: a dot a seed, a stroke at their mean.

    Args:
        path: of the PNG.
        points: by name, milliseconds for one image and the metric of each seed.
        metric: its name, for the axis, too.
        title: what was compared, on what.
    """
    figure = _figure(7.5, 4.2)
    axes = figure.add_subplot()
    widest = max(ms for ms, _ in points.values())
    unit = unit_of(metric)
    heights = [unit.factor * sum(values) / len(values) for _, values in points.values()]
    seen = [unit.factor * value for _, values in points.values() for value in values]
    # Names of rows that are close to each other are moved apart, upwards. A name takes up half of the width.
    gap = 0.055 * (max(seen) - min(seen) or 1)
    places = {}
    for (name, (ms, _)), height in sorted(zip(points.items(), heights, strict=True), key=lambda item: item[1]):
        near = [place for other, place in places.items() if abs(points[other][0] - ms) < 0.7 * widest]
        places[name] = max(height, max(near, default=-1e9) + gap)
    colors = iter(STUDENTS * len(points))
    for name, (ms, values) in points.items():
        color = TEXT if name == "teacher" else next(colors)
        mean = sum(values) / len(values)
        heights = [unit.factor * value for value in values]
        axes.plot([ms] * len(values), heights, "o", color=color, alpha=0.55, markeredgewidth=0)
        axes.plot([ms - 0.012 * widest, ms + 0.012 * widest], [unit.factor * mean] * 2, color=color, linewidth=1.5)
        # Names of slow networks stand on their left: on the right they would leave the picture.
        side, align = (-1, "right") if ms > 0.6 * widest else (1, "left")
        place = (ms + side * 0.03 * widest, places[name])
        axes.annotate(f"{name} {unit.text(mean)}", place, fontsize=8.5, color=color, va="center", ha=align)
    axes.set_xlim(0, 1.1 * widest)
    axes.margins(y=0.12)
    _dress(axes, title, x="milliseconds for one image", y=unit.axis(metric), grid="both")
    figure.tight_layout()
    figure.savefig(path, format="png")


@_where_it_can_be_drawn
def length_plot(
    path: str | Path, plots: dict[str, tuple[dict[str, dict[int, list[float]]], float]], metric: str
) -> None:
    """Write a PNG of a metric against images seen, a plot a comparison, with the teacher as a broken line.

    Args:
        path: of the PNG.
        plots: by title, the values of each seed by method and images seen (0: before training), and the teacher's.
        metric: its name, for the axis, too.
    """
    figure = _figure(4.6 * len(plots), 3.6)
    names = dict.fromkeys(name for methods, _ in plots.values() for name in methods)
    colors = dict(zip(names, STUDENTS * len(names)))
    for axes, (title, (methods, teacher)) in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots.items()):
        _lengths(axes, methods, teacher, metric, colors)
        _dress(axes, title, x="images seen in training", y=unit_of(metric).axis(metric))
    figure.tight_layout(w_pad=3)
    figure.savefig(path, format="png")


def _lengths(
    axes, methods: dict[str, dict[int, list[float]]], teacher: float, metric: str, colors: dict[str, str]
) -> None:
    from matplotlib.ticker import MaxNLocator

    unit = unit_of(metric)
    longest = max(max(by_length) for by_length in methods.values())
    axes.axhline(unit.factor * teacher, color=TEXT, linewidth=1, linestyle="--")
    above = {"textcoords": "offset points", "fontsize": 8.5}
    axes.annotate(f"teacher {unit.text(teacher)}", (0, unit.factor * teacher), (0, 4), color=TEXT, **above)
    means = {
        name: {seen: sum(some) / len(some) for seen, some in sorted(by_length.items())}
        for name, by_length in methods.items()
    }
    ends = {name: own[max(own)] for name, own in means.items()}
    lowest = -1e9
    for name in sorted(ends, key=ends.get):
        color = colors[name]
        for seen, some in methods[name].items():
            heights = [unit.factor * value for value in some]
            axes.plot([seen] * len(some), heights, "o", color=color, alpha=0.4, markersize=4, markeredgewidth=0)
        axes.plot(list(means[name]), [unit.factor * mean for mean in means[name].values()], color=color, linewidth=1.5)
        # Names stand on the right of the last dots; those that are close to each other are moved apart, upwards.
        lowest = max(unit.factor * ends[name], lowest + 5.5)
        place = (1.03 * longest, lowest - 3 if abs(ends[name] - teacher) < 0.02 else lowest)
        axes.annotate(f"{name} {unit.text(ends[name])}", place, fontsize=8.5, color=color, va="center")
    axes.set_ylim(0, 105)
    axes.set_xlim(-0.04 * longest, 1.9 * longest)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    _thousands(axes)
