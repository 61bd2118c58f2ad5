"""The page of a report: whether distillation helped, quality against cost, and how it was measured."""

from dataclasses import dataclass
from pathlib import Path

from coss_hf.evaluation.retrieval import MAX_QUERIES
from coss_hf.reporting.html_page import code, heading, html_table, image, page, paragraph
from coss_hf.reporting.plots import quality_plot
from coss_hf.reporting.run_record import write_json
from coss_hf.study.costs import cost_table
from coss_hf.study.tables import as_markdown, extra_passes, ranked, ranked_table, what_was_shared
from coss_hf.study.verdict import verdict


@dataclass(frozen=True)
class Report:
    """What a report shows.

    Attributes:
        title: networks, images seen and number of seeds.
        rows: results of the trials.
        metric: metric that ranks.
        split: split that was measured on.
        images_seen: number of images that each trained student has seen; the most, where they differ.
        costs: costs of ``student`` and ``teacher``.
        hardware: name of the hardware that times were taken on.
        command: the command line.
        versions: versions of the libraries.
        note: see ``Comparison.note``.
    """

    title: str
    rows: list[dict]
    metric: str
    split: str
    images_seen: int
    costs: dict[str, dict]
    hardware: str
    command: str
    versions: dict[str, str]
    note: str = ""

    def write(self, folder: Path) -> str:
        """Write ``report.png``, ``report.json``, ``report.md`` and ``report.html``.

        Args:
            folder: folder to write.

        Returns:
            The text of ``report.md``.
        """
        sentences = verdict(self.rows, self.metric, self.costs)
        picture = folder / "report.png"
        quality_plot(picture, self._points(), self.metric, self.title)
        write_json(folder / "report.json", self._record(sentences))
        text = self._markdown(sentences)
        (folder / "report.md").write_text(text + "\n")
        (folder / "report.html").write_text(self._html(sentences, picture))
        return text

    def _points(self) -> dict[str, tuple[float, list[float]]]:
        """Return milliseconds for one image and the metric of each run, by method."""
        points = {}
        for name, group in ranked(self.rows, self.metric).items():
            values = [row[self.metric] for row in group if row.get(self.metric) is not None]
            network = self.costs["teacher" if name == "teacher" else "student"]
            if values:
                points[name] = (network["batch_1"]["ms"], values)
        return points

    def _record(self, sentences: list[str]) -> dict:
        return {
            "verdict": sentences,
            "metric": self.metric,
            "costs": self.costs,
            "hardware": self.hardware,
            "command": self.command,
            "images_seen": self.images_seen,
            "split": self.split,
            "versions": self.versions,
        }

    def _quality_table(self) -> list[list[str]]:
        """Return the ranked table without its column of scales: there is one for all."""
        return [[line[0], *line[2:]] for line in ranked_table(self.rows, self.metric)]

    def _notes(self) -> str:
        notes = (
            f"In %, means over seeds with 95 % t-intervals, on the {self.split} split (mAP: {MAX_QUERIES:,} of its "
            f"images at most). Times: {self.hardware}."
        )
        return " ".join(filter(None, [notes, self.note, *extra_passes(self.rows), *what_was_shared(self.rows)]))

    def _markdown(self, sentences: list[str]) -> str:
        parts = [
            f"# {self.title}",
            *sentences,
            as_markdown(self._quality_table()),
            as_markdown(cost_table(self.costs)),
            self._notes(),
            f"`{self.command}`",
        ]
        return "\n\n".join(parts)

    def _html(self, sentences: list[str], picture: Path) -> str:
        parts = [
            *(paragraph(sentence, "lead") for sentence in sentences),
            html_table(self._quality_table()),
            *([image(picture)] if picture.is_file() else []),
            heading("What it costs"),
            html_table(cost_table(self.costs)),
            paragraph(self._notes()),
            heading("How it was made"),
            code(self.command),
            paragraph(", ".join(f"{name} {version}" for name, version in self.versions.items())),
        ]
        return page(self.title, parts)
