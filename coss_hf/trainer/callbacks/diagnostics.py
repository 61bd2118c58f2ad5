"""Alarms while a run trains."""

from transformers import TrainerCallback

from coss_hf.evaluation.diagnostics import alarms, has_diagnostics, is_gentle
from coss_hf.utils.messages import get_logger

logger = get_logger(__name__)


class DiagnosticsCallback(TrainerCallback):
    """Raises each alarm once, and looks once more when training ends.

    Args:
        images: number of images that are evaluated.
        last_step: whether to evaluate at the last step, too.
    """

    def __init__(self, images: int, last_step: bool):
        self.images = images
        self.last_step = last_step
        self._raised: set[str] | None = None  # not looked up yet

    def on_train_begin(self, args, state, control, **kwargs):
        self._raised = None

    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate |= self.last_step and state.global_step >= state.max_steps

    def on_evaluate(self, args, state, control, **kwargs):
        finished = state.global_step >= state.max_steps
        # Of the history, which checkpoints hold: a resumed run does not raise an alarm again.
        if self._raised is None:
            earlier = [i for i, entry in enumerate(state.log_history) if has_diagnostics(entry)]
            self._raised = {name for i in earlier for name in alarms(state.log_history[:i], self.images)}
        found = alarms(state.log_history, self.images, finished=finished, gentle=is_gentle(args))
        for name, text in found.items():
            if name not in self._raised and state.is_world_process_zero:
                logger.warning("ALARM: %s", text)
        self._raised |= found.keys()  # an alarm that comes and goes is printed once, too
