"""Did it help? CoSS beside its controls at equal images seen, quality against cost, on one page.

    python recipes/report.py --teacher facebook/dinov2-small --student timm/resnet18.a1_in1k \
        --dataset path/to/images --hours 8 --neighbors_k 3 --output_dir report

Rows: random weights, the student's own weights if it has any, cosine alone (lambda_ss=0), CoSS without neighbours, CoSS
(with --neighbors_k), the teacher. Each trained row runs with the same seeds, from the same initial weights, on as many
images as --hours allow (or --num_images). Quality is measured on test images (else on what --validation_size holds
out): linear evaluation, probe, k-NN and retrieval where there are labels, agreement with the teacher in any case. Cost
is measured here: parameters, multiply-adds, bytes, latency. Flags are those of recipes/distill.py. The same command
goes on where it stopped. `report.html` in the output folder is the page; report.jsonl, report.json, report.md and
report.png are its rows, costs, table and plot.
"""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

from coss_hf.cli import bad_input_exits, parse
from coss_hf.evaluation.retrieval import MAX_QUERIES
from coss_hf.reporting.html_page import code, heading, html_table, image, page, paragraph
from coss_hf.reporting.plots import quality_plot
from coss_hf.reporting.run_record import command, versions, write_json
from coss_hf.study.baselines import changed, check_study, length, trained_cells, untrained_cells
from coss_hf.study.costs import costs, device_name
from coss_hf.study.sweep import Sweep
from coss_hf.study.tables import as_markdown, cells_of, extra_passes, ranked
from coss_hf.study.trials import UNTRAINED, Setting, load
from coss_hf.study.verdict import verdict
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.trainer.training_args import DistillationArguments


@dataclass
class ReportArguments:
    """How much of it."""

    seeds: int = field(default=3, metadata={"help": "Runs of each row; 3 at least tell noise from difference."})
    hours: float | None = field(default=None, metadata={"help": "Of everything, on this machine; or --num_images."})
    jobs: int = field(default=1, metadata={"help": "Runs side by side."})
    timing_rounds: int = field(default=20, metadata={"help": "Timed runs of each network and batch size."})


def cost_table(found: dict[str, dict]) -> list[list[str]]:
    """Header and a line a network."""
    header = [
        "",
        "parameters",
        "multiply-adds",
        "bytes",
        *(f"{unit}, batch {n}" for n in (1, 64) for unit in ("ms", "images/s")),
    ]
    lines = [
        [name, *(f"{one[key]:,}" for key in ("parameters", "macs", "bytes"))]
        + [
            f"{one[f'batch_{n}'][key]:,.{digits}f}"
            for n in (1, 64)
            for key, digits in (("ms", 2), ("images_per_second", 0))
        ]
        for name, one in found.items()
    ]
    return [header, *lines]


def quality_table(rows: list[dict], metric: str) -> list[list[str]]:
    """As of a comparison; with one scale for all."""
    return [[cell for column, cell in enumerate(line) if column != 1] for line in cells_of(rows, metric)]


def write(folder: Path, title: str, rows: list[dict], metric: str, cost: dict, hardware: str, facts: dict) -> None:
    """The page and its parts."""
    said = verdict(rows, metric, cost)
    scored = {
        name: [row[metric] for row in group if row.get(metric) is not None]
        for name, group in ranked(rows, metric).items()
    }
    points = {
        name: (cost["teacher" if name == "teacher" else "student"]["batch_1"]["ms"], values)
        for name, values in scored.items()
        if values
    }
    quality_plot(folder / "report.png", points, metric, title)
    write_json(
        folder / "report.json", {"verdict": said, "metric": metric, "costs": cost, "hardware": hardware, **facts}
    )
    quality, costing = quality_table(rows, metric), cost_table(cost)
    below = (
        f"In %, means over seeds with 95 % t-intervals, on the {facts['split']} split (mAP: {MAX_QUERIES:,} of its "
        f"images at most). Times: {hardware}."
    )
    below = " ".join([below, *extra_passes(rows)])
    text = [f"# {title}", *said, as_markdown(quality), as_markdown(costing), below, f"`{facts['command']}`"]
    (folder / "report.md").write_text("\n\n".join(text) + "\n")
    parts = [*(paragraph(sentence, "lead") for sentence in said), html_table(quality), image(folder / "report.png")]
    parts += [heading("What it costs"), html_table(costing), paragraph(below)]
    parts += [
        heading("How it was made"),
        code(facts["command"]),
        paragraph(", ".join(f"{k} {v}" for k, v in facts["versions"].items())),
    ]
    (folder / "report.html").write_text(page(title, parts))
    print("\n\n".join(text), flush=True)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with bad_input_exits():
        args, models, data, training = parse((ReportArguments, ModelArguments, DataArguments, DistillationArguments))
        if training.method != "coss" or training.beta is not None or args.timing_rounds < 1:
            raise ValueError(
                f"--method={training.method}, --beta={training.beta}, --timing_rounds={args.timing_rounds}: a report "
                f"is of CoSS at its own beta, with a timed round at least; recipes/compare.py compares other methods."
            )
        folder, pair = Path(training.output_dir), f"{models.student} / {models.teacher}"
        setting = Setting(data, {pair: models}, changed(training)).identified()
        splits, teacher = load(setting, pair)
        split = check_study(training, args.hours, args.seeds, args.jobs, splits)
        sweep = Sweep(folder, "report", setting, args.jobs, {"command": command()})
        trained = trained_cells(pair, training, args.seeds, split)
        sweep.check(trained)
        others = untrained_cells(pair, models, args.seeds, split)
        images = training.num_images or length(folder, args.hours, trained, others, setting)
    rows = sweep.run([replace(cell, num_images=images) for cell in trained] + others)
    seen = max(row["images_seen"] for row in rows if row["method"] not in UNTRAINED)
    metric = "linear" if any(row.get("linear") is not None for row in rows) else "overlap10"
    cost = costs({"student": models.load_student(teacher), "teacher": teacher}, training.device, args.timing_rounds)
    facts = {"command": command(), "images_seen": seen, "split": split, "versions": versions()}
    title = f"{Path(models.teacher).name} → {Path(models.student).name}, {seen:,} images seen, {args.seeds} seeds"
    write(folder, title, rows, metric, cost, device_name(training.device), facts)


if __name__ == "__main__":
    main()
