"""Whether a distillation is working, seen on held-out images without labels: a loss alone does not tell."""

import logging

logger = logging.getLogger(__name__)

OVERLAP, RANK, TEACHER_RANK = "eval_overlap10", "eval_effective_rank", "eval_teacher_effective_rank"


def panels(history: list[dict]) -> list[dict]:
    """The panels of ``trainer.state.log_history``, oldest first."""
    return [entry for entry in history if OVERLAP in entry and RANK in entry]


def alarms(history: list[dict], images: int, *, finished: bool = False) -> dict[str, str]:
    """What has gone wrong so far, in words, by name.

    * ``teacher``: its effective rank is below 2, or every tenth image has another's embedding.
    * ``collapse``: in two panels in a row after the start, or in the last one, the student's effective rank is below
      2, or below a tenth of the teacher's and half of what it was at the start; or most of its dimensions are dead, or
      most images embedded as another one.
    * ``no_progress``: three panels after the start, or at the end, the overlap of neighbours is not above its start by
      three standard errors.

    Args:
        history: ``trainer.state.log_history``.
        images: of the panel.
        finished: whether training is over.
    """
    found, seen = {}, panels(history)
    if not seen:
        return found
    start, last = seen[0], seen[-1]
    if start[TEACHER_RANK] < 2 or start["eval_teacher_duplicates"] > 0.1:
        found["teacher"] = (
            f"The teacher's embeddings are degenerate: effective rank {start[TEACHER_RANK]:.1f}, "
            f"{100 * start['eval_teacher_duplicates']:.0f} % of the images embedded as another one. Look at "
            f"--teacher_pooling and --teacher_size, and for duplicates among the images."
        )
    if last is start:
        return found
    # Two panels in a row: the first steps may press all images together for a while.
    if _collapsed(last, start) and (finished or _collapsed(seen[-2], start)):
        found["collapse"] = (
            f"The student has collapsed: its embeddings have effective rank {last[RANK]:.1f} (teacher "
            f"{last[TEACHER_RANK]:.1f}), {100 * last['eval_dead_dimensions']:.0f} % of their dimensions are dead, "
            f"{100 * last['eval_duplicates']:.0f} % of the images are embedded as another one. Lower "
            f"--learning_rate or --beta."
        )
    # Of a mean over 10 draws an image.
    error = max(start[OVERLAP] * (1 - start[OVERLAP]) / (10 * images), 1e-12) ** 0.5
    if (len(seen) > 3 or finished) and max(entry[OVERLAP] for entry in seen[1:]) <= start[OVERLAP] + 3 * error:
        found["no_progress"] = (
            f"The student does not come closer to its teacher: {100 * last[OVERLAP]:.1f} % of the 10 nearest "
            f"neighbours are the teacher's, {100 * start[OVERLAP]:.1f} % before training. Check that teacher and "
            f"student see the images as they should (--dry_run)"
            + ("." if "collapse" in found else ", or raise --learning_rate.")
        )
    return found


def _collapsed(panel: dict, start: dict) -> bool:
    fallen = panel[RANK] < min(0.1 * panel[TEACHER_RANK], 0.5 * start[RANK])
    dead, same = panel["eval_dead_dimensions"] > 0.5, panel["eval_duplicates"] > 0.5
    return panel is not start and (panel[RANK] < 2 or fallen or dead or same)
