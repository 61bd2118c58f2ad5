"""What the user left out, filled by what the student is, by its images and by the machine; each with its reason."""

import copy
import inspect
import json
import math
import multiprocessing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from coss_hf.losses.registry import LOSSES
from coss_hf.models.architecture import family, is_trained
from coss_hf.models.backbone import Backbone
from coss_hf.trainer import default_settings as table
from coss_hf.trainer.checkpoint_files import RECORD
from coss_hf.trainer.given_arguments import plain
from coss_hf.trainer.training_args import BY_METRIC, DistillationArguments
from coss_hf.utils.cores import processes_on_machine, usable_cores
from coss_hf.utils.messages import get_logger
from coss_hf.utils.process_group import Processes
from coss_hf.utils.shared_memory import needed, room

logger = get_logger(__name__)

RECORDED = "settings"  # entry of the record in a checkpoint
RESUMED = "as in the run that is resumed"
# What a resumed optimizer has from its checkpoint, whatever the arguments say.
OF_OPTIMIZER = ("learning_rate", "weight_decay")
# The same, of arguments that have a default of their own; settings do not fill them.
OPTIONS_OF_OPTIMIZER = ("momentum", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args")
# Schedules that have no warm-up.
WITHOUT_WARMUP = (*BY_METRIC, SchedulerType.CONSTANT)


@dataclass(frozen=True)
class Situation:
    """What settings depend on.

    Attributes:
        family: of the student; see ``coss_hf.models.architecture``.
        parameters: number of the student's parameters.
        trained: whether the student has weights that were trained.
        size: side of the views in pixels.
        images: number of training images; None for a stream.
        views: number of views per step, over all processes, neighbours included.
        device: type of the device that trains: ``cuda``, ``cpu``, ...
        cores: number of cores for each process.
        threads: number of threads that PyTorch computes with, in each process.
        bf16: whether the device computes in bfloat16, and both networks have float32 weights.
        length_is_known: whether the length is decided elsewhere, as by a study.
        pixels_to_embed: pixels of an image as it is embedded, in evaluations and searches of neighbours; 0 without any.
        shared_memory: bytes of it that are free for each process; None where the system has none.
    """

    family: str
    parameters: int
    trained: bool
    size: int
    images: int | None
    views: int
    device: str = "cpu"
    cores: int = 1
    threads: int = 1
    bf16: bool = False
    length_is_known: bool = False
    pixels_to_embed: int = 0
    shared_memory: int | None = field(default=None, compare=False)

    @property
    def student(self) -> str:
        """The student's family and size."""
        return f"{self.family}, {self.parameters / 1e6:.3g} million parameters"

    def __str__(self) -> str:
        weights = "trained" if self.trained else "random"
        images = "a stream" if self.images is None else f"{self.images:,} images"
        return f"{self.student}, {weights} weights, views of {self.size} px, {images}, {self.views:,} views a step"


@dataclass(frozen=True)
class Filled:
    """A value that the user left out, and why it was taken."""

    value: object
    reason: str


@dataclass
class Settings:
    """What was filled.

    Attributes:
        mode: ``auto`` or ``paper``.
        situation: what it was filled by; None for ``paper``.
        filled: by the name of the argument.
        shown: whether the user has seen them.
    """

    mode: str
    situation: Situation | None = None
    filled: dict[str, Filled] = field(default_factory=dict)
    shown: bool = False

    def leave_to(self, optimizer, scheduler) -> None:
        """Say nothing of what an optimizer or a schedule decides that was given as an object; None for none."""
        decided = ("optim", "learning_rate", "weight_decay", "weight_decay_on") if optimizer is not None else ()
        for name in (*decided, *(("warmup_steps",) if scheduler is not None else ())):
            self.filled.pop(name, None)

    def record(self) -> dict:
        """What ``run.json`` keeps."""
        values = {name: {"value": one.value, "reason": one.reason} for name, one in self.filled.items()}
        return {"mode": self.mode, "situation": None if self.situation is None else str(self.situation)} | values

    def table(self) -> str:
        """Name, value and reason of each, in lines; empty where nothing was filled."""
        if not self.filled:
            return ""
        rows = [(name, _shown(one.value), one.reason) for name, one in self.filled.items()]
        names = max(len(name) for name, _, _ in rows)
        values = max(len(value) for _, value, _ in rows)
        lines = [f"  {name:<{names}}  {value:<{values}}  {reason}" for name, value, reason in rows]
        return "\n".join([f"settings    for {self.situation} (--settings paper: the CIFAR recipe)", *lines])


def _shown(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---- the situation ----


def find_situation(
    args: DistillationArguments,
    student: Backbone,
    teacher: Backbone,
    *,
    size: int,
    images: int | None,
    embeds: bool = False,
    share_of_cores: int = 1,
    length_is_known: bool = False,
) -> Situation:
    """Find out what the settings of a run depend on. All processes of a run call together.

    Where processes differ, as on different machines, the situation is the narrowest: all fill in the same.

    Args:
        args: arguments of the training.
        student: the network that is trained.
        teacher: the network that it learns from.
        size: side of the views in pixels.
        images: number of training images; None for a stream.
        embeds: whether held-out images are evaluated during training.
        share_of_cores: number of trainings that share the machine, each with its share of the threads.
        length_is_known: whether the length is decided elsewhere.
    """
    free = room()
    own = (
        _supports_bf16(args.device, student, teacher),
        max(1, usable_cores() // (processes_on_machine() * share_of_cores)),
        max(1, torch.get_num_threads() // share_of_cores),
        math.inf if free is None else free // share_of_cores,
    )
    bf16, cores, threads, memory = zip(*Processes().gather(own))
    return Situation(
        family=family(student.model),
        parameters=sum(parameter.numel() for parameter in student.model.parameters()),
        trained=is_trained(student.model),
        size=size,
        images=images,
        views=args.images_per_step,
        device=args.device.type,
        cores=min(cores),
        threads=max(threads),
        bf16=all(bf16),
        length_is_known=length_is_known,
        pixels_to_embed=pixels_to_embed(student, teacher) if embeds or args.neighbors_k else 0,
        shared_memory=None if min(memory) == math.inf else min(memory),
    )


def pixels_to_embed(student: Backbone, teacher: Backbone) -> int:
    """Return the pixels of an image as the larger of both networks embeds it."""
    return max(math.prod(backbone.size) for backbone in (teacher, student))


def _supports_bf16(device: torch.device, *backbones: Backbone) -> bool:
    if device.type != "cuda" or not torch.cuda.is_bf16_supported(including_emulation=False):
        return False
    return all(next(backbone.model.parameters()).dtype == torch.float32 for backbone in backbones)


# ---- filling ----


def fill(
    args: DistillationArguments, situation: Situation, recorded: Mapping[str, object] | None = None
) -> tuple[DistillationArguments, Settings]:
    """Return a copy of ``args`` in which nothing is left out, and what was filled. What was given stands.

    Args:
        args: arguments of the training.
        situation: what to fill it by.
        recorded: values of the run that is to be resumed, of ``recorded_settings``; None for a fresh start.

    Raises:
        ValueError: the run that is to be resumed was trained in a precision that this machine does not have, by
            another optimizer, or by other values than ``--settings paper`` means.

    Example::

        args, settings = fill(args, find_situation(args, student, teacher, size=224, images=len(images)))
        print(settings.table())
    """
    args = copy.copy(args)
    _take_over_options(args, recorded)
    if args.settings == "paper":
        left_out = args.left_out  # where they became so after the arguments were made
        args.stood_in = (*args.stood_in, *left_out)
        for name in left_out:
            setattr(args, name, table.PAPER[name])
        _warn_of_no_effect(args)
        check_resumed(args, recorded)
        return args, Settings("paper")
    left_out = args.stood_in = args.left_out
    if args.deepspeed_plugin is not None:
        args.check_deepspeed()
        values = {name: Filled(value, "DeepSpeed is set up before the student is known") for name, value in _of_paper()}
        if _has_precision(args):
            del values["bf16"]
    else:
        values = _of_optimizer(args, situation, left_out) | _of_length(args, situation)
        values |= _of_precision(args, situation)
        values |= _of_schedule(args, situation, values)
    values |= _of_loader(args, situation)
    if recorded is not None:
        values |= _resumed(recorded, values, situation)
    filled = {name: values[name] for name in table.PAPER if name in left_out and name in values}
    _check_precision(filled, situation)
    for name in left_out:
        setattr(args, name, filled[name].value if name in filled else table.PAPER[name])
    args.optim = OptimizerNames(args.optim)
    if "bf16" in filled and args.bf16:
        args.mixed_precision = "bf16"
    _warn_of_no_effect(args)
    check_resumed(args, recorded)
    return args, Settings("auto", situation, filled)


def _warn_of_no_effect(args) -> None:
    """Name the options that were given and that this run does not read."""
    optim = _optimizer_name(args.optim)
    by_method = [inspect.signature(LOSSES[method.name]).parameters for method in args.methods]
    unread = {
        "momentum": not _is_sgd(optim) and f"with --optim {optim}",
        **{name: _is_sgd(optim) and f"with --optim {optim}" for name in ("adam_beta1", "adam_beta2", "adam_epsilon")},
        "lr_gamma": not args.lr_milestones and "without --lr_milestones",
        "lr_scheduler_kwargs": bool(args.lr_milestones) and "with --lr_milestones",
        "lambda_ss": not any("lambda_ss" in names for names in by_method) and f"with --method {args.method}",
        "head_hidden_size": args.head not in ("auto", "mlp") and f"with --head {args.head}",
        "teacher_cache_dtype": not args.teacher_cache and "without --teacher_cache",
    }
    for name, why in unread.items():
        if why and name in args.given:
            logger.warning("--%s=%s has no effect %s.", name, args.given[name], why)


def _of_paper():
    return ((name, value) for name, value in table.PAPER.items() if name not in table.OPERATION)


def _of_optimizer(args, situation: Situation, left_out: tuple[str, ...]) -> dict[str, Filled]:
    usual, optim = _choose_optimizer(args, situation, left_out)
    name = _optimizer_name(args.optim or usual.optim)
    return {
        "optim": optim,
        "learning_rate": _rate(usual, situation),
        "weight_decay": Filled(usual.weight_decay, f"usual with {name}"),
        "weight_decay_on": Filled(
            usual.weight_decay_on,
            "as in the paper" if usual.weight_decay_on == "all" else "not on norms, biases, position and class tokens",
        ),
        "max_grad_norm": Filled(usual.max_grad_norm, "else the long gradients of the first steps destroy the student"),
        "warmup_steps": Filled(usual.warmup, ""),
    }


def _choose_optimizer(args, situation: Situation, left_out: tuple[str, ...]) -> tuple[table.StartingValues, Filled]:
    """By what was given besides; without that by the situation."""
    usual, reason = table.starting_values(situation.family, situation.parameters), situation.student
    rate = None if "learning_rate" in left_out else args.learning_rate
    if args.optim is not None:
        usual = table.SGD if _is_sgd(args.optim) else _like_adam(usual)
    elif "momentum" in args.given:
        usual, reason = table.SGD, "a momentum was given, which is one of SGD"
    elif any(name.startswith("adam_") for name in args.given):
        usual, reason = _like_adam(usual), "options of Adam were given"
    elif rate is not None and not _is_sgd(usual.optim) and rate >= max(_borders(situation)):
        usual, reason = table.SGD, f"a learning rate of {rate:g} was given, which is one of SGD"
    elif rate is not None and _is_sgd(usual.optim) and rate < min(_borders(situation)):
        usual, reason = table.ADAMW, f"a learning rate of {rate:g} was given, which is one of AdamW"
    return usual, Filled(usual.optim, reason)


def _borders(situation: Situation) -> tuple[float, float]:
    """The rates in the middle between those of SGD and AdamW, as in the table and in this situation.

    A rate that was given changes the optimizer where both say that it is one of the other. By the second alone, 5e-4
    for a few views of a student with trained weights would be one of SGD, though it is an ordinary rate of AdamW.
    """
    in_table = math.sqrt(table.SGD.learning_rate * table.ADAMW.learning_rate)
    return in_table, math.sqrt(_rate(table.SGD, situation).value * _rate(table.ADAMW, situation).value)


def _is_sgd(optim) -> bool:
    return "sgd" in _optimizer_name(optim)


def _like_adam(usual: table.StartingValues) -> table.StartingValues:
    """Of an optimizer that scales each gradient by itself, whatever the family."""
    return table.ADAMW if _is_sgd(usual.optim) else usual


def _optimizer_name(optim) -> str:
    return str(plain(optim))


def _rate(usual: table.StartingValues, situation: Situation) -> Filled:
    least, most = table.RATE_FACTORS
    factor = min(max(math.sqrt(situation.views / usual.at_views), least), most)
    reason = f"{usual.learning_rate:g} at {usual.at_views} views per step"
    if factor != 1:
        root = f"the square root of {situation.views:,} / {usual.at_views}"
        reason += f", times {factor:.3g}" + (
            f" ({root})" if least < factor < most else f" (within {least:g} and {most:g})"
        )
    rate = usual.learning_rate * factor
    if situation.trained:
        rate *= table.TRAINED_RATE
        reason += f", times {table.TRAINED_RATE:g} since its weights are trained"
    return Filled(float(f"{rate:.2g}"), reason)


def _of_length(args, situation: Situation) -> dict[str, Filled]:
    """Nothing where the length was given in steps or images."""
    if args.max_steps > 0 or args.num_images is not None or situation.length_is_known or not situation.images:
        return {}
    wanted = table.IMAGES_SEEN / (situation.images * (1 + args.neighbors_k))
    epochs = min(max(math.ceil(wanted), table.MIN_EPOCHS), table.MAX_EPOCHS)
    reason = f"{table.IMAGES_SEEN:,} images seen, in {table.MIN_EPOCHS} to {table.MAX_EPOCHS} epochs"
    if args.lr_milestones and epochs <= args.lr_milestones[-1]:
        epochs = math.ceil(args.lr_milestones[-1] * 8 / 7)
        reason = "an eighth of the run behind the last of --lr_milestones"
    return {"num_train_epochs": Filled(float(epochs), reason)}


def _of_schedule(args, situation: Situation, values: dict[str, Filled]) -> dict[str, Filled]:
    """The warm-up, which depends on the length."""
    if not args.lr_milestones and args.lr_scheduler_type in WITHOUT_WARMUP:
        return {"warmup_steps": Filled(0, f"--lr_scheduler_type {args.lr_scheduler_type.value} has none")}
    share = values["warmup_steps"].value
    epochs = _epochs(args, situation, values)
    if epochs and share * epochs > table.MAX_WARMUP_EPOCHS:
        return {
            "warmup_steps": Filled(
                round(table.MAX_WARMUP_EPOCHS / epochs, 4),
                f"share of the run: its first {table.MAX_WARMUP_EPOCHS} epochs",
            )
        }
    return {"warmup_steps": Filled(share, f"share of the run, {table.MAX_WARMUP_EPOCHS} epochs at most")}


def _epochs(args, situation: Situation, values: dict[str, Filled]) -> float | None:
    """Length of the run; None where it is not known here."""
    if situation.length_is_known or not situation.images:
        return None
    views = situation.images * (1 + args.neighbors_k)
    if args.num_images is not None:
        return args.num_images / views
    if args.max_steps > 0:
        return args.max_steps * situation.views / views
    if args.num_train_epochs is not None:
        return args.num_train_epochs
    return values["num_train_epochs"].value


def _has_precision(args) -> bool:
    return args.fp16 or args.mixed_precision != "no"


def _of_precision(args, situation: Situation) -> dict[str, Filled]:
    """Nothing where a precision was given, to the training or to its launcher."""
    if _has_precision(args):
        return {}
    if situation.bf16:
        return {"bf16": Filled(True, "this GPU computes in bfloat16; weights and loss stay float32")}
    if situation.device == "cpu":
        return {"bf16": Filled(False, "a CPU trains in float32")}
    return {"bf16": Filled(False, "not on this device, or not with weights of this data type")}


def _of_loader(args, situation: Situation) -> dict[str, Filled]:
    """Loader workers. Their number changes no student, but that of a stream, whose order depends on it."""
    workers = _workers(args, situation)
    count = workers.value if args.dataloader_num_workers is None else args.dataloader_num_workers
    found = {"dataloader_num_workers": workers}
    if not count:
        return found
    found["dataloader_persistent_workers"] = Filled(True, "workers are started once, not for each epoch")
    prefetch = _largest_prefetch(args, situation, count)
    if prefetch is not None:
        found["dataloader_prefetch_factor"] = Filled(prefetch, "batches that each worker loads ahead")
    return found


def start_method() -> str:
    """How this process starts others; asked so that the caller can still choose another way."""
    return multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]


def _workers(args, situation: Situation) -> Filled:
    least = 1 if args.dataloader_persistent_workers or args.dataloader_prefetch_factor else 0
    if situation.images is None:
        return Filled(least, "the order of a stream depends on the workers, and must not depend on the machine")
    # Versions of Transformers at the floor do not have this option.
    if start_method() != "fork" and not getattr(args, "dataloader_multiprocessing_context", None):
        return Filled(least, "workers of this system are not forked, and may not be able to load these images")
    count = max(most_workers(args, situation), least)
    cores = f"{situation.cores} core{'s' if situation.cores > 1 else ''}"
    if count < max(_workers_by_cores(situation), least):
        return Filled(count, "as many as shared memory has room for")
    if situation.device != "cpu":
        return Filled(count, f"of {cores} one is for the training, and {table.MAX_WORKERS} workers at most")
    return Filled(count, f"{cores}, and PyTorch computes with {situation.threads}")


def most_workers(args: DistillationArguments, situation: Situation) -> int:
    """Return the largest number of loader workers that have cores and shared memory.

    Args:
        args: arguments of the training.
        situation: the machine and the images.
    """
    count = _workers_by_cores(situation)
    while count > 0 and not _fits(args, situation, count):
        count -= 1
    return count


def _workers_by_cores(situation: Situation) -> int:
    busy = situation.threads if situation.device == "cpu" else 1
    return max(0, min(situation.cores - busy, table.MAX_WORKERS))


def _largest_prefetch(args, situation: Situation, workers: int) -> int | None:
    """None for PyTorch's default."""
    if situation.device == "cpu" or not _fits(args, situation, workers, table.PREFETCH):
        return None
    return table.PREFETCH


def _fits(args, situation: Situation, workers: int, prefetch: int | None = None) -> bool:
    """Whether shared memory has room for the batches of so many workers, as the trainer will check."""
    if situation.shared_memory is None:
        return True
    batches = loader_batches(args, situation.size, situation.pixels_to_embed)
    return needed(workers, batches, prefetch or args.dataloader_prefetch_factor) <= situation.shared_memory


def loader_batches(args: DistillationArguments, size: int, pixels_to_embed: int) -> dict[str, int]:
    """Return the bytes of a batch of each loader of a training, by what it is for.

    Args:
        args: arguments of the training.
        size: side of the views in pixels.
        pixels_to_embed: pixels of an image as it is embedded; 0 where none is.
    """
    views = args.per_device_train_batch_size * (1 + args.neighbors_k) * 3 * size**2
    batches = {"views": views}
    if pixels_to_embed:
        batches["images to embed"] = args.per_device_eval_batch_size * 3 * pixels_to_embed * 4  # float32
    return batches


# ---- the run that is resumed ----


def recorded_settings(checkpoint: str | Path | None) -> dict[str, object] | None:
    """The settings that a checkpoint was trained with; None without a checkpoint, or where it has no settings."""
    if checkpoint is None:
        return None
    return json.loads(Path(checkpoint, RECORD).read_text()).get(RECORDED)


def values_to_record(args: DistillationArguments) -> dict[str, object]:
    """The values of all settings of a run, given or filled, for its checkpoints; JSON can hold them."""
    values = {name: plain(getattr(args, name)) for name in table.PAPER}
    if args.max_steps > 0 or args.num_images is not None:
        values["num_train_epochs"] = None  # decides nothing
    values |= {name: getattr(args, name, None) for name in OPTIONS_OF_OPTIMIZER}
    # Also where the launcher of the run said so.
    values["bf16"] = args.mixed_precision == "bf16"
    values["fp16"] = args.mixed_precision == "fp16"
    return values


def _resumed(recorded: Mapping[str, object], values: dict[str, Filled], situation: Situation) -> dict[str, Filled]:
    """What a resumed run takes over: everything that changes a student, so that another machine leaves the same."""
    found = {}
    for name, value in recorded.items():
        of_machine = name in table.OPERATION and not (situation.images is None and name == "dataloader_num_workers")
        if name in table.PAPER and value is not None and not of_machine and name in values:
            found[name] = Filled(value, RESUMED)
    return found


def _take_over_options(args: DistillationArguments, recorded: Mapping[str, object] | None) -> dict[str, object]:
    """Put options of the optimizer of the run that is resumed in the place of defaults, in place; return them."""
    found = {}
    for name in OPTIONS_OF_OPTIMIZER:
        if (
            recorded is not None
            and name in recorded
            and recorded[name] != getattr(args, name) == getattr(DistillationArguments, name)
        ):
            found[name] = recorded[name]
            setattr(args, name, recorded[name])
    return found


def take_over(
    args: DistillationArguments, settings: Settings, recorded: Mapping[str, object] | None
) -> dict[str, object]:
    """Put what the run to be resumed began with in the place of what was filled, in place; return it by name.

    For a trainer that is told only in ``train`` that it resumes.

    Args:
        args: arguments of the trainer, filled.
        settings: what was filled.
        recorded: see ``recorded_settings``.

    Raises:
        ValueError: another precision, in which the trainer was built, or another optimizer, which was given.
    """
    if recorded is None:
        return {}
    taken_over = _resumed(recorded, settings.filled, settings.situation) if settings.filled else {}
    for name, taken in taken_over.items():
        if name == "bf16" and bool(taken.value) != (args.mixed_precision == "bf16"):
            raise ValueError(
                f"--resume_from_checkpoint: the run was trained with --bf16 {str(taken.value).lower()}; make the "
                f"trainer with that argument."
            )
        setattr(args, name, OptimizerNames(taken.value) if name == "optim" else taken.value)
        settings.filled[name] = taken
    options = _take_over_options(args, recorded)
    check_resumed(args, recorded)
    return {name: taken.value for name, taken in taken_over.items()} | options


def check_resumed(args: DistillationArguments, recorded: Mapping[str, object] | None) -> None:
    """Refuse to resume a run by values that it was not begun with, and that nobody gave by name or that have no effect.

    Args:
        args: arguments of the training, filled.
        recorded: see ``recorded_settings``.

    Raises:
        ValueError: another optimizer, which cannot read the state of the run's own, or an option of it that would have
            no effect; float16 no longer; or another value of ``--settings paper``.
    """
    if recorded is None:
        return
    if recorded.get("fp16") and args.mixed_precision != "fp16":
        raise ValueError(
            "--resume_from_checkpoint: the run was trained in float16; give --fp16, or start afresh in another "
            "--output_dir."
        )
    before = recorded["optim"]
    now = _optimizer_name(args.optim)
    if before != now:
        raise ValueError(
            f"--resume_from_checkpoint: the run was trained with --optim {before}, and now --optim is {now}; leave "
            f"--optim and --settings out, or start afresh in another --output_dir."
        )
    _check_options_of_optimizer(args, recorded)
    if args.settings != "paper":
        return
    for name in args.stood_in:
        before = recorded[name]
        now = args.mixed_precision == "bf16" if name == "bf16" else table.PAPER[name]
        if name not in table.OPERATION and before is not None and before != now and not _is_unused(name, args):
            raise ValueError(
                f"--resume_from_checkpoint: the run was trained with --{name} {before}, and --settings paper means "
                f"{now}; leave --settings out, or give --{name}."
            )


def _check_options_of_optimizer(args: DistillationArguments, recorded: Mapping[str, object]) -> None:
    """Refuse values that were given to an optimizer whose state, with its own values, is read from a checkpoint."""
    for name in _options_that_count(args):
        now = getattr(args, name, None)
        if name in recorded and recorded[name] != now:
            raise ValueError(
                f"--{name}={now}: the run that is resumed was trained with {recorded[name]}, which its optimizer "
                f"keeps; leave --{name} out, or begin a new run with it in another --output_dir, from the student in "
                f"the checkpoint if you like (--student with its folder)."
            )


def _options_that_count(args: DistillationArguments) -> list[str]:
    """Names of the values that were given, as far as this optimizer reads them."""
    filled = [name for name in args.stood_in if args.settings != "paper" or getattr(args, name) == table.PAPER[name]]
    names = [name for name in OF_OPTIMIZER if name not in filled]
    prefix = "adam_" if _is_sgd(args.optim) else "momentum"
    return names + [name for name in OPTIONS_OF_OPTIMIZER if not name.startswith(prefix)]


def _is_unused(name: str, args: DistillationArguments) -> bool:
    """The length in epochs, where there is another."""
    return name == "num_train_epochs" and (args.max_steps > 0 or args.num_images is not None)


def _check_precision(filled: dict[str, Filled], situation: Situation) -> None:
    """A CPU computes in bfloat16, slowly; a GPU without it does not."""
    taken = filled.get("bf16")
    if taken is not None and taken.value and not situation.bf16 and situation.device != "cpu":
        raise ValueError(
            "--resume_from_checkpoint: the run was trained in bfloat16, which this device does not compute in; resume "
            "it where it can, or give --bf16 false, which changes the student slightly."
        )
