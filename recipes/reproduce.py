"""The paper's tables on a dataset of yours: pairs x methods x scales of the loss, and fresh seeds for the report.

    python recipes/reproduce.py --table 1 --dataset ../shared/data/cifar10 --pairs resnet20/resnet56 \
        --teacher runs/teacher-resnet56 --scales 0.5 1 4 --finalists 4 --budget 0.005 --jobs 2 --use_cpu \
        --output_dir runs/table1

Scales are chosen on --validation_size images held out of train with one seed, then reported with other seeds on test
images, which are read once a reported cell. Labels serve evaluation alone. The same command goes on where it stopped;
finished cells are never run twice. --budget is a share of the paper's 240 epochs.
"""

import dataclasses
import logging
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from coss_hf.cli import bad_input_exits, parse
from coss_hf.reporting.plots import method_plot
from coss_hf.reporting.run_record import command
from coss_hf.study import paper_tables as paper
from coss_hf.study import teachers
from coss_hf.study.baselines import check_report
from coss_hf.study.sweep import Sweep
from coss_hf.study.tables import METRICS, best, pair_section, ranked
from coss_hf.study.trials import Setting, load
from coss_hf.trainer.arguments import DataArguments, ModelArguments

# Of teachers, too.
ENGINE = ("use_cpu", "bf16", "torch_compile", "torch_compile_mode")
ENGINE += ("dataloader_num_workers", "dataloader_persistent_workers")


