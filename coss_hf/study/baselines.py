"""What a student is compared with: controls at equal images seen, the same seeds and initial weights."""

import json
from dataclasses import fields
from pathlib import Path

from coss_hf.reporting.run_record import write_json
from coss_hf.study.timing import images_within
from coss_hf.study.trials import Cell, Setting
from coss_hf.trainer.arguments import ModelArguments
from coss_hf.trainer.training_args import DistillationArguments

CELL = ("output_dir", "method", "seed", "num_images", "neighbors_k", "beta")
WITHOUT_LABELS = ("overlap10", "cosine")
COSINE, PLAIN = "coss, cosine only", "coss, no neighbours"


def trained_cells(
    pair: str, training: DistillationArguments, seeds: int, split: str, methods: list[str] = ()
) -> list[Cell]:
    """CoSS, what it is made of, and other ``methods``, each with every seed.

    Without neighbours a step takes as many images as with them.
    """
    k, anchors = training.neighbors_k, training.per_device_train_batch_size
    rows = [(COSINE, "coss(lambda_ss=0)", k, None), ("coss", "coss", k, None)]
    rows += [(PLAIN, "coss", 0, anchors * (1 + k))] if k else []
    rows += [(method, method, k, None) for method in dict.fromkeys(methods) if method != "coss"]
    return [
        Cell(pair, name, expression, 1, seed, training.num_images, split, k, anchors)
        for name, expression, k, anchors in rows
        for seed in range(1, seeds + 1)
    ]


def untrained_cells(pair: str, models: ModelArguments, seeds: int, split: str) -> list[Cell]:
    """Random weights, the student's own where it starts from any, and the teacher."""
    cells = [Cell(pair, "random", "", 0, seed, 0, split) for seed in range(1, seeds + 1)]
    if models.student_init != "random":
        cells.append(Cell(pair, "initial", "", 0, 1, 0, split))
    return [*cells, Cell(pair, "teacher", "", 0, 1, 0, split)]


def check_study(training: DistillationArguments, hours: float | None, seeds: int, jobs: int, splits) -> str:
    """Name of the split that is measured on. Raises ValueError for what cannot be compared."""
    if (hours is None) == (training.num_images is None):
        raise ValueError("--hours or --num_images: give one of them, the length of the comparison.")
    if hours is not None and hours <= 0:
        raise ValueError(f"--hours={hours} must be above 0.")
    if seeds < 3 or jobs < 1:
        raise ValueError(
            f"--seeds={seeds} must be at least 3, for intervals that mean something, and --jobs={jobs} at least 1."
        )
    if training.seed != DistillationArguments.seed:
        raise ValueError(f"--seed={training.seed}: the runs have the seeds 1 to {seeds}; give --seeds, their number.")
    if splits.test is None and splits.validation is None:
        raise ValueError("--validation_size: there is no test split, so hold images out of train to compare on.")
    return "test" if splits.test is not None else "validation"


def check_report(metric: str, splits) -> None:
    """Raises ValueError where there is nothing to report on."""
    if splits.test is None:
        raise ValueError("--test_split: a table is reported on test images, and there are none; name their split.")
    if splits.label_column is None and metric not in WITHOUT_LABELS:
        raise ValueError(f"--metric={metric} needs labels, and none were found: name --label_column.")


def changed(given: DistillationArguments) -> dict:
    """What differs from the defaults, and holds for every run."""
    plain = DistillationArguments(use_cpu=given.use_cpu)
    names = [one.name for one in fields(given) if one.init and one.name not in CELL]
    found = {name: getattr(given, name) for name in names if getattr(given, name) != getattr(plain, name)}
    return found | {"use_cpu": given.use_cpu}


def length(folder: Path, hours: float, trained: list[Cell], others: list[Cell], setting: Setting) -> int:
    """Images of a run, so that all fit the hours. Kept: a second look would find other speeds, and make other cells."""
    path = folder / "length.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if known.get("hours") != hours:
        known = {"hours": hours, "num_images": images_within(3600 * hours, trained, others, setting)}
        write_json(path, known)
    return known["num_images"]
