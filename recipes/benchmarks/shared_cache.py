"""Measure what a study saves where its trials share the teacher's embeddings: forward passes and wall time.

    python recipes/benchmarks/shared_cache.py --dataset path/to/cifar10 --output shared_cache.jsonl

The trials are those with which ``coss-hf reproduce --table 1`` chooses: 11 methods x 3 scales, resnet56 -> resnet20,
one seed, the same views in each of them; but ``factor`` trains its part for 5 steps beforehand. Each is trained and
measured twice, live (the teacher embeds each view) and shared (each embedding is read from one cache that the trials
before it have filled), in turns, so that both meet the machine in the same state. Methods that compare feature maps
cannot use a cache: their teacher embeds each view in both.

A line of the file is one trial in one of both ways. The same command resumes where it stopped, with the teacher and the
cache that it keeps in a folder next to the file. Images that the teacher embeds for the evaluation are not counted:
they are embedded once, before the first trial. By default the teacher is at random weights, which changes neither
passes nor times.
"""

import argparse
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from result_lines import add_line, read_lines
from trainer_step import machine, now, restart_with_kept_memory

from coss_hf.study import paper_tables as paper
from coss_hf.study.baselines import untrained_trial
from coss_hf.study.reproduction import ReproduceArguments, study_config
from coss_hf.study.teachers import save_untrained
from coss_hf.study.trials import StudyConfig, Trial, run_trial
from coss_hf.trainer.arguments import DataArguments

PAIR = "resnet20/resnet56"
WAYS = ("live", "shared")
# Rows of table 1; the part that `factor` trains beforehand would take more than all the rest.
METHODS = [name if name != "factor" else "factor(pretraining_steps=5)" for name in paper.ROWS[1]]


def configurations(options: argparse.Namespace, folder: Path) -> dict[str, StudyConfig]:
    """Return the study with its teacher live, and with a shared cache; the views come back after one epoch in both."""
    teacher = options.teacher or str(folder / "teacher")
    if not options.teacher and not (folder / "teacher").exists():
        torch.manual_seed(0)
        save_untrained("resnet56", folder / "teacher")
    data = DataArguments(
        dataset=options.dataset, max_train_samples=options.train_images, validation_size=options.held_out
    )
    args = ReproduceArguments(
        pairs=[PAIR],
        view_epochs=1,
        batch_size=options.batch_size,
        use_cpu=not torch.cuda.is_available(),
        output_dir=str(folder),
    )
    shared = study_config(args, data, {PAIR: teacher})
    live = replace(shared, training=shared.training | {"teacher_cache": None})
    return {"live": live, "shared": shared}


def missing(output: Path, trials: list[Trial]) -> Iterator[tuple[Trial, str]]:
    """Yield the trials that the file does not hold yet, in both ways; each trial begins with the other way."""
    done = {(line["method"], line["scale"], line["way"]) for line in read_lines(output)}
    for number, trial in enumerate(trials):
        for way in WAYS[:: 1 if number % 2 else -1]:
            if (trial.method, trial.scale, way) not in done:
                yield trial, way


def summary(output: Path) -> str:
    """Return passes and wall time of both ways, of all methods and of those that can use a cache."""
    rows = read_lines(output)
    cached = {row["method"] for row in rows if row["cached"]}
    lines = ["methods                        trials  way     teacher images  wall, s"]
    for name, kept in (("all", lambda row: True), ("of embeddings and logits", lambda row: row["method"] in cached)):
        for way in WAYS:
            found = [row for row in rows if row["way"] == way and kept(row)]
            images = sum(row["teacher_images"] for row in found)
            seconds = sum(row["seconds"] for row in found)
            lines.append(f"{name:<31}{len(found):>6}  {way:<8}{images:>14,}{seconds:>9.1f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--dataset", required=True, help="labelled images of 32 pixels, with a train split")
    parser.add_argument("--teacher", help="folder of a resnet56 with its classifier; default: random weights")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="rows of the paper's table 1, or expressions")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.5, 1, 2])
    parser.add_argument("--train_images", type=int, default=256)
    parser.add_argument("--held_out", type=int, default=200, help="images that a trial is measured on")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of a trial, all with the same views")
    parser.add_argument("--batch_size", type=int, default=64)
    options = parser.parse_args()
    restart_with_kept_memory()
    images = options.epochs * options.train_images
    trials = paper.choice_trials(1, PAIR, options.methods, options.scales, images)
    folder = options.output.with_name(options.output.name + ".files")
    study = configurations(options, folder)
    # Also what both share: images, teacher, and its embeddings of the images that are measured on.
    run_trial(untrained_trial(PAIR, "teacher", 1, "validation"), study["live"], folder / "trial")
    for trial, way in missing(options.output, trials):
        shutil.rmtree(folder / "trial", ignore_errors=True)
        start = now()
        row = run_trial(trial, study[way], folder / "trial")
        line = {
            "method": trial.method,
            "scale": trial.scale,
            "way": way,
            "images_seen": row["images_seen"],
            "teacher_images": row["teacher_images"],
            "cached": row.get("shared_views", {}).get("teacher_cache", False),
            "seconds": round(now() - start, 2),
            "machine": machine(),
        }
        add_line(options.output, line)
        print(line, flush=True)
    print(summary(options.output))


if __name__ == "__main__":
    main()
