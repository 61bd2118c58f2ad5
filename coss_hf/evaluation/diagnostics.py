"""Whether a distillation is working, seen on held-out images without labels: a loss alone does not tell."""

PREFIX = "eval_"  # of the evaluations' metrics in the log history of a run

OVERLAP = "overlap10"
RANK = "effective_rank"
TEACHER_RANK = "teacher_effective_rank"
TEACHER_DUPLICATES = "teacher_duplicates"


def has_diagnostics(entry: dict) -> bool:
    """Whether an entry of ``trainer.state.log_history`` is an evaluation with diagnostics."""
    return PREFIX + OVERLAP in entry and PREFIX + RANK in entry


def evaluations(history: list[dict]) -> list[dict]:
    """Evaluations with diagnostics in ``trainer.state.log_history``, the oldest first; names without ``eval_``."""
    return [
        {name.removeprefix(PREFIX): value for name, value in entry.items()}
        for entry in history
        if has_diagnostics(entry)
    ]


def alarms(history: list[dict], images: int, *, finished: bool = False) -> dict[str, str]:
    """What has gone wrong so far, in words, by name.

    * ``teacher``: its effective rank is below 2, or every tenth image has another's embedding.
    * ``collapse``: in two evaluations in a row after the start, or in the last one, the student's effective rank is
      below 2, or below a tenth of the teacher's and half of what it was at the start; or most of its dimensions are
      dead, or most images are embedded as another one.
    * ``no_progress``: three evaluations after the start, or at the end, the overlap of neighbours is not above its
      start by three standard errors.

    Args:
        history: ``trainer.state.log_history``.
        images: Number of images that are evaluated.
        finished: Whether training is over.
    """
    seen = evaluations(history)
    if not seen:
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
            f"--learning_rate or --beta."
        )
    if (len(seen) > 3 or finished) and _stagnated(seen, images):
        found["no_progress"] = (
            f"The student does not come closer to its teacher: {100 * last[OVERLAP]:.1f} % of the 10 nearest "
            f"neighbours are the teacher's, {100 * start[OVERLAP]:.1f} % before training. Check that teacher and "
            f"student see the images as they should (--dry_run)"
            + ("." if "collapse" in found else ", or raise --learning_rate.")
        )
    return found


def _collapsed(evaluation: dict, start: dict) -> bool:
    """Whether an evaluation after the start shows a collapse."""
    if evaluation[RANK] < 2:
        return True
    if evaluation[RANK] < min(0.1 * evaluation[TEACHER_RANK], 0.5 * start[RANK]):
        return True
    return evaluation["dead_dimensions"] > 0.5 or evaluation["duplicates"] > 0.5


def _stagnated(seen: list[dict], images: int) -> bool:
    """Whether the overlap was never above its start by three standard errors."""
    start = seen[0][OVERLAP]
    # Of a mean over 10 draws an image.
    error = max(start * (1 - start) / (10 * images), 1e-12) ** 0.5
    return max(evaluation[OVERLAP] for evaluation in seen[1:]) <= start + 3 * error
