"""A table of the paper on other images: teachers first, then choices on held-out images, then the report on test."""

import math
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import PreTrainedModel

from coss_hf.data.loading import ImageSplits
from coss_hf.reporting.plots import method_plot
from coss_hf.reporting.run_record import command
from coss_hf.study import paper_tables as paper
from coss_hf.study import teachers
from coss_hf.study.baselines import check_report, errors_about_methods
from coss_hf.study.paper_cells import cells, ranking_sentence
from coss_hf.study.sweep import Sweep
from coss_hf.study.tables import METRICS, best, images_seen, pair_section, ranked
from coss_hf.study.trials import StudyConfig, Trial, load, shared_views
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.utils.messages import get_logger

logger = get_logger(__name__)

POSITIVE = ("budget", "choice_budget", "seeds", "jobs", "teacher_epochs", "batch_size", "save_steps")
NOT_NEGATIVE = ("finalists", "seeds_of_others", "view_epochs", "dataloader_num_workers")
LISTS = ("pairs", "methods", "scales", "eval_at")


@dataclass
class ReproduceArguments:
    """What to run, and how much of it."""

    table: int = field(
        default=1,
        metadata={
            "help": "Number of the supplementary document's table; 5: SEED and SEED with space similarity, with and "
            "without neighbours.",
            "choices": list(paper.ROWS),
        },
    )
    pairs: list[str] | None = field(
        default=None, metadata={"help": "Pairs of networks, as student/teacher. Default: those of the paper's table."}
    )
    methods: list[str] | None = field(
        default=None, metadata={"help": "Rows of the table (default: the paper's), or any --method of distill."}
    )
    scales: list[float] = field(
        default_factory=lambda: list(paper.SCALES), metadata={"help": "Factors of each method's beta to choose from."}
    )
    seeds: int = field(default=3, metadata={"help": "Number of seeds of a reported row: 1, 2, ...; seed 0 chooses."})
    finalists: int | None = field(
        default=None,
        metadata={
            "help": "Number of the best rows on held-out images to report, apart from CoSS. 0: CoSS alone. Default: "
            "all."
        },
    )
    seeds_of_others: int = field(
        default=0, metadata={"help": "With --finalists, the number of seeds with which the other rows are reported."}
    )
    budget: float = field(
        default=1.0, metadata={"help": "Length of a reported run as a share of the paper's 240 epochs."}
    )
    choice_budget: float | None = field(
        default=None,
        metadata={
            "help": "Length of a choosing run as a share of 240 epochs; default: --budget. With one scale and no "
            "--finalists there is nothing to choose, and no such run."
        },
    )
    metric: str = field(
        default="linear",
        metadata={
            "help": "Metric that chooses the scales and ranks the rows.",
            "choices": list(METRICS),
        },
    )
    batch_size: int = field(default=128, metadata={"help": "Number of images per step, of students and teachers."})
    teacher: str | None = field(
        default=None, metadata={"help": "Folder of a single pair's teacher; default: teachers are trained first."}
    )
    teacher_epochs: int | None = field(
        default=None, metadata={"help": "Epochs of a teacher that is trained first; default: 240 * budget."}
    )
    view_epochs: int = field(
        default=20,
        metadata={
            "help": "Number of epochs after which the same views come back. All trials then see the same views, and "
            "share the teacher's embeddings of them. 0: never, as in the paper."
        },
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={"help": "Folder of the shared embeddings, with --view_epochs. Default: one in --output_dir."},
    )
    jobs: int = field(default=1, metadata={"help": "Number of trials that run in parallel."})
    output_dir: str = field(
        default="reproduced",
        metadata={
            "help": "Folder of results, table and plot, and of checkpoints meanwhile. Another study of the same table "
            "in it replaces them; finished trials stay, and the former command brings its results back."
        },
    )
    keep_students: bool = field(
        default=False,
        metadata={
            "help": "Keep the student of each reported run that this command trains, in students/ of --output_dir. "
            "`student` of a row in the file of results is the name of its folder; rows that an earlier version "
            "finished have none."
        },
    )
    eval_at: list[float] | None = field(
        default=None,
        metadata={
            "help": "Shares of the length of a reported run, such as 0.25 0.5, after which its student is measured on "
            "held-out images, too. The file of results has these figures as rows of their own with a share; they count "
            "in no table. They take 10,000 training images for k-NN and the classifier, the final ones all. "
            "A share that a run has passed already is not measured."
        },
    )
    use_cpu: bool = field(default=False, metadata={"help": "Run on the CPU, even where there is a GPU."})
    bf16: bool = field(default=False, metadata={"help": "Train under bfloat16 autocast; evaluation stays in float32."})
    channels_last: bool = field(
        default=False, metadata={"help": "Use the channels-last memory layout, faster on most machines."}
    )
    torch_compile: bool = field(default=False, metadata={"help": "Compile teacher and student with torch.compile."})
    torch_compile_mode: str | None = field(
        default=None, metadata={"help": "Mode of torch.compile; reduce-overhead uses CUDA graphs."}
    )
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Number of worker processes that make a trial's views."}
    )
    dataloader_persistent_workers: bool = field(
        default=False, metadata={"help": "Keep worker processes from epoch to epoch."}
    )
    save_steps: int = field(
        default=500, metadata={"help": "Number of optimizer steps between the checkpoints of a trial."}
    )

    @property
    def table_pairs(self) -> list[str]:
        """The pairs that were given, or those of the table."""
        return self.pairs or paper.own_pairs(self.table)

    @property
    def table_methods(self) -> list[str]:
        """The methods that were given, or the rows of the table."""
        return self.methods or paper.own_rows(self.table)

    @property
    def chooses(self) -> bool:
        """Whether runs on held-out images decide anything: the scale of a row, or which rows are finalists."""
        others = [name for name in self.table_methods if name != "coss"]
        finalists = len(others) if self.finalists is None else self.finalists
        return len(self.scales) > 1 or (0 < finalists < len(others) and self.seeds_of_others < self.seeds)

    @property
    def epochs_of_teachers(self) -> int:
        """The epochs of a teacher that is trained first."""
        return self.teacher_epochs or max(1, round(paper.EPOCHS * self.budget))

    def engine(self) -> dict:
        """Return the arguments that students and teachers share."""
        return {
            "per_device_train_batch_size": self.batch_size,
            "use_cpu": self.use_cpu,
            "bf16": self.bf16,
            "torch_compile": self.torch_compile,
            "torch_compile_mode": self.torch_compile_mode,
            "dataloader_num_workers": self.dataloader_num_workers,
            "dataloader_persistent_workers": self.dataloader_persistent_workers,
            "save_steps": self.save_steps,
        }


