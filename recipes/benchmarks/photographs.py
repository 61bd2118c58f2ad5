"""Distil a photograph teacher into small students: which settings, what each part adds, and what is kept.

    python recipes/benchmarks/photographs.py --images path/to/imagenette --teacher path/to/efficientnet-lite1 \
        --other_images path/to/cifar10 --output_dir photographs --stage settings
    python recipes/benchmarks/photographs.py ... --stage methods
    python recipes/benchmarks/photographs.py ... --stage warm
    python recipes/benchmarks/photographs.py ... --stage test

Stages, each with three seeds, all runs of a student at equal images seen:

    settings  CoSS with neighbours under each of --settings, short, measured on images held out of train, as are the
              initial weights
    methods   longer, by the settings that were best there: CoSS, cosine alone, CoSS without neighbours; and CoSS by
              each of --other_settings
    warm      a student that was distilled from other images before, under each of WARM_SETTINGS
    test      each student of a long run, random weights and the teacher, on test images, once
    costs     parameters, bytes and times of the teacher and the students, timed in turns (photographs_costs.json)

Every run sees the same views, so that the teacher embeds each view once for all of them. Each line of photographs.jsonl
is one network on one split. The same command resumes where it stopped.
"""

import argparse
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from result_lines import add_line, read_lines
from transformers import set_seed

from coss_hf.hub.student import Student
from coss_hf.models.backbone import Backbone
from coss_hf.reporting.run_record import versions, write_json
from coss_hf.study.costs import costs, device_name
from coss_hf.study.trials import StudyConfig, Trial, build_trial_trainer, load, measure, shared_views
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.trainer.trainer import DistillationTrainer

VIT_TINY = ("hidden_size=192", "num_attention_heads=3", "intermediate_size=768", "num_hidden_layers=12")
# Student by name: what --student and --student_config_overrides say.
STUDENTS = {
    "mobilenetv3": ("timm_wrapper", ("architecture=mobilenetv3_small_100",)),
    "vit-tiny": ("vit", (*VIT_TINY, "image_size=96", "patch_size=16")),
    "resnet18": ("timm_wrapper", ("architecture=resnet18",)),
    "efficientnet-lite0": ("timm_wrapper", ("architecture=efficientnet_lite0",)),
}
CLIPPED = {"max_grad_norm": 1.0}
ADAMW = {"optim": "adamw_torch", "weight_decay": 0.05, "weight_decay_on": "matrices", "warmup_steps": 0.1, **CLIPPED}
SETTINGS = {
    "paper": {},
    "sgd, warm-up, clipping": {"warmup_steps": 0.1, **CLIPPED},
    "adamw 5e-4": {"learning_rate": 5e-4, **ADAMW},
    "adamw 2e-3": {"learning_rate": 2e-3, **ADAMW},
}
DEFAULTS = (
    "adamw 5e-4",
    "paper",
)  # at 64 views per step: of all but small networks with batch norm, and of --settings paper
# Of trained weights: the defaults are a fifth of the rates of random ones.
WARM_SETTINGS = SETTINGS | {
    "sgd 0.01, warm-up, clipping": {"learning_rate": 0.01, "warmup_steps": 0.1, **CLIPPED},
    "adamw 1e-4": {"learning_rate": 1e-4, **ADAMW},
}
METHODS = {"coss": ("coss", 3), "cosine alone": ("coss(lambda_ss=0)", 3), "coss, no neighbours": ("coss", 0)}
WARM = "mobilenetv3, warm start"
SEEDS = (1, 2, 3)
ROUNDS = 30
VIEWS_A_STEP = 64
CHOSEN_BY = "knn20"


@dataclass(frozen=True)
class Arm:
    """One row of the table: a student, its settings, its method, and the number of images that its training sees."""

    student: str
    settings: str
    num_images: int
    method: str = "coss"

    def trial(self, seed: int, split: str = "validation") -> Trial:
        """Return the trial of one seed."""
        expression, k = METHODS.get(self.method, ("", 0))
        return Trial(
            pair=self.student,
            method=self.method,
            expression=expression,
            scale=1,
            seed=seed,
            num_images=self.num_images,
            split=split,
            neighbors_k=k,
            anchors=VIEWS_A_STEP // (1 + k),
        )


