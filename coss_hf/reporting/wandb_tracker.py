"""Weights & Biases: grouped scalars while training, and the report at its end."""

import http.client
import logging
import os
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from fnmatch import fnmatch
from pathlib import Path

from transformers.integrations import WandbCallback

from coss_hf.hub.push import PUBLISHED
from coss_hf.utils.messages import first_line

logger = logging.getLogger(__name__)

RUN_ID = "wandb_run_id"  # file in the output folder: a resumed run continues its run on W&B
PICTURES = ("loss.png", "panel.png", "neighbors.png", "projection.png")
INIT_SECONDS = 10
# For what is left to upload at a run's end; by default W&B waits for ever.
FINISH_SECONDS = 300
GROUPS = {
    "agreement": ("overlap10", "cosine", "dimension_cosine", "cka"),
    "student": ("effective_rank", "dead_dimensions", "duplicates"),
    "teacher": ("teacher_effective_rank", "teacher_duplicates"),
    "labels": ("knn10", "knn20", "probe"),
    "speed": (
        "images_per_second",
        "teacher_share",
        "data_wait_share",
        "runtime",
        "samples_per_second",
        "steps_per_second",
    ),
}
GROUP = {name: group for group, names in GROUPS.items() for name in names}


def grouped(logs: dict[str, float]) -> dict[str, float]:
    """Names of a log line as ``group/name``; what was computed on held-out images and is of no group is ``eval``."""
    found = {}
    for key, value in logs.items():
        name = key.removeprefix("eval_")
        if key == "images_seen":
            found[key] = value
        else:
            group = GROUP.get(name, "eval" if name != key else "train")
            found[f"{group}/{name.removeprefix('teacher_') if group == 'teacher' else name}"] = value
    return found


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
        run, trainer = self._wandb.run, self.trainer
        run.define_metric("images_seen")
        run.define_metric("*", step_metric="images_seen", step_sync=True)
        sizes = {"teacher": trainer.teacher.num_parameters(), "student": trainer.student.num_parameters()}
        identity = {name.lstrip("-"): value for name, value in trainer.identity().items()}
        settings = {"fingerprints": identity, "parameters": sizes, "arguments": trainer.arguments}
        run.config.update(settings, allow_val_change=True)

    def _start(self, args, resumed: bool) -> None:
        wandb, start, left = self._wandb, time.monotonic(), INIT_SECONDS
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
        """Stock training would keep the wrapper, and its arguments with their token; see ``report``."""

    def on_save(self, *args, **kwargs):
        """Checkpoints stay at home, as with the Hub."""

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if not self._initialized:
            self.setup(args, state, model)
        if state.is_world_process_zero:
            totals = {name: value for name, value in logs.items() if name.startswith("train_")}
            self._wandb.run.summary.update(totals)
            scalars = {name: value for name, value in logs.items() if name not in totals}
            self._wandb.log(grouped(scalars) | {"train/global_step": state.global_step})

    def report(self, record: dict, files: dict, neighbors=None, projection=None) -> None:
        """The end of a run, which it finishes.

        Args:
            record: what ``run.json`` holds.
            files: of pictures (``.png``) and pages (``.html``), by name.
            neighbors: a ``NeighborExamples``.
            projection: ``teacher`` and ``student`` coordinates ``(n, 2)``, and ``labels`` or None.
        """
        if not self._initialized:  # a finished run was gone on from: its report is all that is left to keep
            self.setup(self.trainer.args, self.trainer.state, self.trainer.model)
        wandb, run = self._wandb, self._wandb.run
        logs = {"images_seen": self.trainer.images_seen}
        logs |= {
            name: (wandb.Html if str(path).endswith(".html") else wandb.Image)(str(path))
            for name, path in files.items()
        }
        if neighbors is not None:
            logs["neighbors"] = self._neighbor_table(neighbors)
        if projection is not None:
            labels = projection["labels"]
            columns = [*projection["teacher"].T.tolist(), *projection["student"].T.tolist()]
            columns.append([""] * len(columns[0]) if labels is None else [str(label) for label in labels])
            names = ["teacher_x", "teacher_y", "student_x", "student_y", "label"]
            logs["projection"] = wandb.Table(columns=names, data=[list(row) for row in zip(*columns, strict=True)])
        run.log(logs)
        for network, row in record["results"].items():
            run.summary.update({f"final/{network}/{name}": value for name, value in row.items()})
        if self._log_model.is_enabled:
            student = wandb.Artifact(f"model-{run.id}", type="model", metadata={"images_seen": logs["images_seen"]})
            for path in Path(self.trainer.args.output_dir).iterdir():
                if any(fnmatch(path.name, pattern) for pattern in (*PUBLISHED, "*.py")):
                    student.add_file(str(path))
            run.log_artifact(student, aliases=["final_model"])
        run.finish()

    def _neighbor_table(self, examples):
        shown = {row: self._wandb.Image(image) for row, image in examples.images.items()}
        count = len(examples.teacher[0])
        names = [f"{network} {i}" for network in ("teacher", "student") for i in range(1, count + 1)]
        table = self._wandb.Table(columns=["query", "shared", *names])
        for query, teacher, student in zip(examples.queries, examples.teacher, examples.student, strict=True):
            both = len({*teacher.tolist()} & {*student.tolist()})
            table.add_data(shown[query], both, *(shown[row] for row in [*teacher.tolist(), *student.tolist()]))
        return table


def report_end_of_run(trainer, record: dict, neighbors=None, projection=None) -> None:
    """Hand the end of a run to W&B, if it reports there; on the first process alone.

    Args:
        trainer: a ``DistillationTrainer``.
        record: what ``run.json`` holds.
        neighbors: see ``WandbTracker.report``.
        projection: see ``WandbTracker.report``.
    """
    if not trainer.is_world_process_zero():
        return
    paths = [Path(trainer.args.output_dir, name) for name in ("report.html", *PICTURES)]
    files = {path.stem if path.suffix == ".html" else f"pictures/{path.stem}": path for path in paths if path.is_file()}
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, WandbTracker):
            callback.report(record, files, neighbors, projection)