@dataclass
class Reproduction:
    """A table whose trials are checked and ready to run.

    Attributes:
        args: what to run.
        data: the images.
        splits: the images, loaded.
        config: what the trials share.
        sweep: runs them.
        choices: trials that choose the scales.
        report_images: number of images that each reported run sees.
        own_teachers: folders of the teachers that were trained first, by pair; empty with ``--teacher``.
        other_teacher: name of the network that ``--teacher`` gives where it is not the pair's; else empty.
    """

    args: ReproduceArguments
    data: DataArguments
    splits: ImageSplits
    config: StudyConfig
    sweep: Sweep
    choices: list[Trial]
    report_images: int
    own_teachers: dict[str, Path]
    other_teacher: str = ""

    def run(self) -> str:
        """Choose scales, report the chosen rows, write ``tableN.md`` and a plot for each pair, and return the table."""
        args = self.args
        rows = len(args.table_methods)
        finals = rows if args.finalists is None else min(rows, args.finalists + ("coss" in args.table_methods))
        runs = args.seeds * finals + args.seeds_of_others * (rows - finals)
        later = self.report_images * runs * len(args.table_pairs)
        if args.chooses:
            tried = self.sweep.run(self.choices, self.config, later=later)
            chosen = {pair: self._best_scales(tried, pair) for pair in args.table_pairs}
        else:
            tried = [asdict(trial) for trial in self.choices]
            chosen = {pair: of_pair(tried, pair) for pair in args.table_pairs}
        reports = []
        for pair in args.table_pairs:
            reports += paper.report_trials(
                pair, chosen[pair], args.finalists, args.seeds, self.report_images, args.seeds_of_others
            )
        reported = self.sweep.run(reports, self.config)
        return self._write(tried, chosen, {pair: of_pair(reported, pair) for pair in args.table_pairs})

    def _best_scales(self, rows: list[dict], pair: str) -> list[dict]:
        """Return each method's best row, the best method first; methods without a value are left out."""
        groups = ranked(of_pair(rows, pair), self.args.metric)
        found = [best(group, self.args.metric) for group in groups.values()]
        return [row for row in found if row is not None]

    def _write(self, tried: list[dict], chosen: dict[str, list[dict]], reported: dict[str, list[dict]]) -> str:
        args = self.args
        folder = Path(args.output_dir)
        budget = "the paper's 240 epochs"
        if args.budget != 1:
            budget = f"a budget of {args.budget:g} of the paper's 240 epochs"
        parts = [f"# Table {args.table}, {budget}", f"{self.data.dataset}; `{command()}`"]
        for pair, rows in reported.items():
            of_this = of_pair(tried, pair)
            if not chosen[pair]:
                parts.append(f"## {pair}\n\nNothing is reported. {nothing_chosen(of_this, args.metric)}")
                continue
            name = ", ".join(filter(None, [pair, images_seen(rows)]))
            held_out = len(self.splits.validation) if args.chooses else None
            published = paper.published(args.table, pair)
            parts.append(pair_section(f"{name} ({budget})", rows, chosen[pair], args.metric, held_out, published))
            kept = {row["method"] for row in chosen[pair]}
            if dropped := [row for row in of_this if row["method"] not in kept]:
                parts.append(nothing_chosen(dropped, args.metric))
            found = [cell for cell in cells(rows, [args.table], args.metric) if cell.pair == pair]
            if sentence := ranking_sentence(found, args.metric):
                parts.append(sentence)
            if pair in self.own_teachers:
                parts.append(teachers.describe(self.own_teachers[pair]))
            elif self.other_teacher:
                parts.append(f"Its teacher is {self.other_teacher}, given by --teacher={args.teacher}.")
            plot = folder / f"table{args.table}-{pair.replace('/', '-')}.png"
            method_plot(plot, ranked(rows, args.metric), args.metric, name)  # the longer title does not fit
        text = "\n\n".join(parts) + "\n"
        (folder / f"table{args.table}.md").write_text(text)
        return text


