"""Which of the arguments that were given an error of ``Trainer`` is about, and arguments that no distillation reads."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import MISSING, fields
from functools import lru_cache
from typing import get_args, get_type_hints

import numpy as np
from transformers import TrainingArguments

from coss_hf.utils.messages import first_line

# By the part that reads them: how the names of arguments begin.
ENGINE = (
    "report_to",
    "fsdp",
    "deepspeed",
    "parallelism_config",
    "accelerator_config",
    "ddp_",
    "bf16",
    "fp16",
    "tf32",
    "torch_compile",
    "use_cpu",
)
LOADER = ("dataloader_", "train_sampling_strategy", "length_column_name", "data_seed")
OPTIMIZER = ("optim", "learning_rate", "momentum", "weight_decay", "adam_")
SCHEDULE = ("lr_", "warmup")
COMPILATION = ("torch_compile",)
STEP = ("gradient_checkpointing", "activation_checkpointing", "max_grad_norm", "debug", *OPTIMIZER, *SCHEDULE, *ENGINE)
# Of no use for an error, and of a length.
_NOT_SHOWN = ("output_dir", "hub_token", "dataloader_drop_last")

LABELS = "distillation reads no labels"
OWN_EVALUATION = "evaluation compares embeddings, with metrics of its own"
NO_TEXT = "images have no tokens"
# Arguments of ``TrainingArguments`` that would do nothing, or another thing than they say.
UNUSED = {
    "length_column_name": "views have no lengths",
    "label_names": LABELS,
    "label_smoothing_factor": LABELS,
    "include_for_metrics": OWN_EVALUATION,
    "batch_eval_metrics": OWN_EVALUATION,
    "prediction_loss_only": OWN_EVALUATION,
    "eval_accumulation_steps": OWN_EVALUATION,
    "eval_use_gather_object": OWN_EVALUATION,
    "bf16_full_eval": "evaluation computes in the precision of the weights (--student_dtype)",
    "fp16_full_eval": "evaluation computes in the precision of the weights (--student_dtype)",
    "neftune_noise_alpha": NO_TEXT,
    "include_num_input_tokens_seen": NO_TEXT,
    "use_liger_kernel": "its kernels are those of language models",
    "auto_find_batch_size": "the loss depends on the size of a batch, which must stay the one given",
    "save_on_each_node": "a run has one --output_dir, which all machines share, and the first process writes it",
    "enable_jit_checkpoint": "on SIGTERM a checkpoint is written in any case",
}
# The smallest and the largest value that works; ``inf`` for no limit.
RANGES = {
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "dataloader_num_workers": (0, math.inf),
    "neighbors_k": (0, math.inf),
    "head_hidden_size": (1, math.inf),
    "eval_train_size": (1, math.inf),
    "eval_sample_size": (1, math.inf),
    "save_total_limit": (1, math.inf),
    "learning_rate": (0, math.inf),
    "lr_gamma": (0, math.inf),
    "momentum": (0, 1),
    "weight_decay": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "warmup_steps": (0, math.inf),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
    "view_seed": (0, 2**32 - 1),
    "view_epochs": (0, math.inf),
}


def instead_of_arguments(arguments: dict, optimizer, scheduler) -> dict:
    """Return what a record holds where the user gave an optimizer or a schedule as an object.

    Args:
        arguments: those of the run, by name.
        optimizer: the object; None for none.
        scheduler: the same.

    Returns:
        None for each argument that the object takes the place of, and a description of the object.
    """
    found = {}
    for name, prefixes, given in (("optimizer", OPTIMIZER, optimizer), ("scheduler", SCHEDULE, scheduler)):
        if given is not None:
            found |= {argument: None for argument in arguments if argument.startswith(prefixes)}
            options = ", ".join(f"{key}={value}" for key, value in getattr(given, "defaults", {}).items())
            found[name] = f"{type(given).__module__}.{type(given).__name__}({options})"
    return found


@contextlib.contextmanager
def recording_derived(args: TrainingArguments, derived: dict[str, tuple] | None) -> Iterator[None]:
    """Around ``__post_init__``, which derives arguments from others: keep what was given in ``args.derived``.

    ``dataclasses.replace`` makes new arguments of the values of others. Those that were derived must not count as
    given: they follow from what is replaced, too. ``dataclasses.replace`` does not say which values it was given, so
    numbers and texts that are derived become objects of their own, by which they are known. Of True, False, None and
    members of enumerations Python has one object each: where one that ``dataclasses.replace`` is given is the derived
    one, it counts as derived. Assign such a value to the arguments afterwards.

    Args:
        args: that are made.
        derived: of the arguments that ``dataclasses.replace`` makes them of; None without such ones.
    """
    for name, (before, after) in (derived or {}).items():
        if getattr(args, name) is after:
            setattr(args, name, before)
    names = [field.name for field in fields(args) if field.init]
    for name in names:
        if isinstance(getattr(args, name), (np.generic, np.ndarray)):
            setattr(args, name, getattr(args, name).tolist())  # nor can JSON hold those of NumPy
    before = {name: getattr(args, name) for name in names}
    yield
    changed = [name for name in names if getattr(args, name) is not before[name]]
    for name in changed:
        setattr(args, name, _as_own_object(getattr(args, name)))
    args.derived = {name: (before[name], getattr(args, name)) for name in changed}


class _Int(int):
    """An integer that is an object of its own: Python shares small ones."""


def _as_own_object(value):
    """An equal number or text that nobody else has; of other kinds the same object."""
    if type(value) is int:
        return _Int(value)
    if type(value) is float:
        return float.fromhex(value.hex())
    return "".join(list(value)) if type(value) is str else value


def given(args: TrainingArguments) -> dict[str, object]:
    """The arguments that are not at their default, by name; call it before ``__post_init__`` derives others."""
    return {
        field.name: getattr(args, field.name)
        for field in fields(args)
        if field.init and field.name not in _NOT_SHOWN and not _same(getattr(args, field.name), _default(field))
    }


def resolve_saving(args: TrainingArguments, strategy: str) -> None:
    """Fill when checkpoints are written: by ``strategy``, unless an interval in steps was given."""
    if args.save_strategy is None:
        args.save_strategy = strategy if args.save_steps is None else "steps"
    if args.save_steps is None:
        args.save_steps = 500


def _default(field):
    return field.default if field.default_factory is MISSING else field.default_factory()


def _same(value, default) -> bool:
    off = (None, False, "no", "none", ["none"], [], "")
    return (value in off and default in off) or _text(value) == _text(default)


def _text(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(plain(value))


def plain(value):
    """The value of a member of an enumeration; anything else as it is."""
    return getattr(value, "value", value)


def refused(given: dict[str, object], names: tuple[str, ...], problem: str, error: Exception) -> ValueError:
    """An error in place of one of ``Trainer`` or its packages, which rarely names what was given.

    Args:
        given: the arguments that were given, by name.
        names: how the names of the arguments begin that may be at fault, where the error has no name or value.
        problem: what was tried.
        error: why it failed; returned as it is where it names an argument by itself.
    """
    if isinstance(error, ValueError) and str(error).startswith("--"):
        return error
    text = _plain(error)
    possible = [name for start in names for name in given if name.startswith(start)]
    named = [name for name, value in given.items() if _plain(name) in text or _is_in(value, text)]
    words = " ".join(f"--{name}={_text(given[name])}" for name in dict.fromkeys(named or possible))
    if not words:
        return ValueError(f"{problem} ({first_line(error)}).")
    return ValueError(f"{words}: {problem} ({first_line(error)}); correct what was given here, or leave it out.")


def _is_in(value, text: str) -> bool:
    value = _plain(_text(value))
    return len(value) > 2 and value not in ("true", "false") and value in text


def _plain(text) -> str:
    return str(text).lower().replace("_", " ").replace("-", " ")


def check_unused(given: dict[str, object]) -> None:
    """Refuse arguments that a distillation does not read.

    Raises:
        ValueError: the argument, and why it has no use.
    """
    for name, value in given.items():
        if name in UNUSED:
            raise ValueError(f"--{name}={_text(value)}: {UNUSED[name]}; leave it out.")


@lru_cache
def _numbers(kind: type) -> tuple[str, ...]:
    """Names of the fields of a dataclass that take numbers and no texts."""
    hints = get_type_hints(kind)
    kinds = {field.name: {hints[field.name], *get_args(hints[field.name])} for field in fields(kind)}
    return tuple(name for name, found in kinds.items() if found & {int, float} and str not in found)


def _yaml_number(text: str) -> str:
    """How YAML reads it as a number, which takes 5e-4 for a text."""
    try:
        return f" (in YAML with a point, such as {float(text):.1e})" if "e" in text.lower() else ""
    except ValueError:
        return ""


def check_numbers(args: TrainingArguments) -> None:
    """Refuse texts where numbers are expected, and numbers outside the range in which a training works.

    Raises:
        ValueError: the argument, its value and its range.
    """
    for name in _numbers(type(args)):
        value = getattr(args, name)
        if isinstance(value, str):
            raise ValueError(f"--{name}={value!r} is a text: give a number{_yaml_number(value)}.")
    for name, (least, most) in RANGES.items():
        value = getattr(args, name, None)
        if isinstance(value, (int, float)) and not least <= value <= most:
            if most == math.inf:
                raise ValueError(f"--{name}={value}: give {least} or more.")
            raise ValueError(f"--{name}={value}: give a number from {least} to {most}.")
    if args.max_steps == 0:
        raise ValueError("--max_steps=0: give 1 or more, or leave it out for --num_train_epochs.")
    by_epochs = args.max_steps < 0 and getattr(args, "num_images", None) is None
    epochs = args.num_train_epochs
    if by_epochs and epochs is not None and not 0 < epochs < math.inf:
        raise ValueError(f"--num_train_epochs={epochs}: give more than 0.")


def check_order_of_images(args: TrainingArguments) -> None:
    """Refuse an order of images that a resumed run cannot draw again.

    Raises:
        ValueError: the sampler draws from a generator whose state no checkpoint keeps.
    """
    if not args.accelerator_config.use_seedable_sampler:
        raise ValueError(
            "--accelerator_config: use_seedable_sampler cannot be switched off: a resumed run would see its images "
            "in another order; leave it out."
        )
