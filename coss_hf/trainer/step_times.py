"""How long a training waits for its data and for its teacher, measured without making the device wait."""

import contextlib
import time

import torch


class StepTimes:
    """Seconds of the teacher's forward passes and of waiting for batches, since they were last read.

    Args:
        device: on a GPU the teacher is timed by events in its stream, which are read together.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self.reset()

    def reset(self) -> None:
        """Start both sums anew."""
        self._teacher = 0.0
        self._waited = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def teacher(self):
        """Around a forward pass of the teacher."""
        if self._on_gpu:
            events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)
        else:
            start = time.perf_counter()
            yield
            self._teacher += time.perf_counter() - start

    @contextlib.contextmanager
    def waiting(self):
        """Around the request for a batch."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def shares(self, seconds: float) -> dict[str, float]:
        """Return both sums as shares of ``seconds``, the time since they were last read, and start anew."""
        if self._events:
            self._events[-1][1].synchronize()
            self._teacher = sum(start.elapsed_time(end) for start, end in self._events) / 1000
        shares = {"teacher_share": self._teacher / seconds, "data_wait_share": self._waited / seconds}
        self.reset()
        return {name: round(min(share, 1.0), 3) for name, share in shares.items()}
