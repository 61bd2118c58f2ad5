"""What a run prints last: what it came to, and what to do with the student."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from coss_hf.evaluation.diagnostics import evaluations, few_images, overlap_on
from coss_hf.evaluation.tables import table
from coss_hf.utils.messages import command_to, for_reader


def closing_summary(
    output_dir: str,
    record: dict,
    in_teacher_space: bool,
    *,
    from_module: bool = False,
    own_code: bool = False,
    in_python: bool = False,
) -> str:
    """The table, the verdict, the page, how the student is used and how it is pushed.

    Args:
        output_dir: folder of the run.
        record: of ``write_record``.
        in_teacher_space: whether the student's embeddings can be compared with the teacher's.
        from_module: whether the student is a plain module, which only its owner can build.
        own_code: whether the student brings code of its own.
        in_python: whether it is for somebody who called the trainer, instead of a command.
    """
    results = record["results"]
    blocks = []
    if results:
        blocks = [f"{table(results)}\n\n{overlap_on(record['evaluated_images'])}"]
    if record["verdict"]:
        blocks.append("\n".join([*record["verdict"], *map(for_reader, _more_images(record))]))
    blocks.append(f"The page of this run: {Path(output_dir, 'report.html')}")
    lines = _use(str(output_dir), in_teacher_space, from_module, own_code)
    blocks.append("Use the student:\n" + "\n".join(f"    {line}" for line in lines))
    blocks.append(f"Push it to the Hub:\n    {'trainer.push_to_hub()' if in_python else _push(str(output_dir))}")
    return "\n\n".join(blocks)


def _more_images(record: dict) -> list[str]:
    if record.get("evaluated_images") is None:
        if record.get("watched_images"):  # of an evaluator of the user's own
            return []
        return ["To evaluate the next run, hold images out of the training with --validation_size."]
    if not few_images(record["evaluated_images"]):
        return []
    of_train = record["evaluated_on"] == "validation"
    return ["To measure on more, hold out more with --validation_size." if of_train else "Give more test images."]


def _use(output_dir: str, in_teacher_space: bool, from_module: bool, own_code: bool) -> list[str]:
    """Three lines of Python at most."""
    trust = ", trust_remote_code=True" if own_code else ""
    module = f", module=...{trust})  # built as the trained one was" if from_module else f"{trust})"
    if in_teacher_space:
        return [
            "import coss_hf",
            f'student = coss_hf.Student.from_pretrained("{output_dir}"{module}',
            "embeddings = student.encode(images)  # PIL images or paths, in the teacher's space",
        ]
    if from_module:
        return [
            "import coss_hf",
            f'student = coss_hf.load_backbone("{output_dir}"{module}',
            "embeddings = coss_hf.embed(student, images)",
        ]
    return ["import coss_hf", f'embeddings = coss_hf.embed("{output_dir}", images{trust})']


def _push(output_dir: str) -> str:
    name = Path(output_dir).absolute().name
    return f"{command_to('push')} {shlex.join([output_dir, '--repo_id', f'USER/{name}'])}"


def next_lines(
    output_dir: str, log_history: Sequence[dict], last_step: int, *, best: int | None = None, can_report: bool = True
) -> str:
    """What ``DistillationTrainer.train`` prints last: how far the student came, and which calls follow.

    Args:
        output_dir: folder of the run.
        log_history: of the trainer's state.
        last_step: of the training.
        best: step of the best student, where that one was loaded in the end.
        can_report: whether the trainer has the images themselves, and not only views of them.
    """
    lines = []
    seen = [one for one in evaluations(log_history) if one.get("overlap10") is not None]
    of_student = [one for one in seen if not best or one["step"] == best]
    if seen and seen[0]["step"] == 0 and of_student and of_student[-1]["step"] > 0:
        step = of_student[-1]["step"]
        when = "after it" if step == last_step else f"at step {step:,}"
        if best:
            when += ", whose student was the best and is loaded"
        lines.append(
            f"Nearest neighbours shared with the teacher, on images held out: {100 * seen[0]['overlap10']:.1f} % "
            f"before the training, {100 * of_student[-1]['overlap10']:.1f} % {when}."
        )
    report = ", and trainer.report() compares it with its teacher and with random weights" if can_report else ""
    lines.append(f"Next: trainer.save_model() writes the student to {output_dir}{report}.")
    return "\n".join(lines)
