"""Weights & Biases: grouped scalars while training, and the report at its end."""

import http.client
import logging
import os
import ssl
import sys
import threading
import urllib.error
import urllib.request

from transformers.integrations import WandbCallback

from coss_hf.preprocessing import first_line

logger = logging.getLogger(__name__)

INIT_SECONDS = 10
GROUPS = {
    "agreement": ("overlap10", "cosine", "dimension_cosine", "cka"),
    "student": ("effective_rank", "dead_dimensions", "duplicates"),
    "teacher": ("teacher_effective_rank", "teacher_duplicates"),
    "labels": ("knn10", "knn20", "probe"),
    "speed": ("images_per_second", "runtime", "samples_per_second", "steps_per_second"),
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
            answered = isinstance(error, urllib.error.HTTPError) or isinstance(error.reason, ssl.SSLError)
            found[:] = [] if answered else [error]
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
    ``wandb sync``, after one warning.

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
            self._start(args)
        super().setup(args, state, model, **kwargs)
        run, trainer = self._wandb.run, self.trainer
        run.define_metric("images_seen")
        run.define_metric("*", step_metric="images_seen", step_sync=True)
        sizes = {"teacher": trainer.teacher.num_parameters(), "student": trainer.student.num_parameters()}
        identity = {name.lstrip("-"): value for name, value in trainer.identity().items()}
        settings = {"fingerprints": identity, "parameters": sizes, "arguments": trainer.arguments}
        run.config.update(settings, allow_val_change=True)

    def _start(self, args) -> None:
        # W&B keeps the command line, which may hold a token.
        secret = any("token" in word for word in sys.argv)
        settings = self._wandb.Settings(init_timeout=INIT_SECONDS, x_disable_meta=secret)
        options = {"project": os.getenv("WANDB_PROJECT", "coss_hf"), "name": args.run_name, "settings": settings}
        try:
            known = self._wandb.setup().settings
            if known.mode == "online":
                reach(known.base_url)
            self._wandb.init(**options)
        except (self._wandb.Error, OSError) as error:
            run = self._wandb.init(**options, mode="offline")
            logger.warning(
                "W&B cannot be used (%s; is its server up, the key right?): this run is kept on disk. To upload it "
                "later: `wandb login`, then `wandb sync %s`. WANDB_MODE=offline starts like this at once, --report_to "
                "none without W&B.",
                first_line(error),
                os.path.dirname(run.dir),
            )

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
        wandb, run = self._wandb, self._wandb.run
        if run is None:  # of another process, or a run without training
            return
        logs = {
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
            run.summary.update({f"final/{network}/{name.removeprefix('eval_')}": value for name, value in row.items()})
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
