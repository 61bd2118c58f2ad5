"""What a dataset of views is told while a run trains."""

from transformers import TrainerCallback


class EpochCallback(TrainerCallback):
    """What a dataset of views needs of a training.

    It is told the epoch: accelerate's own call reaches it at one process only, and not after a resume. It keeps its
    images, if it can, where they are seen more than once. Persistent loader workers end where the training ends well:
    the garbage collector may take their queues before they are told, and torch then waits 5 seconds for each.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def on_train_begin(self, args, state, control, **kwargs):
        if state.num_train_epochs > 1:
            self.dataset.keep_images()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch or 0))

    def on_train_end(self, args, state, control, train_dataloader=None, **kwargs):
        loader = getattr(train_dataloader, "base_dataloader", train_dataloader)
        iterator = getattr(loader, "_iterator", None)
        if iterator is not None:
            loader._iterator = None
            iterator._shutdown_workers()
