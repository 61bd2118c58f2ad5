"""What a dataset of views is told while a run trains."""

import math

from transformers import TrainerCallback

from coss_hf.utils.messages import first_names, get_logger
from coss_hf.utils.process_group import Processes

logger = get_logger(__name__)


class EpochCallback(TrainerCallback):
    """What a dataset of views needs of a training.

    It is told the epoch: accelerate's own call reaches it at one process only, and not after a resume. Epochs are
    counted as ``Trainer`` counts them for the order of the images, also where a callback ends one early. It keeps its
    images, if it can, where they are seen more than once. It is told at the end which images other processes had to
    replace. Persistent loader workers end where the training ends well: the garbage collector may take their queues
    before they are told, and torch then waits 5 seconds for each.
    """

    def __init__(self, dataset):
        self.dataset = dataset
        self._epoch = 0

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        # Not `state.epoch`, which stays behind where an earlier epoch was ended by a callback.
        steps = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        self._epoch = state.global_step // max(steps, 1)
        if state.num_train_epochs > 1:
            self.dataset.keep_images()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(self._epoch)
        self._epoch += 1

    def on_train_end(self, args, state, control, train_dataloader=None, **kwargs):
        end_workers(train_dataloader)
        reader = self.dataset.reader
        for rows in Processes().gather(reader.replaced()):
            reader.add_replaced(rows)
        if reader.replaced() and args.process_index == 0:
            names = reader.replaced_names()
            logger.warning("--on_bad_image skip: %d images were replaced: %s.", len(names), first_names(names))


class StreamCallback(TrainerCallback):
    """What a stream of views needs of a training, which is one long epoch for `Trainer`."""

    def __init__(self, dataset):
        self.dataset = dataset

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = state.global_step / state.max_steps  # `Trainer` counts from 0 in a resumed run

    def on_train_end(self, args, state, control, train_dataloader=None, **kwargs):
        end_workers(train_dataloader)
        names = [name for names in Processes().gather(self.dataset.left_out) for name in names]
        self.dataset.left_out = list(dict.fromkeys(names))
        if names and args.process_index == 0:
            count = len(self.dataset.left_out)
            logger.warning("--on_bad_image skip: %d images were left out: %s.", count, first_names(names))


def end_workers(train_dataloader) -> None:
    """End persistent workers of a loader."""
    loader = getattr(train_dataloader, "base_dataloader", train_dataloader)
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None:
        loader._iterator = None
        iterator._shutdown_workers()
