"""A cell of a study: one training run and its measurement."""

import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from transformers import PrinterCallback, TrainerCallback, set_seed

from coss_hf.data.loading import ImageSplits
from coss_hf.data.views import ViewDataset
from coss_hf.evaluation.evaluator import Evaluator, random_weights
from coss_hf.models.backbone import Backbone
from coss_hf.neighbors.mining import nearest_neighbors
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.trainer.pretraining import pretraining_images
from coss_hf.trainer.trainer import DistillationTrainer
from coss_hf.trainer.training_args import DistillationArguments
from coss_hf.utils.errors import NonFiniteLoss

# How a cell is run, not what it comes to.
OPERATION = ("save_strategy", "save_steps", "dataloader_num_workers", "dataloader_persistent_workers")
UNTRAINED = ("teacher", "random", "initial")  # what no method trains, measured like the others


@dataclass(frozen=True)
class Cell:
    """One line of the results.

    Attributes:
        pair: name of teacher and student, for tables.
        method: name of the row, for tables; ``teacher``, ``random`` weights and the ``initial`` ones of a
            student that has its own are not trained.
        expression: ``--method``, with the scale in it.
        scale: of the method's ``beta``.
        seed: of initial weights, order and views.
        num_images: seen in training, neighbours included.
        split: what it is measured on: ``validation`` for a choice, ``test`` for a report.
        neighbors_k: drawn beside each anchor.
        anchors: a device and step; None: as the setting says.
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
        """For messages."""
        return f"{self.pair} {self.method} scale {self.scale:g} seed {self.seed} {self.split}"


@dataclass(frozen=True)
class Setting:
    """What all cells of a study share.

    Attributes:
        data: the images; ``validation_size`` of them are held out of every training set and bank.
        models: teacher, student and their options, by the name of the pair.
        training: fields of ``DistillationArguments``.
        milestones: shares of a run after which its rate falls tenfold; none: ``training`` says the schedule.
        bank_size: training images that a choice is measured against; a report takes all.
        identity: of images and teacher by the name of the pair; see ``identified``.
    """

    data: DataArguments
    models: dict[str, ModelArguments]
    training: dict = field(default_factory=dict)
    milestones: tuple[float, ...] = ()
    bank_size: int = 10_000
    identity: dict[str, str] = field(default_factory=dict)

    def identified(self) -> "Setting":
        """With hashes of images, labels and weights, so that what stands at a path may change."""
        found = {}
        for pair, models in self.models.items():
            splits, teacher = load(self, pair)
            columns = ["image_hash", *([splits.label_column] if splits.label_column else [])]
            parts = [
                part[name][:] for part in (splits.train, splits.validation, splits.test) if part for name in columns
            ]
            parts.append(teacher.fingerprint())
            if models.student_init != "random":
                parts.append(models.load_student(teacher).fingerprint())
            found[pair] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        return replace(self, identity=found)

    def key(self, cell: Cell) -> str:
        """Name of the file of a finished cell: of everything that its result depends on, not its row's name."""
        training = {name: value for name, value in self.training.items() if name not in OPERATION}
        shared = [asdict(self.data), asdict(self.models[cell.pair]), training, self.milestones, self.bank_size]
        shared.append(self.identity.get(cell.pair))
        method = cell.method if cell.method in UNTRAINED else None
        text = json.dumps([asdict(replace(cell, method=method)), shared], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=1)
def _load(text: str) -> tuple[ImageSplits, Backbone]:
    data, models = json.loads(text)
    return DataArguments(**data).load(), ModelArguments(**models).load_teacher()


def _identity(setting: Setting, pair: str) -> str:
    return json.dumps([asdict(setting.data), asdict(setting.models[pair])], sort_keys=True)


def load(setting: Setting, pair: str) -> tuple[ImageSplits, Backbone]:
    """Images and teacher; kept from cell to cell."""
    return _load(_identity(setting, pair))


def _arguments(cell: Cell, setting: Setting, folder: Path, images: int) -> DistillationArguments:
    given = {"output_dir": str(folder), "method": cell.expression, "seed": cell.seed}
    given |= {"num_images": cell.num_images, "neighbors_k": cell.neighbors_k}
    quiet = {"disable_tqdm": True, "report_to": [], "save_total_limit": 1}
    fixed = {"eval_strategy": "no"}  # a cell is measured once, at its end
    if cell.anchors:
        fixed["per_device_train_batch_size"] = cell.anchors
    args = DistillationArguments(**given, **(quiet | setting.training | fixed))
    if setting.milestones:
        length = args.run_length(images)
        epochs = cell.num_images / length.images_after(length.steps_per_epoch)
        args.lr_milestones = [share * epochs for share in setting.milestones]
    return args


