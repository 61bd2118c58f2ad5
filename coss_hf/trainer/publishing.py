"""The trainer's part in pushing to the Hub, and in what W&B is told at the end."""

import logging
from pathlib import Path

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy

from coss_hf.hub.model_card import write_card
from coss_hf.hub.push import check_repo, push
from coss_hf.reporting.wandb_tracker import WandbTracker
from coss_hf.trainer.checkpointing import SavingTrainer
from coss_hf.utils.messages import first_line

logger = logging.getLogger(__name__)


class PublishingTrainer(SavingTrainer):
    """``--push_to_hub`` and its like as in ``transformers.Trainer``, but without the training state and its arguments.

    Without network a run starts, trains and saves; only the push fails. ``--hub_strategy end`` (the default here)
    pushes once; ``every_save`` also pushes the student of each checkpoint, in the background.
    """

    _push = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Creates the repository.

        Raises:
            ValueError: no valid name, no or a wrong token, a repository of somebody else.
        """
        if not self.is_world_process_zero():
            return
        args = self.args
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        token, private = token or args.hub_token, args.hub_private_repo if private is None else private
        argument = "--hub_model_id" if args.hub_model_id else "--output_dir, without --hub_model_id,"
        self.hub_model_id = check_repo(name, argument, token=token, private=private, create=not args.dry_run)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """The student of a checkpoint, beside training; one that is not through yet is not waited for."""
        args = self.args
        busy = self._push is not None and not self._push.done() and not args.hub_always_push
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END or busy:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        self._push = HfApi().run_as_future(
            push,
            checkpoint_folder,
            self.hub_model_id,
            token=args.hub_token,
            private=args.hub_private_repo,
            revision=args.hub_revision,
            message=f"Training in progress, {self.images_seen:,} images seen",
        )
        self._push.add_done_callback(_warn)

    def _finish_current_push(self) -> None:
        if self._push is not None:
            self._push.exception()  # waits; it was warned of

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """As stock, all processes together: saves the student, writes its card (``kwargs``) and pushes.

        It always waits for the end of the upload. Returns the commit, on the first process.

        Raises:
            PushFailed: the student is on disk; the message says how to push it.
        """
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.create_model_card(**kwargs)
        return self.publish(commit_message, token, revision, private)

    def publish(
        self,
        commit_message: str | None = None,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ):
        """Pushes what is in the output folder; on the first process alone. See ``push_to_hub``."""
        args = self.args
        self._finish_current_push()
        self.callback_handler.on_push_begin(args, self.state, self.control)
        return push(
            args.output_dir,
            self.hub_model_id,
            token=token or args.hub_token,
            private=args.hub_private_repo if private is None else private,
            revision=revision or args.hub_revision,
            message=commit_message or f"Student, {self.images_seen:,} images seen",
        )

    def create_model_card(self, model_name: str | None = None, record: dict | None = None, **metadata) -> None:
        """Writes ``README.md`` beside the student.

        Args:
            model_name: title; default: the repository's or the folder's name.
            record: what ``run.json`` holds.
            metadata: ``license``, ``language`` and ``tags`` of the student.
        """
        if self.is_world_process_zero():
            write_card(self, model_name, record or {}, metadata)

    def finish(self, record: dict, neighbors=None, projection=None) -> None:
        """Pushes the student with ``--push_to_hub``, and then tells W&B, which may keep a run waiting; see ``track``.

        Raises:
            PushFailed: as ``publish``.
        """
        try:
            if self.args.push_to_hub:
                self.publish()
        finally:
            self.track(record, neighbors, projection)

    def track(self, record: dict, neighbors=None, projection=None) -> None:
        """Hands the end of a run to W&B, if it reports there; see ``WandbTracker.report``."""
        if not self.is_world_process_zero():
            return
        names = ("report.html", "loss.png", "panel.png", "neighbors.png", "projection.png")
        paths = [path for name in names if (path := Path(self.args.output_dir, name)).is_file()]
        files = {path.stem if path.suffix == ".html" else f"pictures/{path.stem}": path for path in paths}
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, WandbTracker):
                callback.report(record, files, neighbors, projection)


def _warn(job) -> None:
    if job.exception() is not None:
        logger.warning("Training goes on. %s", first_line(job.exception()))
