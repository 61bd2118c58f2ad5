"""Weights & Biases: scalars in groups while a run trains, and its results, pictures and tables at the end."""

import http.client
import os
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from fnmatch import fnmatch
from pathlib import Path

from PIL.Image import Image
from transformers.integrations import WandbCallback

from coss_hf.hub.push import PUBLISHED, published_folders
from coss_hf.reporting.tracked import EndOfRun, grouped, settings_of, without_totals
from coss_hf.utils.messages import first_line, get_logger

logger = get_logger(__name__)

RUN_ID = "wandb_run_id"  # file in the output folder: a resumed run continues its run on W&B
INIT_SECONDS = 10
# For what is left to upload at a run's end; by default W&B waits for ever.
FINISH_SECONDS = 300


def reach(address: str) -> None:
    """Whether a W&B server answers, whatever it does; its own library would ask for longer before it gives up.

    Raises:
        OSError: nothing that answers within ``INIT_SECONDS``.
    """
    found: list[Exception] = [TimeoutError(f"no answer from {address} in {INIT_SECONDS} seconds")]

    def ask():
        question = urllib.request.Request(f"{address}/graphql", b'{"query": "{serverInfo {cliVersionInfo}}"}')
        question.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(question, timeout=INIT_SECONDS):
                found.clear()
        except urllib.error.URLError as error:
            # An answer, or certificates that the library may know more of.
            if isinstance(error, urllib.error.HTTPError) or isinstance(error.reason, ssl.SSLError):
                found.clear()
            elif not isinstance(error.reason, TimeoutError):
                found[:] = [error]
        except TimeoutError:
            pass  # as was assumed before asking
        except (OSError, http.client.HTTPException) as error:  # the latter from what is no web server
            found[:] = [OSError(first_line(error))]

    # Looking up a name heeds no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(INIT_SECONDS)
    if found:
        raise found[0]


class WandbTracker(WandbCallback):
    """As the callback of Transformers, over images seen, with names in groups and everything that a run was given.

    Where W&B cannot be reached within 10 seconds, or there is no key, a run is written to disk instead, for
    ``wandb sync``, after one warning; nobody is asked for a key, since nobody may be there. A server that is lost later
    is waited for at the end, for ``WANDB_FINISH_TIMEOUT`` or ``FINISH_SECONDS``. ``WANDB_LOG_MODEL`` keeps the student
    of the end, as the Hub would have it.

    Args:
        trainer: a ``DistillationTrainer``.

    Raises:
        ValueError: settings of W&B in the environment or its files that are not valid.
    """

    def __init__(self, trainer):
        super().__init__()
        self.trainer = trainer
        try:
            self._wandb.setup()
        except ValueError as error:
            raise ValueError(
                f"--report_to wandb: W&B's settings are not valid ({error}); correct its WANDB_... variables, or leave "
                f"it out."
            ) from error

    def setup(self, args, state, model, **kwargs):
        if not state.is_world_process_zero:
            self._initialized = True
            return
        if self._wandb.run is None:
            self._start(args, resumed=state.global_step > 0)
        super().setup(args, state, model, **kwargs)
        run = self._wandb.run
        run.define_metric("images_seen")
        run.define_metric("*", step_metric="images_seen", step_sync=True)
        run.config.update(settings_of(self.trainer), allow_val_change=True)

    def _start(self, args, resumed: bool) -> None:
        wandb = self._wandb
        start = time.monotonic()
        left = INIT_SECONDS
        known = wandb.setup().settings
        # W&B keeps the command line, which may hold a token.
        fixed = {"x_disable_meta": any("token" in word for word in sys.argv)}
        fixed["finish_timeout"] = known.finish_timeout or FINISH_SECONDS
        options = {"project": os.getenv("WANDB_PROJECT", "coss_hf"), "name": args.run_name}
        kept = Path(args.output_dir, RUN_ID)
        if resumed and kept.is_file() and "WANDB_RUN_ID" not in os.environ:
            options |= {"id": kept.read_text().strip(), "resume": "allow"}
        try:
            if known.mode not in ("offline", "dryrun", "disabled"):
                reach(known.base_url)
                # Starting a run would ask a terminal for a key, for ever, and the server one question after another,
                # each for seconds; this asks it once, for 10 seconds (or WANDB_HTTP_TIMEOUT).
                if not wandb.login(prompt=False, verify=True):
                    raise wandb.errors.UsageError("there is no key")
                left = max(1.0, INIT_SECONDS - (time.monotonic() - start))
            wandb.init(**options, settings=wandb.Settings(init_timeout=left, **fixed))
        except (wandb.Error, OSError) as error:
            run = wandb.init(**options, settings=wandb.Settings(**fixed), mode="offline")
            logger.warning(
                "W&B cannot be used (%s; is its server up, the key right?): this run is kept on disk. To upload it "
                "later: `wandb login`, then `wandb sync %s`. WANDB_MODE=offline starts like this at once, --report_to "
                "none without W&B.",
                first_line(error),
                os.path.dirname(run.dir),
            )
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(wandb.run.id)

    def on_train_end(self, *args, **kwargs):
        """``Trainer`` itself would keep the wrapper, and its arguments with their token; see ``report``."""

    def on_save(self, *args, **kwargs):
        """Checkpoints stay at home, as with the Hub."""

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if not self._initialized:
            self.setup(args, state, model)
        if state.is_world_process_zero:
            scalars, totals = without_totals(logs)
            self._wandb.run.summary.update(totals)
            self._wandb.log(grouped(scalars) | {"train/global_step": state.global_step})

    def report(self, end: EndOfRun) -> None:
        """The end of a run, which it finishes."""
        if not self._initialized:  # a finished run was resumed: its report is all that is left to keep
            self.setup(self.trainer.args, self.trainer.state, self.trainer.model)
        wandb = self._wandb
        run = self._wandb.run
        logs = {"images_seen": end.images_seen}
        logs |= {name: wandb.Image(str(path)) for name, path in end.pictures.items()}
        logs |= {name: wandb.Html(str(path)) for name, path in end.pages.items()}
        for name, table in end.tables.items():
            rows = [[wandb.Image(cell) if isinstance(cell, Image) else cell for cell in row] for row in table.rows]
            logs[name] = wandb.Table(columns=table.columns, data=rows)
        run.log(logs)
        run.summary.update(end.results)
        if self._log_model.is_enabled:
            student = wandb.Artifact(f"model-{run.id}", type="model", metadata={"images_seen": end.images_seen})
            folder = Path(self.trainer.args.output_dir)
            for path in folder.iterdir():
                if any(fnmatch(path.name, pattern) for pattern in (*PUBLISHED, "*.py")):
                    student.add_file(str(path))
            for name in published_folders(folder):
                student.add_dir(str(folder / name), name=name)
            run.log_artifact(student, aliases=["final_model"])
        self.end()

    def end(self) -> None:
        """Finish the run of W&B, without a report where there was none; another one may follow in this process."""
        if self._initialized and self._wandb.run is not None:
            self._wandb.run.finish()
        self._initialized = False  # what comes later belongs to this run, too
