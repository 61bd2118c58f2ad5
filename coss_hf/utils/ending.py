"""The end of a process from outside, by SIGTERM or Ctrl-C: with a word, and also where the process hangs."""

import multiprocessing.queues
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import lru_cache

NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
GRACE = 15  # seconds to end in, once the main thread was told
# A second signal within so many seconds is the first one again: schedulers send theirs to a launcher and to its
# processes, and the launcher passes it on.
SAME_SIGNAL = 1.0
SAME_SIGNAL_FROM_LAUNCHER = 4.0
AGAIN = 0  # to the thread that reads signals: send the main thread the first one again


class Ending:
    """Follow SIGTERM and Ctrl-C for this process: there is one, ``ENDING``.

    The first signal ends the process, with one line instead of a traceback and exit code 143 or 130, or is kept for
    whoever has set ``deferred``. A second signal, or the end of a time of grace, ends the process whatever it does:
    Python calls handlers of signals in its main thread alone, which may wait for ever, so that a thread of this class
    reads them as well.

    Processes forked meanwhile have both signals blocked. Schedulers and terminals send them to a run's loader workers,
    too, which would die of them, and the step with them; they listen to SIGTERM from their parent alone.

    Attributes:
        received: number of the signal that came; None without one.
        deferred: whether the first signal only sets ``received``.
        grace: function that returns the seconds from the first signal to the end.
        remedy: sentence that tells what is on disk and what to do next.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self.deferred = False
        self.grace: Callable[[], float] = lambda: GRACE
        self.remedy = "Give the same command again."
        self._installed = False
        self._handlers: dict = {}
        self._hook: Callable = sys.excepthook
        self._hook_of_ignored: Callable = sys.unraisablehook
        self._left = False
        self._said = False
        self._came: float | None = None  # when the first signal did
        self._deadline: float | None = None
        self._wakeup = -1
        self._pipe: tuple[int, int] | None = None

    @property
    def installed(self) -> bool:
        """Whether signals are followed."""
        return self._installed

    def install(self) -> None:
        """Follow the signals from now on; in the main thread, else Python allows nothing of it."""
        if self._installed or threading.current_thread() is not threading.main_thread():
            return
        self._installed = True
        self.reset()
        _prepare_children(self)
        if self._pipe is None:
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            threading.Thread(target=self._watch, name="signals", daemon=True).start()
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, self._handle) for number in NAMES}
        self._hook = sys.excepthook
        sys.excepthook = self._report
        self._hook_of_ignored = sys.unraisablehook
        sys.unraisablehook = self._ignored

    def uninstall(self) -> None:
        """Put back the handlers that were there before."""
        if not self._installed:
            return
        self._installed = False
        self._deadline = None
        sys.excepthook = self._hook
        sys.unraisablehook = self._hook_of_ignored
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)

    def reset(self) -> None:
        """Drop a signal that came before."""
        self.received = None
        self._left = False
        self._said = False
        self._came = None
        self._deadline = None

    def calm(self) -> None:
        """Take back the end after a time of grace: the process is on its way. A second signal still ends it."""
        self._deadline = None

    def heed(self) -> None:
        """End the process now if a signal came while it was deferred."""
        if self._installed and self.received is not None:
            self._leave()

    def _handle(self, number: int, frame) -> None:
        """In the main thread, as soon as Python gets there."""
        if not self._installed:
            return
        self.received = self.received or signal.Signals(number)
        if not self.deferred:
            self._leave()

    def _leave(self) -> None:
        if not self._left:  # a second one would interrupt the first one's way out
            self._left = True
            self._say_end()
            raise SystemExit(128 + self.received)

    def _ignored(self, unraisable) -> None:
        """Python drops what is raised in ``__del__``, in callbacks of weak references and in those of its imports. A
        signal that came there would do nothing: it is sent again, in a moment in which the callback has returned."""
        if self.received is None or self.deferred or not isinstance(unraisable.exc_value, SystemExit):
            self._hook_of_ignored(unraisable)
            return
        self._left = False
        os.write(self._pipe[1], bytes([AGAIN]))

    def _report(self, kind, error, trace) -> None:
        """Instead of a traceback the end: a process that left first breaks what the others wait for, and their main
        thread may see that error before the signal."""
        if self.received is None or self.deferred:
            self._hook(kind, error, trace)
            return
        self._say_end()
        os._exit(128 + self.received)

    def _watch(self) -> None:
        """In a thread of its own, which a main thread that hangs cannot stop."""
        while True:
            ready, _, _ = select.select([self._pipe[0]], [], [], None if self._deadline is None else 0.2)
            numbers = os.read(self._pipe[0], 64) if ready else b""
            if not self._installed:
                continue
            if AGAIN in numbers:
                time.sleep(0.01)
                signal.pthread_kill(threading.main_thread().ident, self.received)
            numbers = [number for number in numbers if number in NAMES]
            for number in numbers:
                if self._came is None:
                    self._start_grace(signal.Signals(number))
                elif time.monotonic() - self._came > _same_signal_seconds():
                    self._end("a second signal")
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                self._end(f"no end after {time.monotonic() - self._came:.0f} seconds")

    def _start_grace(self, number: signal.Signals) -> None:
        self.received = self.received or number
        self._came = time.monotonic()
        self._deadline = self._came + self.grace()
        if self.deferred:
            self._say(f"{NAMES[number]}: after this step the run is saved and ends; a second signal ends it now.")

    def _end(self, reason: str) -> None:
        self._say(f"{NAMES[self.received]}: ended at once ({reason}). {self.remedy}")
        for child in multiprocessing.active_children():
            child.terminate()
        os._exit(128 + self.received)

    def _say_end(self) -> None:
        if not self._said:
            self._said = True
            self._say(f"{NAMES[self.received]}: ended. {self.remedy}")

    @staticmethod
    def _say(text: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            os.write(2, f"{text}\n".encode())  # print() may be what was interrupted


def _same_signal_seconds() -> float:
    return SAME_SIGNAL_FROM_LAUNCHER if "TORCHELASTIC_RUN_ID" in os.environ else SAME_SIGNAL


@lru_cache
def _prepare_children(ending: Ending) -> None:
    """Cannot be taken back, so that it is done once and looks whether signals are followed."""

    def mask(how: int) -> Callable:
        return lambda: ending.installed and signal.pthread_sigmask(how, set(NAMES))

    def child() -> None:
        if not ending.installed:
            return
        ending._installed = False
        signal.set_wakeup_fd(-1)
        # A loader worker that cannot hand over a batch, for want of shared memory, would only print it: its parent
        # would wait for the batch for ever.
        multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_of_worker)
        threading.Thread(target=_end_when_the_parent_asks, daemon=True).start()

    os.register_at_fork(before=mask(signal.SIG_BLOCK), after_in_parent=mask(signal.SIG_UNBLOCK), after_in_child=child)


def _end_when_the_parent_asks() -> None:
    """SIGTERM from the process that made this one ends it, as ever; from anybody else it does nothing."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(128 + signal.SIGTERM)


def _end_of_worker(error: Exception, batch) -> None:
    os.write(2, f"A loader worker could not hand over its images: {error}\n".encode())
    os._exit(1)


ENDING = Ending()
