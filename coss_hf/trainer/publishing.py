"""What a training pushes to the Hub, and when."""

from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from coss_hf.hub.push import check_repo, push
from coss_hf.utils.messages import first_line, get_logger

logger = get_logger(__name__)


class HubPublisher:
    """Push a training's student: ``--push_to_hub`` as in ``transformers.Trainer``, but never the training state.

    Without network a run starts, trains and saves; only the push fails. ``--hub_strategy end`` (the default here)
    pushes once; ``every_save`` also pushes the student of each checkpoint, in the background. Used on the first process
    alone.

    Args:
        args: arguments of the training.
    """

    def __init__(self, args: TrainingArguments):
        self.args = args
        self._api = HfApi()  # one for all pushes in the background, which it does one after another
        self._running: dict[Future, str] = {}

    def open_repo(self, token: str | None = None, private: bool | None = None) -> str:
        """Create the repository, where it is not there, and return its full name.

        Raises:
            ValueError: no valid name, no or a wrong token, a repository of somebody else.
        """
        args = self.args
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        return check_repo(
            name,
            "--hub_model_id",
            token=token or args.hub_token,
            private=args.hub_private_repo if private is None else private,
            create=not args.dry_run,
        )

    def wants_checkpoints(self) -> bool:
        """Whether to push a checkpoint that is written now: not during another push, but with ``--hub_always_push``."""
        busy = self.pushed_folders() and not self.args.hub_always_push
        return self.args.hub_strategy != HubStrategy.END and not busy

    def pushed_folders(self) -> set[str]:
        """The checkpoints whose push in the background is not done, and which must stay."""
        return {folder for job, folder in self._running.items() if not job.done()}

    def push_checkpoint(self, folder: str, repo_id: str, images_seen: int) -> None:
        """Push the student of a checkpoint in the background; a push that fails is a warning.

        A push that has not begun is given up for a newer one: else each checkpoint that waits for a slow network stays
        on the disk. The last one is never given up.

        Args:
            folder: the checkpoint.
            repo_id: full name of the repository.
            images_seen: number of images seen so far, for the message of the commit.
        """
        for waiting in self._running:
            waiting.cancel()  # not one that has begun
        self._running = {job: waiting for job, waiting in self._running.items() if not job.cancelled()}
        job = self._api.run_as_future(
            push,
            folder,
            repo_id,
            token=self.args.hub_token,
            private=self.args.hub_private_repo,
            revision=self.args.hub_revision,
            commit_message=f"Training in progress, {images_seen:,} images seen",
        )
        self._running[job] = str(Path(folder))
        job.add_done_callback(_warn_of_failure)

    def wait(self) -> None:
        """Wait for all pushes in the background; of a failure there was a warning."""
        for job in self._running:
            job.exception()
        self._running.clear()

    def push_output_dir(
        self,
        repo_id: str,
        commit_message: str,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> CommitInfo:
        """Push what is in the output folder, and wait for the end of the upload.

        Args:
            repo_id: full name of the repository.
            commit_message: message of the commit.
            token: default: ``--hub_token``, or that of ``hf auth login``.
            revision: a branch; default: ``--hub_revision``, or main.
            private: whether a new repository is private; default: ``--hub_private_repo``.

        Raises:
            PushFailed: the student is on disk; the message says how to push it.
        """
        self.wait()
        args = self.args
        return push(
            args.output_dir,
            repo_id,
            token=token or args.hub_token,
            private=args.hub_private_repo if private is None else private,
            revision=revision or args.hub_revision,
            commit_message=commit_message,
        )


def _warn_of_failure(job: Future) -> None:
    if not job.cancelled() and job.exception() is not None:
        logger.warning("Training continues. %s", first_line(job.exception()))
