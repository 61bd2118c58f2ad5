"""What a run tells its trackers, whichever they are: scalars in groups, and at the end results, pictures and tables."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

PICTURES = ("loss.png", "panel.png", "neighbors.png", "projection.png")
GROUPS = {
    "agreement": ("overlap10", "cosine", "dimension_cosine", "cka"),
    "student": ("effective_rank", "dead_dimensions", "duplicates"),
    "teacher": ("teacher_effective_rank", "teacher_duplicates"),
    "labels": ("knn10", "knn20", "probe"),
    "speed": (
        "images_per_second",
        "teacher_share",
        "data_wait_share",
        "runtime",
        "samples_per_second",
        "steps_per_second",
    ),
}
GROUP = {name: group for group, names in GROUPS.items() for name in names}


def grouped(logs: dict[str, float]) -> dict[str, float]:
    """Names of a log line as ``group/name``; what was computed on held-out images and is of no group is ``eval``."""
    found = {}
    for key, value in logs.items():
        name = key.removeprefix("eval_")
        if key == "images_seen":
            found[key] = value
        else:
            group = GROUP.get(name, "eval" if name != key else "train")
            found[f"{group}/{name.removeprefix('teacher_') if group == 'teacher' else name}"] = value
    return found


def without_totals(logs: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """The scalars of a log line, and apart from them the totals of a complete training, which are no curve."""
    totals = {name: value for name, value in logs.items() if name.startswith("train_")}
    return {name: value for name, value in logs.items() if name not in totals}, totals


def settings_of(trainer) -> dict[str, dict]:
    """What a run was given, for a tracker's configuration: fingerprints, sizes and arguments."""
    return {
        "fingerprints": {name.lstrip("-"): value for name, value in trainer.identity(search=False).items()},
        "parameters": {"teacher": trainer.teacher.num_parameters(), "student": trainer.student.num_parameters()},
        "arguments": trainer.arguments,
    }


class Table(NamedTuple):
    """Columns and rows; a cell is a number, a text or a PIL image."""

    columns: list[str]
    rows: list[list]


@dataclass
class EndOfRun:
    """What trackers keep of the end of a run.

    Attributes:
        images_seen: number of images seen in training.
        results: metrics as ``final/network/name``.
        pictures: PNG files as ``pictures/name``.
        pages: HTML files by name.
        tables: by name.
    """

    images_seen: int
    results: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, Path] = field(default_factory=dict)
    pages: dict[str, Path] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)


def end_of_run(trainer, report) -> EndOfRun:
    """Collect what trackers keep of a run that has written its report.

    Args:
        trainer: a ``DistillationTrainer``.
        report: its ``RunReport``.
    """
    folder = Path(trainer.args.output_dir)
    end = EndOfRun(trainer.images_seen)
    for network, row in report.record["results"].items():
        end.results |= {f"final/{network}/{name}": value for name, value in row.items()}
    end.pictures = {f"pictures/{Path(name).stem}": folder / name for name in PICTURES if (folder / name).is_file()}
    if (folder / "report.html").is_file():
        end.pages["report"] = folder / "report.html"
    if report.neighbors is not None:
        end.tables["neighbors"] = _neighbor_table(report.neighbors)
    if report.projection is not None:
        end.tables["projection"] = _projection_table(report.projection)
    return end


def _neighbor_table(examples) -> Table:
    count = len(examples.teacher[0])
    names = [f"{network} {i}" for network in ("teacher", "student") for i in range(1, count + 1)]
    rows = []
    for query, teacher, student in zip(examples.queries, examples.teacher, examples.student, strict=True):
        found = [*teacher.tolist(), *student.tolist()]
        shared = len({*teacher.tolist()} & {*student.tolist()})
        rows.append([examples.images[query], shared, *(examples.images[row] for row in found)])
    return Table(["query", "shared", *names], rows)


def _projection_table(projection: dict) -> Table:
    columns = [*projection["teacher"].T.tolist(), *projection["student"].T.tolist()]
    labels = projection["labels"]
    columns.append([""] * len(columns[0]) if labels is None else [str(label) for label in labels])
    names = ["teacher_x", "teacher_y", "student_x", "student_y", "label"]
    return Table(names, [list(row) for row in zip(*columns, strict=True)])
