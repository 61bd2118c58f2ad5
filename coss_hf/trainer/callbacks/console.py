"""What a training prints while it runs: one line that a person reads at each log step, or JSON."""

import json
import time

from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

# Of `logs`, what is no part of the loss.
_NO_PARTS = {
    "loss",
    "grad_norm",
    "learning_rate",
    "epoch",
    "images_seen",
    "images_per_second",
    "teacher_share",
    "data_wait_share",
    "cosine_sample",
    "cosine_dimension",
    "step",
}
PERCENT = "%"
# Of an evaluation, by name: what it is called, and how it is written.
_MEASURED = {
    "overlap10": ("neighbours shared with the teacher", PERCENT),
    "knn20": ("k-NN 20", PERCENT),
    "cosine": ("cosine to the teacher", "{:.3f}"),
    "effective_rank": ("effective rank", "{:.1f}"),
    "teacher_effective_rank": ("the teacher's", "{:.1f}"),
    "dead_dimensions": ("dead dimensions", "{:.0f}"),
    "accuracy": ("accuracy", PERCENT),
    "loss": ("loss", "{:.4g}"),
}
SEPARATOR = " · "


class ConsoleCallback(TrainerCallback):
    """Print each log entry of a training on the first process.

    Args:
        log_format: ``text``, or ``json`` for one JSON object a line.
        optimum: the smallest value that the loss can have; None where it is 0 or unknown.
        cosine_parts: parts of the loss that are minus a mean cosine similarity, which is printed instead.
    """

    def __init__(
        self,
        log_format: str = "text",
        optimum: float | None = None,
        cosine_parts: tuple[str, str] | None = None,
    ):
        self.log_format = log_format
        self.optimum = optimum
        self.cosine_parts = cosine_parts
        self._start = (0, 0.0)

    def on_train_begin(self, args, state, control, **kwargs):
        self._start = (state.global_step, time.perf_counter())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if self.log_format == "json":
            print(json.dumps({"step": state.global_step, **logs}, default=float), flush=True)
        elif "train_runtime" in logs:
            print(f"trained {state.global_step:,} steps in {clock(logs['train_runtime'])}", flush=True)
        elif "loss" in logs:
            print(self._training_line(state, logs), flush=True)
        elif _prefix(logs) is not None:
            print(evaluation_line(state.global_step, logs), flush=True)

    def _training_line(self, state, logs: dict) -> str:
        entries = [f"step {state.global_step:,}/{state.max_steps:,}"]
        if "images_seen" in logs:
            entries.append(f"{logs['images_seen']:,} images")
        entries.append(self._loss(logs))
        if "learning_rate" in logs:
            entries.append(f"lr {logs['learning_rate']:.3g}")
        if "images_per_second" in logs:
            entries.append(speed(logs))
        entries.append(f"{clock(self._seconds_left(state))} left")
        return SEPARATOR.join(entries)

    def _loss(self, logs: dict) -> str:
        parts = {name: value for name, value in logs.items() if name not in _NO_PARTS}
        if self.cosine_parts and all(name in parts for name in self.cosine_parts):
            cosines = {name.removeprefix("l_"): -parts.pop(name) for name in self.cosine_parts}
            parts = cosines | parts
        elif "cosine_sample" in logs:
            parts["cosine to the teacher"] = logs["cosine_sample"]
        shown = ", ".join(f"{name} {value:.3f}" for name, value in parts.items())
        text = f"loss {logs['loss']:.4g}"
        if self.optimum:
            text = f"loss {percent((logs['loss'] - self.optimum) / abs(self.optimum))} from the optimum"
        return f"{text} ({shown})" if shown else text

    def _seconds_left(self, state) -> float:
        step, at = self._start
        done = max(state.global_step - step, 1)
        return (time.perf_counter() - at) / done * (state.max_steps - state.global_step)


def print_lines(trainer: Trainer, log_format: str = "text", criterion: nn.Module | None = None) -> None:
    """Let a trainer print lines instead of dictionaries and a bar; in a notebook its table stays.

    Args:
        trainer: any.
        log_format: see ``ConsoleCallback``.
        criterion: the loss of a distillation, which may declare its ``optimum`` and ``cosine_parts``.
    """
    # By name, since importing it needs IPython.
    in_notebook = any(type(one).__name__ == "NotebookProgressCallback" for one in trainer.callback_handler.callbacks)
    for theirs in (ProgressCallback, PrinterCallback):
        trainer.pop_callback(theirs)
    if in_notebook and log_format == "text":
        return
    declared = {name: getattr(criterion, name, None) for name in ("optimum", "cosine_parts")}
    trainer.add_callback(ConsoleCallback(log_format, **declared))


def evaluation_line(step: int, logs: dict) -> str:
    """One line of what an evaluation measured, the most telling first."""
    prefix = _prefix(logs)
    images = (prefix or "eval").removeprefix("eval").removeprefix("_")  # of several sets, or of another name
    entries = [f"evaluation at step {step:,}" + (f", {images}" if images else "")]
    for name, (title, form) in _MEASURED.items():
        value = logs.get(f"{prefix}_{name}")
        if value is not None:
            entries.append(f"{title} {percent(value) if form == PERCENT else form.format(value)}")
    return SEPARATOR.join(entries)


def _prefix(logs: dict) -> str | None:
    """What stands before the names of what an evaluation measured, such as ``eval``; None without any."""
    found = [key.removesuffix(f"_{name}") for key in logs for name in _MEASURED if key.endswith(f"_{name}")]
    return min(found, key=len, default=None)


def speed(logs: dict) -> str:
    """Images per second, and what share of the time teacher and loader take."""
    text = f"{logs['images_per_second']:,.0f} img/s"
    if "teacher_share" in logs:
        text += f" (teacher {percent(logs['teacher_share'], 0)}, data wait {percent(logs['data_wait_share'], 0)})"
    return text


def percent(share: float, digits: int = 1) -> str:
    """A share as ``3.9 %``."""
    return f"{100 * share:.{digits}f} %"


def clock(seconds: float) -> str:
    """A duration as ``0:05`` or ``2:03:10``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