@dataclass
class Experiment:
    """What all runs share: images, teacher, folder, and the file of results."""

    options: argparse.Namespace
    rows: list[dict] = field(default_factory=list)

    def __post_init__(self):
        self.folder = self.options.output_dir
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "photographs.jsonl"
        self.rows = read_lines(self.file)

    def config(self, arm: Arm, images: str | None = None) -> StudyConfig:
        """Return what the runs of an arm share; its images may be other ones."""
        options = self.options
        name, overrides = STUDENTS["mobilenetv3" if arm.student == WARM else arm.student]
        models = ModelArguments(
            teacher=options.teacher,
            teacher_size=options.teacher_size,
            student=name,
            student_init="random",
            student_size=options.student_size,
            student_config_overrides=list(overrides),
        )
        if arm.student == WARM and images is None:
            models = replace(models, student=str(self.earlier), student_init="pretrained", student_config_overrides=[])
        data = DataArguments(dataset=images or options.images, validation_size=500)
        if images:
            data = replace(data, max_train_samples=10_000)
        views = shared_views(8, 0, None, self.folder / ("other" if images else ""))
        training = {
            "settings": "paper",
            "neighbors_pool": 15,
            "save_strategy": "steps",
            "save_steps": 100,
            "use_cpu": options.use_cpu,
        }
        return StudyConfig(data, {arm.student: models}, training | views | WARM_SETTINGS.get(arm.settings, {}))

    @property
    def earlier(self) -> Path:
        """Folder of the student that was distilled from other images."""
        return self.folder / "students" / "earlier"

    def student_folder(self, arm: Arm, seed: int) -> Path:
        """Return the folder of a trained student."""
        name = f"{arm.student}-{arm.settings}-{arm.method}-{arm.num_images}-{seed}"
        return self.folder / "students" / name.replace(", ", "_").replace(" ", "_")

    def add(self, arm: Arm, seed: int, split: str, metrics: dict, **more) -> None:
        """Write a line of results."""
        row = asdict(arm) | {"seed": seed, "split": split} | more | metrics
        row |= {"command": shlex.join(["python", *sys.argv]), "versions": versions()}
        self.rows.append(row)
        add_line(self.file, row)
        print(f"{arm.student}, {arm.settings}, {arm.method}, seed {seed}, {split}: {line(metrics)}", flush=True)

    def found(self, arm: Arm, split: str, seed: int | None = None) -> list[dict]:
        """Return the results of an arm."""
        wanted = asdict(arm) | {"split": split} | ({} if seed is None else {"seed": seed})
        return [row for row in self.rows if all(row[key] == value for key, value in wanted.items())]

    def train(self, arm: Arm, seed: int) -> None:
        """Train, keep the student, and measure it on held-out images; nothing where that is done."""
        if self.found(arm, "validation", seed):
            return
        if arm.method not in METHODS:
            return self.measure_untrained(arm, seed, "validation")
        config = self.config(arm)
        trial = arm.trial(seed)
        start = time.perf_counter()
        trainer = self._trained(trial, config, self.student_folder(arm, seed))
        seconds = time.perf_counter() - start
        metrics = measure(trial, config, trainer.student, trainer.project)
        more = {"images_seen": trainer.images_seen, "seconds": round(seconds)}
        self.add(arm, seed, "validation", metrics, **more)

    def train_earlier(self) -> None:
        """Distil the student of a warm start from other images; nothing where that is done."""
        if self.earlier.exists():
            return
        arm = Arm(WARM, "sgd, warm-up, clipping", self.options.num_images)  # the best ones of mobilenetv3
        trainer = self._trained(arm.trial(0), self.config(arm, self.options.other_images), self.earlier)
        self.add(arm, 0, "other images", {}, images_seen=trainer.images_seen)

    def _trained(self, trial: Trial, config: StudyConfig, folder: Path) -> DistillationTrainer:
        runs = self.folder / "runs" / folder.name
        trainer = build_trial_trainer(trial, config, runs)
        trainer.train(resume_from_checkpoint=trainer.find_checkpoint("auto"))
        # Only a student that is complete has its name: the next call takes it as it is.
        part = self.folder / "unfinished" / folder.name
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        trainer.save_model(str(part))
        folder.parent.mkdir(exist_ok=True)
        part.rename(folder)
        return trainer

    def test(self, arm: Arm, seed: int) -> None:
        """Measure a trained student, random weights or the teacher on test images; nothing where that is done."""
        if self.found(arm, "test", seed):
            return
        config = self.config(arm)
        trial = arm.trial(seed, "test")
        if arm.method in METHODS:
            trained = self.found(arm, "validation", seed)
            if not trained:
                raise SystemExit(f"{arm} has no run of seed {seed}: give --stage methods (or warm) first.")
            student = Student.from_pretrained(self.student_folder(arm, seed))
            seen = trained[0]["images_seen"]
            return self.add(arm, seed, "test", measure(trial, config, student.backbone, student.head), images_seen=seen)
        return self.measure_untrained(arm, seed, "test")

    def measure_untrained(self, arm: Arm, seed: int, split: str) -> None:
        """Measure the teacher, or a student with its initial weights."""
        network = self.untrained(arm, seed)
        self.add(arm, seed, split, measure(arm.trial(seed, split), self.config(arm), network), images_seen=0)

    def untrained(self, arm: Arm, seed: int) -> Backbone:
        """Return the teacher, or a student with its initial weights."""
        config = self.config(arm)
        _, teacher = load(config, arm.student)
        set_seed(seed)
        return teacher if arm.method == "teacher" else config.models[arm.student].load_student(teacher)

    def costs(self, students: list[str]) -> None:
        """Write what the teacher and the students cost, timed in turns: only such times can be compared."""
        arms = {"teacher": Arm(students[0], "", 0, "teacher")} | {name: start_of(name) for name in students}
        networks = {name: self.untrained(arm, SEEDS[0]) for name, arm in arms.items()}
        device = next(networks["teacher"].model.parameters()).device
        record = {"networks": costs(networks, device, ROUNDS), "rounds": ROUNDS, "hardware": device_name(device)}
        record |= {"command": shlex.join(["python", *sys.argv]), "versions": versions()}
        write_json(self.folder / "photographs_costs.json", record)

    def best_settings(self, student: str) -> str:
        """Return the settings with the best mean on held-out images, of all that have run with each seed."""
        means = {
            name: statistics.fmean(row[CHOSEN_BY] for row in rows)
            for name in (WARM_SETTINGS if student == WARM else SETTINGS)
            if len(rows := self.found(Arm(student, name, self.options.choice_images), "validation")) == len(SEEDS)
        }
        if not {*self.settings_of(student)} <= {*means}:
            raise SystemExit(f"{student}: not all settings have run; give --stage settings (or warm) first.")
        return max(means, key=means.get)

    def settings_of(self, student: str) -> list[str]:
        """Return the settings that are compared for a student."""
        return list(WARM_SETTINGS) if student == WARM else self.options.settings


