"""Trackio, Hugging Face's own tracker: what W&B is told, in a local folder or on a Space."""

from pathlib import Path

from PIL.Image import Image
from transformers.integrations.integration_utils import TrackioCallback

from coss_hf.reporting.tracked import EndOfRun, grouped, settings_of, without_totals
from coss_hf.utils.messages import get_logger

logger = get_logger(__name__)

RUN_NAME = "trackio_run_name"  # file in the output folder: a resumed run continues its run


class TrackioTracker(TrackioCallback):
    """As the callback of Transformers, with names in groups, everything that a run was given, and its report.

    Runs are kept in ``TRACKIO_DIR`` on this machine, or on the Space of ``--trackio_space_id``; ``trackio show`` opens
    the dashboard.

    Args:
        trainer: a ``DistillationTrainer``.
    """

    def __init__(self, trainer):
        super().__init__()
        self.trainer = trainer

    def setup(self, args, state, model, **kwargs):
        if state.is_world_process_zero:
            kept = Path(args.output_dir, RUN_NAME)
            name = args.run_name
            if state.global_step > 0 and kept.is_file():
                name = kept.read_text().strip()
            run = self._trackio.init(
                project=args.project,
                name=name,
                space_id=args.trackio_space_id,
                resume="allow" if state.global_step > 0 else "never",
                private=args.hub_private_repo,
                bucket_id=args.trackio_bucket_id,
                embed=False,  # a dashboard in every notebook is not asked for
            )
            self._space_id = self._trackio.context_vars.current_space_id.get()
            self._trackio.config.update({**args.to_dict(), **settings_of(self.trainer)})
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(run.name)
        self._initialized = True

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if not self._initialized:
            self.setup(args, state, model)
        if state.is_world_process_zero:
            scalars, _ = without_totals(logs)
            self._trackio.log(grouped(scalars), step=state.global_step)

    def on_train_end(self, *args, **kwargs):
        """The run stays open until its report, see ``report``."""

    def end(self) -> None:
        """Finish the run, without a report where there was none."""
        if self._initialized and self.trainer.is_world_process_zero():
            self._trackio.finish()
        self._initialized = False

    def report(self, end: EndOfRun) -> None:
        """The end of a run, which it finishes."""
        trainer = self.trainer
        trackio = self._trackio
        if not self._initialized:  # a finished run was resumed: its report is all that is left to keep
            self.setup(trainer.args, trainer.state, trainer.model)
        logs = {"images_seen": end.images_seen, **end.results}
        logs |= {name: trackio.Image(path) for name, path in end.pictures.items()}
        logs |= {name: trackio.Html(path.read_text()) for name, path in end.pages.items()}
        for name, table in end.tables.items():
            rows = [[trackio.Image(cell) if isinstance(cell, Image) else cell for cell in row] for row in table.rows]
            logs[name] = trackio.Table(columns=table.columns, data=rows)
        trackio.log(logs, step=trainer.state.global_step)
        self.end()
        if self._space_id:
            try:
                self._freeze_space(trainer.args, trainer.student.model)
            except Exception as error:  # the run is complete, and its Space is there
                logger.warning("Trackio could not make a static copy of the Space (%s).", error)
