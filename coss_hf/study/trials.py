"""One trial of a study: train a student, or take a network as it is, and measure it; the key that names its result."""

import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import TrainerCallback, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ExportableState

from coss_hf.data.loading import ImageSplits
from coss_hf.evaluation.evaluator import Evaluator, random_weights, sample
from coss_hf.losses.combination import parse_methods
from coss_hf.losses.registry import LOSSES
from coss_hf.models.backbone import Backbone
from coss_hf.reporting.run_record import write_json
from coss_hf.reporting.trackers import end_trackers
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.trainer.callbacks.console import ConsoleCallback
from coss_hf.trainer.callbacks.preemption import PATIENCE_TO_SAVE
from coss_hf.trainer.distillation_model import losses_of, reads_maps
from coss_hf.trainer.factory import build_trainer
from coss_hf.trainer.pretraining import pretraining_images
from coss_hf.trainer.rehearsal import rehearse
from coss_hf.trainer.trainer import DistillationTrainer
from coss_hf.trainer.training_args import DistillationArguments
from coss_hf.utils.ending import ENDING
from coss_hf.utils.errors import NonFiniteEmbedding, NonFiniteLoss
from coss_hf.utils.randomness import keeping_generators

# Arguments that say how a trial is run and do not change its result.
OPERATION = (
    "save_strategy",
    "save_steps",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "teacher_cache",
    "save_total_limit",
    "save_on_each_node",
    "logging_strategy",
    "logging_steps",
    "logging_first_step",
    "log_level",
    "log_level_replica",
    "log_on_each_node",
    "log_format",
    "disable_tqdm",
    "report_to",
    "run_name",
    "project",
    "trackio_space_id",
    "dataloader_pin_memory",
    "dataloader_multiprocessing_context",
)
# The same, of the images.
OPERATION_OF_DATA = ("neighbors_cache", "preprocessing_num_workers")
# Of what is measured; raise it where a metric changes, so that one table never mixes two meanings of a column.
# 2: linear evaluation of standardised embeddings.
MEASURES = 2
# Rows that no method trains, measured like the others.
UNTRAINED = ("teacher", "random", "initial")


@dataclass(frozen=True)
class Trial:
    """One row of a study's results.

    Attributes:
        pair: name of teacher and student, for tables.
        method: name of the row, for tables; ``teacher``, ``random`` (random weights) and ``initial`` (the weights that
            a student starts from) are not trained.
        expression: the ``--method``, with the scale in it.
        scale: factor of the method's ``beta``.
        seed: seed of initial weights, order and views.
        num_images: number of images seen in training, neighbours included.
        split: split that is measured on: ``validation`` for a choice, ``test`` for a report.
        neighbors_k: number of neighbours drawn for each anchor.
        anchors: number of anchors per device and step; None for that of the ``StudyConfig``.
    """

    pair: str
    method: str
    expression: str
    scale: float
    seed: int
    num_images: int
    split: str
    neighbors_k: int = 0
    anchors: int | None = None

    @property
    def name(self) -> str:
        """Name of the trial in messages."""
        return f"{self.pair} {self.method} scale {self.scale:g} seed {self.seed} {self.split}"

    @property
    def folder_name(self) -> str:
        """Name of the trial, as a folder can have it."""
        name = f"{self.pair}-{self.method}-scale{self.scale:g}-seed{self.seed}-{self.num_images}"
        return re.sub(r"[^\w.=-]+", "_", name)