def of_pair(rows: list[dict], pair: str) -> list[dict]:
    """Return the results of one pair."""
    return [row for row in rows if row["pair"] == pair]


def nothing_chosen(tried: list[dict], metric: str) -> str:
    """Return of which methods no scale was chosen, and why.

    Args:
        tried: their results on held-out images.
        metric: metric that chooses.
    """
    reasons: dict[str, set[str]] = {}
    for row in tried:
        reasons.setdefault(row["method"], set()).add(row.get("failed", f"no value of {metric}"))
    listed = "; ".join(f"`{name}` ({', '.join(sorted(found))})" for name, found in reasons.items())
    return f"Without a chosen scale, since no run on held-out images ended with a value: {listed}."


def plan_reproduction(args: ReproduceArguments, data: DataArguments) -> Reproduction:
    """Check everything, then train the teachers that are missing.

    Args:
        args: what to run.
        data: the images.

    Raises:
        ValueError: what cannot be run; found before any training.
        SystemExit: training a teacher failed, and the reason was printed.
    """
    check(args, data)
    sweep = Sweep(Path(args.output_dir), f"table{args.table}", args.jobs, {"table": args.table, "command": command()})
    own_teachers: dict[str, Path] = {}
    if not args.teacher:
        for pair in args.table_pairs:
            own_teachers[pair] = Path(args.output_dir, "teachers", paper.PAIRS[pair][1])
    with tempfile.TemporaryDirectory() as folder:
        untrained = study_config(args, data, _teachers_to_check_with(args, Path(folder), own_teachers))
        splits, teacher = load(untrained, args.table_pairs[0])
        other_teacher = _other_teacher(args, teacher.model)
        check_report(args.metric, splits, chooses=args.chooses)
        choice_images, report_images = _lengths(args, len(splits.train))
        choices = []
        for pair in args.table_pairs:
            rows = args.table_methods
            choices += paper.choice_trials(args.table, pair, rows, args.scales, choice_images, args.batch_size)
        with errors_about_methods():
            sweep.check(choices, untrained)
        teachers.check(dict.fromkeys(own_teachers.values()), data, args.epochs_of_teachers, args.engine())
    teachers.train(dict.fromkeys(own_teachers.values()), data, args.epochs_of_teachers, args.engine())
    folders = {pair: args.teacher or str(own_teachers[pair]) for pair in args.table_pairs}
    config = study_config(args, data, folders).identified()
    return Reproduction(args, data, splits, config, sweep, choices, report_images, own_teachers, other_teacher)


def _other_teacher(args: ReproduceArguments, network: PreTrainedModel) -> str:
    """Return the name of the network that ``--teacher`` gives, with a warning, where the pair names another one.

    Args:
        args: what to run.
        network: the teacher.
    """
    if not args.teacher:
        return ""
    pair = args.table_pairs[0]
    other = teachers.name_of_another(paper.PAIRS[pair][1], network)
    if other:
        logger.warning(
            "--teacher=%s holds a network %s, and --pairs=%s has the teacher %s: the table has no counterpart in the "
            "paper. Give a folder of %s, or the pair of this teacher.",
            *(args.teacher, other, pair, paper.PAIRS[pair][1], paper.PAIRS[pair][1]),
        )
    return other