def prepare(cell: Cell, setting: Setting, folder: Path, callbacks: list[TrainerCallback]) -> DistillationTrainer:
    """Everything up to the first step.

    Raises:
        ValueError: all bad input of a run.
    """
    splits, teacher = load(setting, cell.pair)
    args = _arguments(cell, setting, folder, len(splits.train))
    set_seed(cell.seed)
    teacher.maps = 0
    student = setting.models[cell.pair].load_student(teacher)
    size = max(*teacher.size, *student.size)
    views = ViewDataset(splits.train, splits.image_column, args.augmentation, size, seed=args.seed)
    if cell.neighbors_k:
        teacher.model.to(args.device)
        search = {"k": args.neighbors_pool, "options": setting.data, "cache_dir": setting.data.neighbors_cache}
        search |= {"batch_size": args.per_device_eval_batch_size}
        views.use_neighbors(
            nearest_neighbors(splits.train, teacher, splits.image_column, **search)[0], cell.neighbors_k
        )
    trainer = DistillationTrainer(student, teacher, args, views, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Progress(TrainerCallback):
    def __init__(self, report: Callable[[int], None]):
        self.report, self.trainer, self.seen = report, None, 0

    def on_step_end(self, args, state, control, **kwargs):
        seen = self.trainer.images_seen
        self.report(seen - self.seen)
        self.seen = seen


def run_cell(cell: Cell, setting: Setting, folder: Path, report: Callable[[int], None] = lambda images: None) -> dict:
    """Trains and measures; goes on from a checkpoint in ``folder``, and removes it at the end.

    Args:
        report: called with the number of images that each step has seen.

    Returns:
        The cell, ``images_seen``, ``extra_teacher_images`` (teacher passes beside those of the steps), ``loss`` (mean
        over the last steps that were logged), and its metrics;
        ``failed`` with the reason, and no metrics, where the loss became not finite.
    """
    splits, teacher = load(setting, cell.pair)
    result = asdict(cell) | {"images_seen": 0, "extra_teacher_images": 0}
    if cell.method in UNTRAINED:
        device = DistillationArguments(str(folder), use_cpu=setting.training.get("use_cpu", False)).device
        models = setting.models[cell.pair]
        set_seed(cell.seed)
        network = teacher if cell.method == "teacher" else models.load_student(teacher)
        if cell.method == "random" and models.student_init != "random":
            network = random_weights(network, cell.seed)
        teacher.model.to(device)
        network.model.to(device)
        return result | measure(cell, setting, network)
    progress = _Progress(report)
    trainer = progress.trainer = prepare(cell, setting, folder, [progress])
    try:
        trainer.train(resume_from_checkpoint=trainer.find_checkpoint("auto"))
    except NonFiniteLoss as error:
        shutil.rmtree(folder, ignore_errors=True)
        return result | {"images_seen": trainer.images_seen, "failed": str(error).split(";")[0]}
    extra = pretraining_images(trainer) + (len(splits.train) if cell.neighbors_k else 0)
    result |= {"images_seen": trainer.images_seen, "extra_teacher_images": extra}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result |= {"loss": losses[-1] if losses else None}
    result |= measure(cell, setting, trainer.student, trainer.project)
    shutil.rmtree(folder, ignore_errors=True)
    return result


@functools.lru_cache(maxsize=2)
def _evaluator(text: str, split: str, bank_size: int) -> Evaluator:
    splits, teacher = _load(text)
    train_images = splits.train
    if split == "validation":
        # Drawn, since folders of images are sorted by class.
        rows = np.random.default_rng(0).permutation(len(train_images))[:bank_size]
        train_images = train_images.select(np.sort(rows))
    return Evaluator(
        teacher,
        getattr(splits, split),
        splits.image_column,
        label_column=splits.label_column,
        train_images=train_images,
        linear=True,
        diagnostics=True,
        retrieval=True,
    )


def measure(cell: Cell, setting: Setting, network: Backbone, project=None) -> dict[str, float | None]:
    """Metrics of ``Evaluator`` on the cell's split."""
    evaluator = _evaluator(_identity(setting, cell.pair), cell.split, setting.bank_size)
    # One and the same object, so that the teacher is not embedded twice.
    return evaluator(evaluator.teacher if cell.method == "teacher" else network, project)[0]