@dataclass(frozen=True)
class StudyConfig:
    """What all trials of a study share.

    Attributes:
        data: the images; ``validation_size`` of them are held out of every training set.
        models: teacher, student and their options, by the name of the pair.
        training: fields of ``DistillationArguments``.
        milestones: shares of a run after which its learning rate falls tenfold; if empty, ``training`` has the
            schedule.
        bank_size: number of training images that a choice is measured against; a report takes all.
        identity: hash of images and teacher by the name of the pair; see ``identified``.
        students: folder in which the students of reported trials are kept, each in one that names the trial and its
            key; None for nowhere.
        logs: folder in which TensorBoard's logs are kept, each trial's in one of the same name; None for the folder of
            its checkpoints, which is removed.
        eval_at: shares of a reported trial's length after which its student is measured on held-out images, too.
        neighbors: more fields of ``DistillationArguments``, for the trials that draw neighbours alone, so that the keys
            of other trials do not depend on them.
    """

    data: DataArguments
    models: dict[str, ModelArguments]
    training: dict = field(default_factory=dict)
    milestones: tuple[float, ...] = ()
    bank_size: int = 10_000
    identity: dict[str, str] = field(default_factory=dict)
    students: Path | None = None
    logs: Path | None = None
    eval_at: tuple[float, ...] = ()
    neighbors: dict = field(default_factory=dict)

    def identified(self) -> "StudyConfig":
        """Return a copy with hashes of images, labels and weights, so that what stands at a path may change."""
        identity = {pair: self._identify(pair) for pair in self.models}
        return replace(self, identity=identity)

    def _identify(self, pair: str) -> str:
        splits, teacher = load(self, pair)
        columns = ["image_hash"]
        if splits.label_column:
            columns.append(splits.label_column)
        parts = []
        for split in (splits.train, splits.validation, splits.test):
            if split:
                parts += [split[name][:] for name in columns]
        parts.append(teacher.fingerprint())
        models = self.models[pair]
        if models.student_init != "random":
            parts.append(models.load_student(teacher).fingerprint())
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def folder_of(self, trial: Trial) -> str:
        """Return the name of a trial's folders; other arguments of the study give another one."""
        return f"{trial.folder_name}-{self.key(trial)}"

    def training_of(self, trial: Trial) -> dict:
        """Return the fields of ``DistillationArguments`` that a trial is trained with, apart from its own."""
        return self.training | self.neighbors if trial.neighbors_k else self.training

    def falls_with_others(self, trial: Trial) -> list[float]:
        """Return the milestones that a trial with other anchors than the others reaches after as many images as they.

        Milestones count epochs over anchors, and its epochs are shorter. Empty for all other trials, and where
        ``milestones`` are shares of each run.
        """
        if self.milestones or not trial.anchors or trial.neighbors_k:
            return []
        return self.training.get("lr_milestones") or []

    def key(self, trial: Trial) -> str:
        """Return the file name of a trial's result: a hash of everything that it depends on.

        It does not depend on the row's name, on how a trial is run, or, with ``identity``, on the paths of what that
        is a hash of.
        """
        data = asdict(replace(self.data, **dict.fromkeys(OPERATION_OF_DATA)))
        models = asdict(self.models[trial.pair])
        named = trial
        if self.identity.get(trial.pair):
            named = replace(trial, pair="")
            del data["dataset"]
            # The classifier of a teacher is not in the hash.
            needs_classifier = any(LOSSES[name].classifier != "unused" for name in _losses(trial))
            models["teacher"] = _path(models["teacher"]) if needs_classifier else None
            # The weights that a student starts from are in the hash, but not a network at random weights.
            models["student"] = _network(models["student"]) if models["student_init"] == "random" else None
        training = {name: value for name, value in self.training_of(trial).items() if name not in OPERATION}
        if training.setdefault("settings", "auto") == "paper":
            del training["settings"]  # as before there were others
        if models["teacher_space"] == ModelArguments.teacher_space:
            models = {name: value for name, value in models.items() if name != "teacher_space"}  # newer than results
        shared = [
            data,
            models,
            training,
            self.milestones,
            self.bank_size,
            self.identity.get(trial.pair),
            MEASURES,
        ]
        if revisions := {name: LOSSES[name].revision for name in _losses(trial) if LOSSES[name].revision > 1}:
            shared.append(revisions)
        if self.falls_with_others(trial):
            shared.append("milestones after as many images")  # earlier results had them after as many epochs
        method = trial.method if trial.method in UNTRAINED else None
        text = json.dumps([asdict(replace(named, method=method)), shared], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _losses(trial: Trial) -> list[str]:
    """Return the names of a trial's losses, sorted; none of a network that is not trained."""
    return sorted({part.name for part in parse_methods(trial.expression)}) if trial.expression else []


def _network(name: str | None) -> str | None:
    """Return what stands for a network at random weights in a key: its configuration and code, or its name without."""
    if not name or not Path(name, "config.json").is_file():
        return name
    parts = [Path(name, "config.json"), Path(name, "preprocessor_config.json"), *sorted(Path(name).glob("*.py"))]
    return hashlib.sha256(b"".join(part.read_bytes() for part in parts if part.is_file())).hexdigest()


def _path(name: str) -> str:
    """Return a folder in one spelling; any other name as it is."""
    return os.path.abspath(name) if os.path.exists(name) else name


def load(config: StudyConfig, pair: str) -> tuple[ImageSplits, Backbone]:
    """Load images and teacher of a pair; the last ones loaded are kept for the next trial."""
    return _load(_inputs(config, pair))


def _inputs(config: StudyConfig, pair: str) -> str:
    """Return the arguments of images and networks as text, which a cache can take."""
    return json.dumps([asdict(config.data), asdict(config.models[pair])], sort_keys=True)


@functools.lru_cache(maxsize=1)
def _load(inputs: str) -> tuple[ImageSplits, Backbone]:
    data, models = json.loads(inputs)
    return DataArguments(**data).load(), ModelArguments(**models).load_teacher()


def shared_views(view_epochs: int, seed: int, teacher_cache: str | None, folder: Path) -> dict:
    """Return the arguments with which all trials of a study see the same views, and share the teacher's embeddings.

    Args:
        view_epochs: number of epochs after which the views come back; 0: never, and nothing is shared.
        seed: seed of the views.
        teacher_cache: folder of the embeddings; None for one in ``folder``.
        folder: folder of the study.
    """
    if not view_epochs:
        return {"teacher_cache": teacher_cache} if teacher_cache else {}
    cache = teacher_cache or str(folder / "teacher_cache")
    return {"view_epochs": view_epochs, "view_seed": seed, "teacher_cache": cache}


def build_trial_trainer(trial: Trial, config: StudyConfig, folder: Path) -> DistillationTrainer:
    """Build the trainer of a trial, ready for its first step.

    Args:
        trial: the trial, one that is trained.
        config: what the study's trials share.
        folder: folder of its checkpoints.

    Raises:
        ValueError: any input that the run cannot use.
    """
    splits, teacher = load(config, trial.pair)
    args = _training_arguments(trial, config, folder, len(splits.train))
    set_seed(trial.seed)
    student = config.models[trial.pair].load_student(teacher)
    _leave_out_cache(args, student, teacher)
    trainer = build_trainer(splits, args, teacher=teacher, student=student, data=config.data)
    trainer.remove_callback(ConsoleCallback)
    return trainer


def _leave_out_cache(args: DistillationArguments, student: Backbone, teacher: Backbone) -> None:
    """For a method of maps: its views are those of the other methods, and the teacher embeds them each time."""
    if args.teacher_cache and reads_maps(student, teacher, losses_of(args)):
        args.teacher_cache = None


def rehearse_trial(trial: Trial, config: StudyConfig, folder: Path) -> None:
    """Try the arguments that the trials of a pair share; see ``rehearse``.

    Args:
        trial: any of the pair's trials that are trained.
        config: what the study's trials share.
        folder: folder of its checkpoints, where nothing is written.

    Raises:
        ValueError: arguments that cannot work.
    """
    splits, teacher = load(config, trial.pair)
    args = _training_arguments(trial, config, folder, len(splits.train))
    student = config.models[trial.pair].load_student(teacher)
    _leave_out_cache(args, student, teacher)
    rehearse(student, teacher, args)


def _training_arguments(
    trial: Trial, config: StudyConfig, folder: Path, num_train_images: int
) -> DistillationArguments:
    arguments = {
        "disable_tqdm": True,
        "report_to": [],
        "save_total_limit": 1,
        **config.training_of(trial),
        "output_dir": str(folder),
        "method": trial.expression,
        "seed": trial.seed,
        "num_images": trial.num_images,
        "neighbors_k": trial.neighbors_k,
        "eval_strategy": "no",  # a trial is measured by its study
    }
    # Trackers show the trials of a study next to each other.
    arguments["run_name"] = "-".join(filter(None, [arguments.get("run_name"), trial.folder_name]))
    shared = arguments.copy()
    if trial.anchors:
        arguments["per_device_train_batch_size"] = trial.anchors
    if milestones := config.falls_with_others(trial):
        # A step of the other trials has as many images, of which fewer are anchors: their epochs have more images.
        batch = DistillationArguments(**shared).per_device_train_batch_size
        shared["neighbors_k"] = trial.anchors // batch - 1
        ratio = _epoch_images(shared, num_train_images) / _epoch_images(arguments, num_train_images)
        arguments["lr_milestones"] = [ratio * epoch for epoch in milestones]
    if config.milestones:
        epochs = trial.num_images / _epoch_images(arguments, num_train_images)
        arguments["lr_milestones"] = [share * epochs for share in config.milestones]
    return DistillationArguments(**arguments)


def _epoch_images(arguments: dict, num_train_images: int) -> int:
    """Return the number of images, neighbours included, that a trial with these arguments sees in an epoch."""
    length = DistillationArguments(**arguments).run_length(num_train_images)
    return length.images_after(length.steps_per_epoch)


class _Progress(TrainerCallback, ExportableState):
    """Report the number of images that each step has seen, and count the teacher's, also of a run that is resumed."""

    def __init__(self, trainer: DistillationTrainer, report: Callable[[int], None]):
        self.trainer = trainer
        self.report = report
        self.reported = 0
        self.earlier = 0  # of the teacher, before the checkpoint that the run continues from

    @property
    def teacher_images(self) -> int:
        """Views that the teacher embedded so far, without those of evaluations and of the neighbour search."""
        return self.earlier + self.trainer.teacher_images

    def state(self) -> dict:
        return {"args": {}, "attributes": {"teacher_images": self.teacher_images}}

    def continue_from(self, state) -> None:
        """Take what a checkpoint says of the steps before it; a training that has ended does not begin again."""
        if state.global_step:
            self.earlier = state.stateful_callbacks[type(self).__name__]["attributes"]["teacher_images"]

    def on_train_begin(self, args, state, control, **kwargs):
        self.continue_from(state)
        state.stateful_callbacks[type(self).__name__] = self.state()

    def on_step_end(self, args, state, control, **kwargs):
        seen = self.trainer.images_seen
        self.report(seen - self.reported)
        self.reported = seen


def evaluations_path(folder: Path) -> Path:
    """Return the file of a trial's evaluations during training, next to ``folder``, that of its checkpoints."""
    return folder.with_name(f"{folder.name}.evaluations.json")


class _HeldOutEvaluation(TrainerCallback):
    """Measure the student on held-out images after shares of the training, which continues as if nothing had happened.

    Each evaluation is written at once, before any later checkpoint. A resumed training has the same student at the
    same step, so that what is written stays valid, and an evaluation that was interrupted is repeated.

    Args:
        trial: the trial, one that is reported.
        config: what the study's trials share.
        trainer: that of the trial.
        path: file of the evaluations.
    """

    def __init__(self, trial: Trial, config: StudyConfig, trainer: DistillationTrainer, path: Path):
        self.trial = replace(trial, split="validation")
        self.config = config
        self.trainer = trainer
        self.path = path
        self.found: list[dict] = json.loads(path.read_text()) if path.exists() else []

    def on_step_end(self, args, state, control, **kwargs):
        steps = {share: max(1, round(share * state.max_steps)) for share in self.config.eval_at}
        known = [row["share"] for row in self.found]
        due = [share for share, step in steps.items() if step == state.global_step and share not in known]
        if not due:
            return
        grace = ENDING.grace
        ENDING.grace = lambda: PATIENCE_TO_SAVE  # a signal must not end the process before this step is saved
        try:
            with keeping_generators():  # what the training draws must not depend on what a metric draws
                metrics = self._measure()
        finally:
            ENDING.grace = grace
        self.trainer.monitor.stop_clock()  # else the logged throughput has this time in it
        self.found += [{"share": share, "images_seen": self.trainer.images_seen} | metrics for share in due]
        write_json(self.path, sorted(self.found, key=lambda row: row["share"]))

    def _measure(self) -> dict:
        trainer = self.trainer
        evaluator = _evaluator(_inputs(self.config, self.trial.pair), "validation", self.config.bank_size)
        with trainer.teacher_in_place():  # with a teacher cache it waits on the CPU
            _ = evaluator.teacher_test_features, evaluator.teacher_train_features  # a teacher at fault ends the study
        try:
            return measure(self.trial, self.config, trainer.student, trainer.project)
        except NonFiniteEmbedding as error:
            return {"failed": _reason(error)}


def run_trial(
    trial: Trial,
    config: StudyConfig,
    folder: Path,
    report: Callable[[int], None] = lambda images: None,
    keep: Callable[[dict], None] = lambda result: None,
) -> dict:
    """Train and measure; resume from a checkpoint in ``folder``, which is removed at the end.

    With ``config.eval_at`` a reported trial also writes ``evaluations_path(folder)``: for each share ``share``,
    ``images_seen`` and the metrics on held-out images, or ``failed``.

    Args:
        trial: the trial.
        config: what the study's trials share.
        folder: folder of its checkpoints.
        report: function called after each step with the number of images that the step has seen.
        keep: function called with the result before the checkpoints are removed.

    Returns:
        The fields of the trial; ``images_seen``; ``teacher_images``, the views that the teacher embedded, pretraining
        included, without those in a shared cache; ``extra_teacher_images``, what it embeds before the first step;
        ``shared_views`` where these come back: their number of epochs, their seed, and whether the teacher's
        embeddings of them were shared; ``loss``, the mean over the last steps that were logged; and the metrics.
        ``student``, the name of its folder where it is kept.
        ``failed`` with the reason, and no metrics, if the loss or the student's embeddings became NaN or infinite.
    """
    if trial.method in UNTRAINED:
        result = _measure_untrained(trial, config)
        keep(result)
        return result
    result = _train_and_measure(trial, config, folder, report)
    keep(result)
    shutil.rmtree(folder, ignore_errors=True)
    return result


def _train_and_measure(trial: Trial, config: StudyConfig, folder: Path, report: Callable[[int], None]) -> dict:
    trainer = build_trial_trainer(trial, config, folder)
    progress = _Progress(trainer, report)
    trainer.add_callback(progress)
    _log_outside_of_checkpoints(trainer, trial, config)
    if trial.split == "test" and config.eval_at:
        trainer.add_callback(_HeldOutEvaluation(trial, config, trainer, evaluations_path(folder)))
    result = asdict(trial)
    try:
        trainer.train(resume_from_checkpoint=trainer.find_checkpoint("auto"))
    except NonFiniteLoss as error:
        return result | _failed(trainer, error)
    finally:
        end_trackers(trainer)
    if config.students and trial.split == "test":
        result["student"] = config.folder_of(trial)
        trainer.save_model(str(config.students / result["student"]))
    evaluator = _evaluator(_inputs(config, trial.pair), trial.split, config.bank_size)
    _ = evaluator.teacher_test_features, evaluator.teacher_train_features  # a teacher at fault ends the study
    try:
        metrics = measure(trial, config, trainer.student, trainer.project)
    except NonFiniteEmbedding as error:
        return result | _failed(trainer, error)
    if trainer.args.view_epochs:
        result["shared_views"] = {
            "epochs": trainer.args.view_epochs,
            "seed": trainer.train_dataset.seed,
            "teacher_cache": trainer.cached_teacher is not None,
        }
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result["images_seen"] = trainer.images_seen
    if not trainer.teacher_images:  # nothing was embedded, or nothing was left to train
        progress.continue_from(trainer.state)
    result["teacher_images"] = progress.teacher_images
    result["extra_teacher_images"] = _extra_teacher_images(trainer)
    result["loss"] = losses[-1] if losses else None
    return result | metrics


def _log_outside_of_checkpoints(trainer: DistillationTrainer, trial: Trial, config: StudyConfig) -> None:
    """Let TensorBoard write where the logs stay: the folder of the checkpoints is removed with them."""
    for tracker in trainer.callback_handler.callbacks:
        if isinstance(tracker, TensorBoardCallback) and (folder := tracker.logging_dir or config.logs):
            # A folder that the environment names is one for all trials.
            tracker.logging_dir = str(Path(folder, config.folder_of(trial)))


def _failed(trainer: DistillationTrainer, error: Exception) -> dict:
    """The result of a student whose loss or embeddings are not finite."""
    return {
        "images_seen": trainer.images_seen,
        "extra_teacher_images": _extra_teacher_images(trainer),
        "failed": _reason(error),
    }


def _reason(error: Exception) -> str:
    """What happened, without the remedy, which is that of a single run."""
    return str(error).split(";")[0]


def _extra_teacher_images(trainer: DistillationTrainer) -> int:
    """Return the number of images that the teacher embeds before the first step."""
    searched = len(trainer.train_dataset) if trainer.args.neighbors_k else 0
    return pretraining_images(trainer) + searched


def _measure_untrained(trial: Trial, config: StudyConfig) -> dict:
    _, teacher = load(config, trial.pair)
    models = config.models[trial.pair]
    device = _device(config)
    set_seed(trial.seed)
    network = teacher if trial.method == "teacher" else models.load_student(teacher)
    if trial.method == "random" and models.student_init != "random":
        network = random_weights(network, trial.seed)
    teacher.model.to(device)
    network.model.to(device)
    result = asdict(trial)
    result["images_seen"] = 0
    result["extra_teacher_images"] = 0
    return result | measure(trial, config, network)


def _device(config: StudyConfig) -> torch.device:
    """Where networks are measured that are not trained."""
    return DistillationArguments(tempfile.gettempdir(), use_cpu=config.training.get("use_cpu", False)).device


def measure(
    trial: Trial, config: StudyConfig, network: Backbone, project: Callable[[Tensor], Tensor] | None = None
) -> dict[str, float | None]:
    """Return the metrics of ``network`` on the trial's split.

    Args:
        trial: the trial.
        config: what the study's trials share.
        network: the network to measure; a trial of the teacher measures the teacher instead.
        project: the student's head, ``(m, d_s)`` to ``(m, d_t)``; None without one.
    """
    evaluator = _evaluator(_inputs(config, trial.pair), trial.split, config.bank_size)
    if trial.method == "teacher":
        network = evaluator.teacher  # the same object, so that the teacher is not embedded twice
    metrics, _ = evaluator(network, project)
    return metrics


def embedding_seconds(trial: Trial, config: StudyConfig, sample_size: int) -> float:
    """Estimate the seconds in which ``measure`` embeds its images by the trial's network, the most of its time.

    Args:
        trial: an untrained trial.
        config: what the study's trials share.
        sample_size: number of images that are embedded, after as many that are not timed.
    """
    evaluator = _evaluator(_inputs(config, trial.pair), trial.split, config.bank_size)
    network = config.models[trial.pair].load_student(evaluator.teacher)
    network.model.to(_device(config))
    images = evaluator.test_images.select(range(min(sample_size, len(evaluator.test_images))))
    evaluator.embed(network, images, "Timing")
    start = time.perf_counter()
    evaluator.embed(network, images, "Timing")
    count = len(evaluator.test_images) + len(evaluator.train_images or [])
    return (time.perf_counter() - start) / len(images) * count


@functools.lru_cache(maxsize=2)
def _evaluator(inputs: str, split: str, bank_size: int) -> Evaluator:
    splits, teacher = _load(inputs)
    return Evaluator(
        teacher,
        getattr(splits, split),
        splits.image_column,
        label_column=splits.label_column,
        train_images=sample(splits.train, bank_size if split == "validation" else None),
        linear=True,
        diagnostics=True,
        retrieval=True,
        on_bad_image=splits.on_bad_image,
    )
