"""TensorBoard: scalars as Transformers writes them, and the pictures of the end of a run."""

import numpy as np
from PIL import Image
from transformers.integrations import TensorBoardCallback

from coss_hf.reporting.tracked import EndOfRun


class TensorBoardTracker(TensorBoardCallback):
    """As the callback of Transformers; the run's results and pictures follow at its end.

    Args:
        trainer: a ``DistillationTrainer``.
    """

    def __init__(self, trainer):
        super().__init__()
        self.trainer = trainer

    def on_train_end(self, *args, **kwargs):
        """The file stays open until the report, see ``report``."""
        if self.tb_writer is not None:
            self.tb_writer.flush()

    def report(self, end: EndOfRun) -> None:
        """The end of a run, which closes the file."""
        trainer = self.trainer
        if self.tb_writer is None:  # a finished run was resumed
            self.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
        step = trainer.state.global_step
        for name, value in end.results.items():
            if isinstance(value, (int, float)):
                self.tb_writer.add_scalar(name, value, step)
        for name, path in end.pictures.items():
            with Image.open(path) as picture:
                self.tb_writer.add_image(name, np.array(picture.convert("RGB")), step, dataformats="HWC")
        self.end()

    def end(self) -> None:
        """Close the file, without a report where there was none."""
        if self.tb_writer is not None:
            self.tb_writer.close()
        self.tb_writer = None
