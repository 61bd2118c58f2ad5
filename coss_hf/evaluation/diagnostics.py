"""Whether a distillation is working, seen on held-out images without labels: a loss alone does not tell."""

PREFIX = "eval_"  # of the evaluations' metrics in the log history of a run
# Mark of an evaluation of images that the user gave, which cannot be compared with those of the run.
OF_OTHER_IMAGES = "of_other_images"

OVERLAP = "overlap10"
RANK = "effective_rank"
TEACHER_RANK = "teacher_effective_rank"
TEACHER_DUPLICATES = "teacher_duplicates"
DUPLICATES = "duplicates"
NEIGHBORS = 10  # of the overlap
# Images below which neither ranks nor neighbours tell one network from another.
MIN_IMAGES = 50
# Number of images below which a verdict warns that there are few.
FEW_IMAGES = 500
# What helps a student that is worse than before its training: a larger rate would make it worse still.
# Where both are switched on, this remains; a larger rate is never advised.
OTHERWISE = (
    "Warm-up and clipping are switched on already: try a smaller --learning_rate, a longer run, or another --head."
)
GENTLE = (
    "Long gradients of the first steps often destroy a student: give --warmup_steps 0.1 and --max_grad_norm 1.0, or "
    "leave optimizer, rate, warm-up and clipping to --settings auto."
)
# Images seen below which missing progress says little.
SHORT_RUN = 50_000


def has_diagnostics(entry: dict) -> bool:
    """Whether an entry of ``trainer.state.log_history`` is an evaluation with diagnostics, of the run's own images."""
    return PREFIX + OVERLAP in entry and PREFIX + RANK in entry and OF_OTHER_IMAGES not in entry


def evaluations(history: list[dict]) -> list[dict]:
    """Evaluations with diagnostics in ``trainer.state.log_history``, the oldest first; names without ``eval_``."""
    return [
        {name.removeprefix(PREFIX): value for name, value in entry.items()}
        for entry in history
        if has_diagnostics(entry)
    ]


def alarms(history: list[dict], images: int, *, finished: bool = False, gentle: bool = False) -> dict[str, str]:
    """What has gone wrong so far, in words, by name.

    * ``teacher``: its effective rank is below 2, or every tenth image has another's embedding.
    * ``collapse``: in two evaluations in a row after the start, or in the last one, the student's effective rank is
      below 2, or below a tenth of the teacher's and half of what it was at the start; or most of its dimensions are
      dead, or it embeds half of the images as another one that the teacher tells apart.
    * ``no_progress``: three evaluations after the start, or at the end, the overlap of neighbours is not above its
      start by three standard errors.

    None on fewer than 50 images: an effective rank cannot exceed their number, and neighbours are there by chance.

    Args:
        history: ``trainer.state.log_history``.
        images: Number of images that are evaluated.
        finished: Whether training is over.
        gentle: Whether the training has a warm-up and clips its gradients; see ``is_gentle``.
    """
    seen = evaluations(history)
    if not seen or images < MIN_IMAGES:
        return {}
    found = {}
    start = seen[0]
    last = seen[-1]
    if start[TEACHER_RANK] < 2 or start[TEACHER_DUPLICATES] > 0.1:
        found["teacher"] = (
            f"The teacher's embeddings are degenerate: effective rank {start[TEACHER_RANK]:.1f}, "
            f"{100 * start[TEACHER_DUPLICATES]:.0f} % of the images embedded as another one. Look at "
            f"--teacher_pooling and --teacher_size, and for duplicates among the images."
        )
    if len(seen) == 1:
        return found
    # Two evaluations in a row: the first steps may press all images together for a while.
    if _collapsed(last, start) and (finished or (len(seen) > 2 and _collapsed(seen[-2], start))):
        found["collapse"] = (
            f"The student has collapsed: its embeddings have effective rank {last[RANK]:.1f} (teacher "
            f"{last[TEACHER_RANK]:.1f}), {100 * last['dead_dimensions']:.0f} % of their dimensions are dead, "
            f"{100 * last['duplicates']:.0f} % of the images are embedded as another one. Lower "
            f"--learning_rate, or start from trained weights."
        )
    if (len(seen) > 3 or finished) and _stagnated(seen, images):
        found["no_progress"] = (
            f"The student does not come closer to its teacher: {100 * last[OVERLAP]:.1f} % of the 10 nearest "
            f"neighbours are the teacher's, {100 * start[OVERLAP]:.1f} % before training ({on_images(images)})."
            f"{_so_short(last)} Check that teacher and student see the images as they should (--dry_run)."
        )
        if "collapse" not in found:  # which says what to do
            found["no_progress"] += f" {OTHERWISE if gentle else GENTLE}"
    return found


def is_gentle(args) -> bool:
    """Return whether arguments of a training ask for a warm-up and for clipping."""
    return bool(getattr(args, "warmup_steps", 0)) and bool(getattr(args, "max_grad_norm", 0))


def _collapsed(evaluation: dict, start: dict) -> bool:
    """Whether an evaluation after the start shows a collapse."""
    # A teacher below 2 sees few different images, if it is not at fault itself: then only a constant is a collapse.
    if evaluation[RANK] < (2 if evaluation[TEACHER_RANK] >= 2 else 1):
        return True
    if evaluation[RANK] < min(0.1 * evaluation[TEACHER_RANK], 0.5 * start[RANK]):
        return True
    # Images that the teacher embeds as one are duplicates in the data, of which the student cannot make two.
    merged = evaluation[DUPLICATES] - evaluation.get(TEACHER_DUPLICATES, 0.0)
    return evaluation["dead_dimensions"] > 0.5 or merged > 0.5 * (1 - evaluation.get(TEACHER_DUPLICATES, 0.0))


def chance(images: int) -> float:
    """The overlap of the 10 nearest neighbours of two networks that have nothing to do with each other."""
    return min(1.0, NEIGHBORS / max(images - 1, 1))


def on_images(images: int) -> str:
    """On how many images an overlap was measured, and what it would be by chance: both decide how large it is."""
    return f"on {images:,} images, where {100 * chance(images):.1f} % would be chance"


def overlap_on(images: int) -> str:
    """A sentence on how many images an overlap was measured; on too few to measure one, how many it needs."""
    if images <= NEIGHBORS:
        return f"Overlap: not measured, since it needs {NEIGHBORS + 1} images or more, and there are {images}."
    return f"Overlap {on_images(images)}."


def few_images(images: int) -> str:
    """A sentence on how little a verdict of so few images says; empty where there are enough."""
    if images >= FEW_IMAGES:
        return ""
    return (
        f"This is measured on {images:,} images alone, of which one is {100 / max(images, 1):.1f} points of an "
        f"accuracy: small differences mean nothing."
    )


def _so_short(last: dict) -> str:
    seen = last.get("images_seen")
    if seen is None or seen >= SHORT_RUN:
        return ""
    return f" The run is short: {seen:,} images seen so far."


def _stagnated(seen: list[dict], images: int) -> bool:
    """Whether the overlap was never above its start by three standard errors."""
    start = seen[0][OVERLAP]
    # Of a mean over 10 draws an image.
    error = max(start * (1 - start) / (10 * images), 1e-12) ** 0.5
    return max(evaluation[OVERLAP] for evaluation in seen[1:]) <= start + 3 * error
