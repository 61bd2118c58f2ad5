"""What a run prints last: what it came to, and what to do with the student."""

import shlex
from pathlib import Path

from coss_hf.evaluation.diagnostics import on_images
from coss_hf.evaluation.tables import table
from coss_hf.utils.messages import command_to


def closing_summary(output_dir: str, record: dict, in_teacher_space: bool) -> str:
    """The table, the verdict, the page, how the student is used and how it is pushed.

    Args:
        output_dir: folder of the run.
        record: of ``write_record``.
        in_teacher_space: whether the student's embeddings can be compared with the teacher's.
    """
    results = record["results"]
    blocks = ["No test or validation images: nothing was evaluated."]
    if results:
        blocks = [f"{table(results)}\n\nOverlap {on_images(record['evaluated_images'])}."]
    elif record.get("problems"):
        blocks = []  # the verdict begins with them
    if record["verdict"]:
        blocks.append("\n".join(record["verdict"]))
    blocks.append(f"The page of this run: {Path(output_dir, 'report.html')}")
    lines = ["import coss_hf"]
    if in_teacher_space:
        lines.append(f'student = coss_hf.Student.from_pretrained("{output_dir}")')
        lines.append("embeddings = student.encode(images)  # PIL images or paths, in the teacher's space")
    else:
        lines.append(f'embeddings = coss_hf.embed("{output_dir}", images)')
    blocks.append("Use the student:\n" + "\n".join(f"    {line}" for line in lines))
    name = Path(output_dir).absolute().name
    blocks.append(
        f"Push it to the Hub:\n    {command_to('push')} {shlex.join([str(output_dir), '--repo_id', f'USER/{name}'])}"
    )
    return "\n\n".join(blocks)