def line(metrics: dict) -> str:
    """Return some figures as text."""
    names = ("knn10", "knn20", "linear", "overlap10", "effective_rank", "asymmetric_map")
    return ", ".join(f"{name} {metrics[name]:.4g}" for name in names if metrics.get(name) is not None)


def long_arms(student: str, experiment: Experiment) -> list[Arm]:
    """Return what is trained longer, and read on test images."""
    best = experiment.best_settings(student)
    num_images = experiment.options.num_images
    arms = [Arm(student, best, num_images, method) for method in experiment.options.methods]
    return arms + [Arm(student, name, num_images) for name in experiment.options.other_settings if name != best]


def start_of(student: str) -> Arm:
    """Return the row of a student that is not trained."""
    return Arm(student, "", 0, "initial weights" if student == WARM else "random weights")


def training_arms(stage: str, students: list[str], experiment: Experiment) -> Iterator[Arm]:
    """Yield what a stage trains."""
    if stage == "methods":
        for student in students:
            yield from long_arms(student, experiment)
        return
    for student in students if stage == "settings" else [WARM]:
        if student != WARM:  # which begins with the same weights, whatever the seed
            yield start_of(student)
        yield from (Arm(student, name, experiment.options.choice_images) for name in experiment.settings_of(student))


def test_arms(students: list[str], experiment: Experiment) -> Iterator[tuple[Arm, int]]:
    """Yield what is read on test images, with its seed."""
    yield Arm(students[0], "", 0, "teacher"), SEEDS[0]
    for student in students:
        for seed in SEEDS:
            yield start_of(student), seed
            yield from ((arm, seed) for arm in long_arms(student, experiment))
    if experiment.earlier.exists():
        yield start_of(WARM), SEEDS[0]
        best = Arm(WARM, experiment.best_settings(WARM), experiment.options.choice_images)
        yield from ((best, seed) for seed in SEEDS)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="photographs with train and test split and labels")
    parser.add_argument("--other_images", help="images that the student of the warm start is distilled from first")
    parser.add_argument("--teacher", required=True, help="folder or name of the teacher")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of runs, students and results")
    parser.add_argument("--stage", choices=["settings", "methods", "warm", "test", "costs"], required=True)
    parser.add_argument(
        "--students", nargs="+", default=["mobilenetv3", "vit-tiny", "resnet18"], choices=list(STUDENTS)
    )
    parser.add_argument(
        "--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), help="settings to compare"
    )
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), choices=list(METHODS), help="methods of the long runs"
    )
    parser.add_argument(
        "--other_settings",
        nargs="*",
        default=list(DEFAULTS),
        choices=list(SETTINGS),
        help="settings of long runs of CoSS, besides the best ones",
    )
    parser.add_argument("--num_images", type=int, default=19_200, help="images seen by a long run, neighbours included")
    parser.add_argument("--choice_images", type=int, default=6_400, help="images seen by a run that compares settings")
    parser.add_argument("--teacher_size", type=int, default=128, help="side of the teacher's input in pixels")
    parser.add_argument("--student_size", type=int, default=96, help="side of the students' input in pixels")
    parser.add_argument("--use_cpu", action="store_true", help="train on the CPU even where there is a GPU")
    return parser


def main() -> None:
    options = build_parser().parse_args()
    experiment = Experiment(options)
    if options.stage == "test":
        for arm, seed in test_arms(options.students, experiment):
            experiment.test(arm, seed)
        return
    if options.stage == "costs":
        experiment.costs(options.students)
        return
    if options.stage == "warm":
        experiment.train_earlier()
    # Seed by seed, so that a stage that is stopped early has complete rounds.
    for seed in SEEDS:
        for arm in training_arms(options.stage, options.students, experiment):
            experiment.train(arm, seed)


if __name__ == "__main__":
    main()
