"""What a training does on SIGTERM and Ctrl-C."""

import os
import signal
import threading
import time

from transformers import TrainerCallback

from coss_hf.utils.distributed import any_process
from coss_hf.utils.ending import ENDING, NAMES
from coss_hf.utils.messages import for_reader

TORCH_HANDLER = "torch.utils.data._utils.signal_handling"
PATIENCE = 30  # seconds for a step to end, at least
PATIENCE_TO_SAVE = 600  # seconds for an evaluation or a checkpoint between two steps to end
TIMES_A_STEP = 3  # a step that takes so many times as long as the longest before it hangs


class Preemption(TrainerCallback):
    """On SIGTERM or Ctrl-C, a checkpoint at the end of the step at which all processes know of it, and then the end.

    A context manager: signals are deferred to the end of the step inside. The processes talk at each step, over gloo: a
    GPU need not wait. A step that hangs is not waited for: see ``Ending``. A launcher that was killed is a signal, too:
    it cannot stop the processes that it started, and nobody else would.

    Attributes:
        agreed: whether training ended because of the signal.
    """

    def __init__(self):
        self.agreed = False
        # The latter of `accelerate launch` with one process, which it does not pass signals on to.
        launched = any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"))
        self._launcher = os.getppid() if launched else None
        self._before: dict = {}
        self._installed_here = False
        self._step_ended = 0.0
        self._longest_step = 0.0
        self._child_handler = None
        self._between_steps = False

    def __enter__(self):
        self.agreed = False
        self._between_steps = True  # an evaluation may come before the first step
        self._step_ended = time.monotonic()
        self._installed_here = not ENDING.installed
        ENDING.install()
        ENDING.reset()
        self._before = {name: getattr(ENDING, name) for name in ("deferred", "grace", "remedy")}
        ENDING.deferred = True
        ENDING.grace = self._grace
        ENDING.remedy = for_reader("Resume from the last checkpoint with --resume_from_checkpoint.")
        return self

    def __exit__(self, *error):
        ENDING.calm()  # a signal that came behind the last step does not cost the student's last save
        for name, value in self._before.items():
            setattr(ENDING, name, value)
        self._before = {}
        self._let_torch_report_lost_workers()
        if self._installed_here:
            ENDING.uninstall()

    def _grace(self) -> float:
        """Seconds from a signal to the end: a step is short, a checkpoint or an evaluation may take minutes."""
        return PATIENCE_TO_SAVE if self._between_steps else max(PATIENCE, TIMES_A_STEP * self._longest_step)

    @property
    def orphaned(self) -> bool:
        """Whether the launcher of this process is gone."""
        return self._launcher is not None and os.getppid() != self._launcher

    @property
    def reason(self) -> str:
        """What ended the training, in words."""
        if ENDING.received is None and self.orphaned:
            return "The launcher was killed"
        return NAMES[ENDING.received or signal.SIGTERM]

    def leave(self, step: int, process_index: int) -> None:
        """End the process where a signal has ended the training.

        Args:
            step: number of optimizer steps, which are saved.
            process_index: rank of this process; the first one has a word.

        Raises:
            SystemExit: code 143 after SIGTERM, 130 after Ctrl-C.
        """
        if not self.agreed:
            return
        if process_index == 0:
            print(for_reader(f"{self.reason}: step {step} is saved; resume with --resume_from_checkpoint."), flush=True)
        raise SystemExit(128 + (ENDING.received or signal.SIGTERM))

    def on_step_begin(self, args, state, control, **kwargs):
        self._between_steps = False
        # Torch's handler raises an error for a loader worker that was killed wherever the main thread is, in the middle
        # of a step that could not be saved then. The loader finds out by itself, between steps.
        is_torch = getattr(signal.getsignal(signal.SIGCHLD), "__module__", None) == TORCH_HANDLER
        if is_torch and threading.current_thread() is threading.main_thread():
            self._child_handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _let_torch_report_lost_workers(self) -> None:
        if self._child_handler is not None:
            signal.signal(signal.SIGCHLD, self._child_handler)
            self._child_handler = None

    def on_step_end(self, args, state, control, **kwargs):
        now = time.monotonic()
        self._longest_step = max(self._longest_step, now - self._step_ended)
        self._step_ended = now
        self._agree(control)
        if self.agreed:
            control.should_evaluate = False
        self._between_steps = control.should_save or control.should_evaluate

    def on_evaluate(self, args, state, control, **kwargs):
        # The step before it is not saved yet. An evaluation may also be asked for outside of a training.
        if self._before and state.global_step > 0 and not self.agreed:
            self._agree(control)

    def _agree(self, control) -> None:
        self.agreed = any_process(ENDING.received is not None or self.orphaned)
        if self.agreed:
            ENDING.calm()
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        # Not earlier: what is saved would stop a run that restores its callbacks.
        control.should_training_stop |= self.agreed

    def on_epoch_end(self, args, state, control, **kwargs):
        self._between_steps = control.should_save or control.should_evaluate
        if self.agreed:  # Trainer ends the epoch on its way out
            control.should_save = control.should_evaluate = False
