"""What a run does on SIGTERM."""

import os
import signal
import threading
from collections.abc import Callable
from functools import lru_cache

from transformers import TrainerCallback

from coss_hf.utils.distributed import any_process


@lru_cache
def _block_in_children(preemption: type) -> None:
    def mask(how: int) -> Callable:
        return lambda: preemption._watching and signal.pthread_sigmask(how, {signal.SIGTERM})

    def child() -> None:
        if preemption._watching:
            threading.Thread(target=_end_when_the_parent_asks, daemon=True).start()

    os.register_at_fork(before=mask(signal.SIG_BLOCK), after_in_parent=mask(signal.SIG_UNBLOCK), after_in_child=child)


def _end_when_the_parent_asks() -> None:
    """SIGTERM from the process that made this one ends it, as ever; from anybody else it does nothing."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(128 + signal.SIGTERM)


class Preemption(TrainerCallback):
    """On SIGTERM, a checkpoint at the end of the step at which all processes know of it, and then the end.

    A context manager: the signal is watched inside. The processes talk at each step, over gloo: a GPU need not wait.
    Schedulers send the signal to a run's loader workers as well, which die of it in torch's own handler, and the step
    with them: they are born with the signal blocked, and listen to their parent alone. A launcher that was killed is a
    signal, too: it cannot stop the processes that it started, and nobody else would.

    Attributes:
        agreed: whether training ended because of the signal.
    """

    _watching = False

    def __init__(self):
        self.received = False
        self.agreed = False
        self._before = None
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        # Cannot be taken back, so that it is made once and looks whether anything is watched.
        _block_in_children(Preemption)

    def __enter__(self):
        self.received = self.agreed = False
        Preemption._watching = True
        if threading.current_thread() is threading.main_thread():  # Python handles signals in no other
            self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *error):
        Preemption._watching = False
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _receive(self, *_):
        self.received = True

    def on_step_end(self, args, state, control, **kwargs):
        orphaned = self._launcher is not None and os.getppid() != self._launcher
        self.agreed = any_process(self.received or orphaned)
        if self.agreed:
            control.should_save, control.should_evaluate = True, False

    def on_save(self, args, state, control, **kwargs):
        # Not earlier: what is saved would stop a run that restores its callbacks.
        control.should_training_stop |= self.agreed

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.agreed:  # Trainer ends the epoch on its way out
            control.should_save = control.should_evaluate = False
