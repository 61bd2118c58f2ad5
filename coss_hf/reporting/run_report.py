"""What a run leaves on disk next to the student: its record, its pictures and its page."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from coss_hf.data.reading import ImageReader
from coss_hf.evaluation.diagnostics import MIN_IMAGES, alarms, evaluations, few_images, is_gentle, on_images, overlap_on
from coss_hf.evaluation.knn import nearest
from coss_hf.evaluation.projection import planes
from coss_hf.evaluation.retrieval import MAX_QUERIES
from coss_hf.evaluation.tables import cells, sample_of_overlap
from coss_hf.reporting.html_page import code, heading, html_table, image, page, paragraph
from coss_hf.reporting.plots import loss_curve, neighbor_picture, panel_curves, projection_picture
from coss_hf.reporting.run_record import command, versions, write_json
from coss_hf.utils.messages import for_reader

FAILED = "It did not help"
NOT_EVALUATED = (
    "Not evaluated: no images were held out of the training, so that nothing shows whether the training helped."
)
PICTURES = (
    (
        "panel.png",
        "Agreement during training",
        "On images held out of training; all but the accuracies need no labels.",
    ),
    ("neighbors.png", "Nearest neighbours", "Green: in both networks' lists."),
    ("projection.png", "Both spaces", "First two principal components; the student's turned to match the teacher's."),
    ("loss.png", "Loss", ""),
)


def remove_pictures(output_dir: str | Path) -> None:
    """Remove those of the run that is replaced: the page shows what is there, and the new run may draw fewer."""
    for name, *_ in PICTURES:
        Path(output_dir, name).unlink(missing_ok=True)


def write_record(output_dir, trainer, results: dict, splits, problems: Sequence[str] = ()) -> dict:
    """Write ``run.json``, and return it: command, arguments, what was resolved, images seen, results, verdict.

    ``problems`` are sentences on what went wrong after the training; the verdict begins with them.
    """
    history = trainer.state.log_history
    monitored = len(trainer.evaluator.test_images) if trainer.evaluator else None
    held_out = splits.test or splits.validation
    evaluated = len(held_out) if held_out is not None else None
    raised = []
    if monitored:
        raised = [*alarms(history, monitored, finished=True, gentle=is_gentle(trainer.args)).values()]
    verdict = [*problems, *summary(results, history, raised, evaluated, monitored)]
    if evaluated is None and not monitored:
        verdict.append(NOT_EVALUATED)
    record = {
        "command": command(),
        "images_seen": trainer.images_seen,
        "teacher": repr(trainer.teacher),
        "student": repr(trainer.student),
        "results": results,
        "verdict": [for_reader(sentence) for sentence in verdict],
        "problems": [for_reader(sentence) for sentence in problems],
        "alarms": [for_reader(sentence) for sentence in raised],
        "evaluated_on": None if evaluated is None else "test" if splits.test is not None else "validation",
        "evaluated_images": evaluated,
        # Of a stream it has the first ones alone.
        "train_images": None if splits.train is None or splits.stream is not None else len(splits.train),
        "watched_images": monitored,
        "bad_images": splits.bad_images,
        "replaced_images": trainer.train_dataset.replaced_names(),
        "versions": versions(),
        "arguments": trainer.arguments,
        "settings": trainer.settings.record(),
    }
    write_json(Path(output_dir, "run.json"), record)
    return record


class NeighborExamples(NamedTuple):
    """Queries and what is nearest to them, as rows of the held-out images.

    Attributes:
        images: PIL images by row.
        queries: ``q`` rows.
        student: ``(q, n)`` rows of the student's nearest, the nearest first.
        teacher: ``(q, n)`` rows of the teacher's nearest.
    """

    images: dict[int, Image.Image]
    queries: list[int]
    student: np.ndarray
    teacher: np.ndarray


def write_pictures(
    output_dir, trainer, evaluator, queries: int = 8, neighbors: int = 6, points: int = 2000
) -> tuple[NeighborExamples | None, dict | None]:
    """Write ``loss.png`` and ``panel.png`` and, with an evaluator, ``neighbors.png`` and ``projection.png``.

    Args:
        output_dir: folder of the run.
        trainer: a ``DistillationTrainer``.
        evaluator: of the held-out images; None where there are none.
        queries: number of images whose neighbours are shown.
        neighbors: number of neighbours shown for each.
        points: number of images in the projection at most.

    Returns:
        Examples of neighbours; and ``teacher`` and ``student`` coordinates ``(points, 2)`` with their ``labels`` or
        None. None for both without an evaluator.
    """
    folder = Path(output_dir)
    history = trainer.state.log_history
    if any("loss" in line for line in history):
        loss_curve(folder / "loss.png", history)
    if evaluations(history):
        monitored = len(trainer.evaluator.test_images) if trainer.evaluator else None
        panel_curves(folder / "panel.png", evaluations(history), monitored)
    if evaluator is None or len(evaluator.test_images) <= neighbors + 1:
        return None, None
    teacher = evaluator.teacher_test_features
    student = evaluator.embed(trainer.student, evaluator.test_images, "Picture")
    examples = _neighbor_examples(evaluator, student, teacher, queries, neighbors)
    neighbor_picture(folder / "neighbors.png", examples.images, examples.queries, examples.student, examples.teacher)
    projection = _projection(evaluator, student, teacher, points)
    names = dict(enumerate(evaluator.class_names))
    points = (projection["student"], projection["teacher"])
    projection_picture(folder / "projection.png", *points, projection["labels"], names)
    return examples, projection


def _neighbor_examples(
    evaluator, student: torch.Tensor, teacher: torch.Tensor, queries: int, neighbors: int
) -> NeighborExamples:
    rows = np.linspace(0, len(teacher) - 1, queries).round().astype(int)
    of_student = _nearest_others(student, rows, neighbors)
    of_teacher = _nearest_others(teacher, rows, neighbors)
    reader = ImageReader(evaluator.test_images, evaluator.image_column, evaluator.on_bad_image)
    shown = {*rows.tolist(), *of_student.ravel().tolist(), *of_teacher.ravel().tolist()}
    images = dict(zip(shown, reader.read(list(shown)), strict=True))
    return NeighborExamples(images, rows.tolist(), of_student, of_teacher)


def _nearest_others(embeddings: torch.Tensor, rows: np.ndarray, count: int) -> np.ndarray:
    """The image itself is left out by its row: exact duplicates tie with it."""
    _, candidates = nearest(embeddings[rows], embeddings, count + 1)
    others = [
        [candidate for candidate in line if candidate != row][:count]
        for line, row in zip(candidates.tolist(), rows, strict=True)
    ]
    return np.array(others)


def _projection(evaluator, student: torch.Tensor, teacher: torch.Tensor, points: int) -> dict:
    chosen = torch.randperm(len(teacher), generator=torch.Generator().manual_seed(0))[:points]
    student_plane, teacher_plane = planes(student[chosen], teacher[chosen])
    labels = evaluator.test_labels
    return {
        "student": student_plane.numpy(),
        "teacher": teacher_plane.numpy(),
        "labels": None if labels is None else labels[chosen].tolist(),
    }


def summary(
    results: dict[str, dict],
    history: list[dict],
    found: list[str],
    evaluated: int | None = None,
    monitored: int | None = None,
) -> list[str]:
    """Say in sentences what a run came to.

    Args:
        results: of ``compare``.
        history: ``trainer.state.log_history``.
        found: alarms, which come last.
        evaluated: number of images of ``results``; None where it is not known.
        monitored: number of images of the evaluations during training; None where it is not known.
    """
    if not results:
        return found
    labelled = results["student"].get("knn20") is not None
    key = "knn20" if labelled else "overlap10"
    student = results["student"].get(key)
    random = results["random"].get(key)
    teacher = results["teacher"].get(key)
    if None in (student, random, teacher):
        return found
    # A student that came with weights of its own is better than at random ones before any training.
    seen = [entry[key] for entry in evaluations(history) if entry.get(key) is not None]
    too_few = evaluated is not None and evaluated < MIN_IMAGES
    if too_few:
        first = f"{evaluated:,} images are too few to tell whether it helped, which takes {MIN_IMAGES} or more"
    elif student <= random:
        first = f"{FAILED}: the student is no better than at random weights"
    elif len(seen) > 1 and seen[-1] <= seen[0] and (monitored is None or monitored >= MIN_IMAGES):
        first = (
            f"{FAILED}: on the images evaluated during training the student is no better than before it "
            f"({100 * seen[-1]:.1f} %, before {100 * seen[0]:.1f} %)"
        )
    elif found:
        first = "The student is better than at random weights, but something is wrong, see below"
    else:
        first = "The student has learnt from its teacher"
    values = f"{100 * student:.1f} %, at random weights {100 * random:.1f} %"
    measured = f"share of the 10 nearest neighbours that it has in common with its teacher {values}"
    if evaluated is not None:
        measured += f" ({on_images(evaluated)})"
    if labelled:
        measured = f"k-NN 20 accuracy {values}, its teacher {100 * teacher:.1f} %"
    few = few_images(evaluated) if evaluated is not None else ""
    return [f"{first}: {measured}.", *([few] if few else []), *found]


def write_page(output_dir, trainer, record: dict) -> None:
    """Write ``report.html``: what ``run.json`` and the pictures hold, on one page that needs no other file.

    Args:
        output_dir: folder of the run.
        trainer: a ``DistillationTrainer``.
        record: of ``write_record``.
    """
    folder = Path(output_dir)
    warnings = [*record["alarms"], *record.get("problems", [])]
    parts = [
        paragraph(text, "alarm" if text in warnings or text.startswith(FAILED) else "lead")
        for text in record["verdict"]
    ]
    if record["results"]:
        parts.append(html_table(cells(record["results"])))
        parts.append(
            paragraph(
                f"On images that were not trained on (split {record['evaluated_on']}), in %, cosine in [-1, 1]; mAP: "
                f"of {MAX_QUERIES:,} of them at most; random: the student at random weights.{sample_of_overlap(record)}"
            )
        )
    for name, title, caption in PICTURES:
        if (folder / name).is_file():
            if name == "panel.png" and record.get("watched_images"):
                caption += f" {overlap_on(record['watched_images'])}"
            parts += [heading(title), image(folder / name, caption)]
    parts += [heading("How it was made"), code(record["command"])]
    facts = {"images seen": f"{record['images_seen']:,}", "teacher": record["teacher"], "student": record["student"]}
    for name, value in trainer.identity().items():
        facts[f"{name.lstrip('-')} (fingerprint)"] = value
    facts |= record["versions"]
    given = {name: value for name, value in record["arguments"].items() if value is not None}
    parts += [code("\n".join(f"{name}: {value}" for name, value in lines.items())) for lines in (facts, given)]
    (folder / "report.html").write_text(page(f"{folder.absolute().name}: {record['images_seen']:,} images seen", parts))