def check(args: ReproduceArguments, data: DataArguments) -> None:
    """Check the arguments alone, without images or networks.

    Raises:
        ValueError: what cannot be run.
    """
    for name in args.table_pairs:
        if name not in paper.PAIRS:
            raise ValueError(f"--pairs={name!r} is unknown: choose among {', '.join(paper.PAIRS)}.")
    for name in args.table_methods:
        paper.expression(args.table, name)
    _check_numbers(args)
    _check_lists(args)
    _check_seeds(args)
    if args.teacher and len(args.table_pairs) > 1:
        raise ValueError(f"--teacher={args.teacher} is one, --pairs are {len(args.table_pairs)}: give one pair.")
    if args.chooses and not data.validation_size:
        raise ValueError("--validation_size: the scales are chosen on images held out of train; give 1,000 or more.")
    if args.eval_at and not data.validation_size:
        raise ValueError(
            f"--eval_at={args.eval_at} measures on images held out of train, and "
            f"--validation_size={data.validation_size} holds out none: give 1,000 or more, or leave --eval_at out."
        )


def _check_numbers(args: ReproduceArguments) -> None:
    for flag in POSITIVE:
        value = getattr(args, flag)
        if value is not None and not 0 < value < math.inf:
            # The comparison also refuses NaN, which is neither above nor below any number.
            raise ValueError(f"--{flag}={value} must be above 0 and finite: give such a number, or leave it out.")
    for flag in NOT_NEGATIVE:
        value = getattr(args, flag)
        if value is not None and value < 0:
            raise ValueError(f"--{flag}={value} must be 0 or more: give such a number, or leave it out.")


def _check_lists(args: ReproduceArguments) -> None:
    for flag in LISTS:
        values = getattr(args, flag)
        if values is not None and len(set(values)) < len(values):  # a run that counts twice narrows the intervals
            raise ValueError(f"--{flag}={values} has a value twice; give each once.")
    if not args.scales or not all(0 < scale < math.inf for scale in args.scales):
        raise ValueError(f"--scales={args.scales} must be above 0 and finite: give one such number or more.")
    if not all(0 < share <= 1 for share in args.eval_at or ()):
        raise ValueError(f"--eval_at={args.eval_at}: give shares of a run above 0, and at most 1.")


def _check_seeds(args: ReproduceArguments) -> None:
    if args.finalists == 0 and not args.seeds_of_others and "coss" not in args.table_methods:
        raise ValueError(
            "--finalists=0 reports CoSS alone, and --methods has no coss: add it, give --finalists 1 or more, or "
            "--seeds_of_others."
        )
    if not 0 <= args.seeds_of_others <= args.seeds:
        raise ValueError(f"--seeds_of_others={args.seeds_of_others} must be from 0 to --seeds={args.seeds}.")
    if args.seeds_of_others and args.finalists is None:
        raise ValueError(
            f"--seeds_of_others={args.seeds_of_others} is for the rows that are no finalists: give --finalists."
        )


def study_config(args: ReproduceArguments, data: DataArguments, teacher_folders: dict[str, str]) -> StudyConfig:
    """Return what the trials share, with the paper's arguments of training.

    Args:
        args: what to run.
        data: the images.
        teacher_folders: folders of the teachers by pair.
    """
    models = {
        pair: ModelArguments(teacher=folder, student=paper.PAIRS[pair][0], student_init="random")
        for pair, folder in teacher_folders.items()
    }
    views = shared_views(args.view_epochs, 0, args.teacher_cache, Path(args.output_dir))
    training = paper.TRAINING | args.engine() | {"channels_last": args.channels_last} | views
    return StudyConfig(
        data,
        models,
        training,
        neighbors={"neighbors_pool": paper.NEIGHBORS_POOL},
        milestones=tuple(drop / paper.EPOCHS for drop in paper.MILESTONES),
        students=Path(args.output_dir, "students") if args.keep_students else None,
        eval_at=tuple(args.eval_at or ()),
    )


def _teachers_to_check_with(args: ReproduceArguments, folder: Path, own: dict[str, Path]) -> dict[str, str]:
    """Return folders of teachers that methods can be checked with: the given one, finished ones, or untrained ones."""
    if args.teacher:
        return dict.fromkeys(args.table_pairs, args.teacher)
    found = {}
    for pair in args.table_pairs:
        if (own[pair] / "run.json").exists():  # the room for its embeddings is that for what is missing of them
            found[pair] = str(own[pair])
        else:
            found[pair] = teachers.save_untrained(paper.PAIRS[pair][1], folder / pair)
    return found


def _lengths(args: ReproduceArguments, train_images: int) -> list[int]:
    """Return the number of images of a choosing and of a reported run."""
    reported = ("budget", args.budget)
    choosing = ("choice_budget", args.choice_budget) if args.choice_budget else reported
    return paper.lengths([choosing, reported], args.batch_size, train_images)