@dataclass
class ReproduceArguments:
    """What to run, and how much of it."""

    table: int = field(default=1, metadata={"help": "Of the supplementary document.", "choices": [1, 2, 3, 4]})
    pairs: list[str] | None = field(default=None, metadata={"help": "student/teacher; default: the table's."})
    methods: list[str] | None = field(
        default=None, metadata={"help": "Rows of the table (default: all), or any --method of recipes/distill.py."}
    )
    scales: list[float] = field(default_factory=lambda: list(paper.SCALES), metadata={"help": "Of each method's beta."})
    seeds: int = field(default=3, metadata={"help": "Seeds of a reported row: 1, 2, ...; 0 chooses."})
    finalists: int | None = field(default=None, metadata={"help": "Report only so many best rows, and CoSS."})
    budget: float = field(default=1.0, metadata={"help": "Share of the paper's 240 epochs of a reported run."})
    choice_budget: float | None = field(default=None, metadata={"help": "The same of a choosing run; default: budget."})
    metric: str = field(
        default="linear",
        metadata={
            "help": "Metric that chooses the scales and ranks the rows. The former spelling, eval_linear, still works.",
            "choices": [*METRICS, *(f"eval_{name}" for name in METRICS)],
        },
    )
    batch_size: int = field(default=128, metadata={"help": "Images a step, of teachers too."})
    teacher: str | None = field(default=None, metadata={"help": "Of a single pair; default: trained first."})
    teacher_epochs: int | None = field(default=None, metadata={"help": "Of one trained first; default: 240 * budget."})
    jobs: int = field(default=1, metadata={"help": "Cells side by side."})
    output_dir: str = field(default="reproduced", metadata={"help": "Results, table, plot; checkpoints while it runs."})
    use_cpu: bool = field(default=False, metadata={"help": "Not the GPU."})
    bf16: bool = field(default=False, metadata={"help": "Autocast in training; evaluation is in float32."})
    channels_last: bool = field(default=False, metadata={"help": "Memory layout; quicker on most machines."})
    torch_compile: bool = field(default=False, metadata={"help": "Compile both networks."})
    torch_compile_mode: str | None = field(default=None, metadata={"help": "reduce-overhead: CUDA graphs."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes of each cell that make its views."})
    dataloader_persistent_workers: bool = field(default=False, metadata={"help": "Keep them from epoch to epoch."})
    save_steps: int = field(default=500, metadata={"help": "Steps between a cell's checkpoints."})


def check(args: ReproduceArguments, data: DataArguments) -> None:
    """Raises ValueError for what cannot be run."""
    args.metric = args.metric.removeprefix("eval_")
    args.pairs = args.pairs or list(paper.PUBLISHED[args.table])
    args.methods = args.methods or list(paper.ROWS[args.table])
    for name in args.pairs:
        if name not in paper.PAIRS:
            raise ValueError(f"--pairs={name!r} is unknown: choose among {', '.join(paper.PAIRS)}.")
    for name in args.methods:
        paper.expression(args.table, name)
    for flag in ("budget", "choice_budget", "seeds", "jobs", "teacher_epochs", "batch_size", "save_steps"):
        if (value := getattr(args, flag)) is not None and value <= 0:
            raise ValueError(f"--{flag}={value} must be above 0.")
    args.teacher_epochs = args.teacher_epochs or max(1, round(paper.EPOCHS * args.budget))
    if not args.scales or min(args.scales) <= 0:
        raise ValueError(f"--scales={args.scales} must be above 0.")
    if args.teacher and len(args.pairs) > 1:
        raise ValueError(f"--teacher={args.teacher} is one, --pairs are {len(args.pairs)}: give one pair.")
    if not data.validation_size:
        raise ValueError("--validation_size: the scales are chosen on images held out of train; give 1,000 or more.")


def write(args: ReproduceArguments, data: DataArguments, held_out: int, chosen: dict, reported: dict, own: dict):
    """``table1.md`` and a plot of each pair; ``own``: folders of the teachers that were trained first."""
    share = "the paper's 240 epochs" if args.budget == 1 else f"a budget of {args.budget:g} of the paper's 240 epochs"
    folder, parts = Path(args.output_dir), [f"# Table {args.table}, {share}", f"{data.dataset}; `{command()}`"]
    for pair, rows in reported.items():
        title = f"{pair}, {max(row['images_seen'] for row in rows):,} images seen ({share})"
        figures = paper.published(args.table, pair)
        parts.append(pair_section(title, rows, chosen[pair], args.metric, held_out, figures))
        parts += [teachers.describe(own[pair])] if own else []
        method_plot(
            folder / f"table{args.table}-{pair.replace('/', '-')}.png", ranked(rows, args.metric), args.metric, title
        )
    text = "\n\n".join(parts) + "\n"
    (folder / f"table{args.table}.md").write_text(text)
    print(text)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with bad_input_exits():
        args, data = parse((ReproduceArguments, DataArguments))
        check(args, data)
        common = {"per_device_train_batch_size": args.batch_size}
        common |= {name: getattr(args, name) for name in (*ENGINE, "save_steps")}
        training = paper.TRAINING | common | {"channels_last": args.channels_last}
        plain = Setting(data, {}, training, tuple(drop / paper.EPOCHS for drop in paper.MILESTONES))

        def setting(folders: dict[str, str]) -> Setting:
            own = {pair: (folder, paper.PAIRS[pair][0]) for pair, folder in folders.items()}
            models = {pair: ModelArguments(*networks, student_init="random") for pair, networks in own.items()}
            return dataclasses.replace(plain, models=models)

        header = {"table": args.table, "command": command()}
        sweep = Sweep(Path(args.output_dir), f"table{args.table}", plain, args.jobs, header)
        with tempfile.TemporaryDirectory() as folder:
            at_random = {pair: teachers.untrained(paper.PAIRS[pair][1], Path(folder, pair)) for pair in args.pairs}
            sweep.setting = setting({pair: args.teacher or at_random[pair] for pair in args.pairs})
            budgets = [("choice_budget", args.choice_budget)] if args.choice_budget else [("budget", args.budget)]
            budgets.append(("budget", args.budget))
            splits = load(sweep.setting, args.pairs[0])[0]
            check_report(args.metric, splits)
            tried, seen = paper.lengths(budgets, args.batch_size, len(splits.train))
            choices = [(args.table, pair, args.methods, args.scales, tried) for pair in args.pairs]
            cells = [cell for choice in choices for cell in paper.choice_cells(*choice)]
            sweep.check(cells)
            names = {} if args.teacher else {pair: paper.PAIRS[pair][1] for pair in args.pairs}
            own = {pair: Path(args.output_dir, "teachers", name) for pair, name in names.items()}
            teachers.check(set(own.values()), data, args.teacher_epochs, common)
        teachers.train(dict.fromkeys(own.values()), data, args.teacher_epochs, common)
        sweep.setting = setting({pair: args.teacher or str(own[pair]) for pair in args.pairs}).identified()
    rows = min(len(args.methods), (args.finalists or len(args.methods)) + 1)
    results = sweep.run(cells, later=seen * args.seeds * rows * len(args.pairs))
    chosen, finals = {}, []
    for pair in args.pairs:
        groups = ranked([row for row in results if row["pair"] == pair], args.metric)
        chosen[pair] = [row for group in groups.values() if (row := best(group, args.metric))]
        finals += paper.report_cells(pair, chosen[pair], args.finalists, args.seeds, seen)
    results = sweep.run(finals)
    reported = {pair: [row for row in results if row["pair"] == pair] for pair in args.pairs}
    write(args, data, len(splits.validation), chosen, reported, own)


if __name__ == "__main__":
    main()
