"""The model card of a student: what it is, how to load it, and what it was made from."""

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from coss_hf.evaluation.retrieval import MAX_QUERIES
from coss_hf.evaluation.tables import sample_of_overlap, table
from coss_hf.hub.export_folders import warn_of_stale_exports
from coss_hf.hub.licences import PERMISSIVE, licence_of, on_hub
from coss_hf.hub.snippets import Subject, is_loaded_by, usage
from coss_hf.losses.registry import papers
from coss_hf.models.backbone import Backbone, class_name
from coss_hf.utils.messages import get_logger

logger = get_logger(__name__)

HUB = "https://huggingface.co"
TASK = "image-feature-extraction"
TAGS = ["coss_hf", "distillation"]  # of every student; its methods follow
# The page of a student offers to try it with this picture, of the Hub's own samples.
WIDGET = {"src": f"{HUB}/datasets/mishig/sample_images/resolve/main/tiger.jpg", "example_title": "Tiger"}
METRICS = {
    "knn10": ("accuracy", "k-NN accuracy, k = 10"),
    "knn20": ("accuracy", "k-NN accuracy, k = 20"),
    "probe": ("accuracy", "linear probe accuracy"),
    "linear": ("accuracy", "linear evaluation accuracy"),
    "overlap10": ("neighbor_overlap", "overlap of the 10 nearest with the teacher's"),
    "cosine": ("cosine_similarity", "mean cosine with the teacher"),
    "map": ("mean_average_precision", "retrieval, mean average precision"),
    "asymmetric_map": ("mean_average_precision", "retrieval in the teacher's gallery, mean average precision"),
}


def revision_of(network: Backbone, given: str | None = None) -> str | None:
    """The commit that a network of the Hub was loaded from; ``given`` where that is not known."""
    return (network.revision or given) if on_hub(network.name) else None


def write_card(trainer, title: str | None, record: dict, metadata: dict) -> None:
    """Writes ``README.md`` into the trainer's output folder.

    Args:
        trainer: a ``DistillationTrainer``.
        title: default: the repository's or the folder's name.
        record: what ``run.json`` holds, as far as it is known.
        metadata: ``license``, ``language`` and ``tags`` of the student.
    """
    args = trainer.args
    teacher = trainer.teacher
    name = trainer.hub_model_id or args.output_dir
    title = title or Path(name).absolute().name
    arguments = record.get("arguments", trainer.arguments)
    init = arguments.get("student_init", "pretrained")
    revision = revision_of(teacher, arguments.get("teacher_revision"))
    licences = {"its licence": _licence("teacher", teacher, revision)}
    if init == "pretrained" and on_hub(trainer.student.name) and trainer.student.name != teacher.name:
        start = revision_of(trainer.student, arguments.get("student_revision"))
        licences["licence of its start"] = _licence("student's start", trainer.student, start)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    warn_of_stale_exports(folder)
    subject = Subject(name, trainer.student, trainer.full_model.head, folder, on_hub=bool(trainer.hub_model_id))
    own_tags = metadata.pop("tags", None) or []
    own_tags = [own_tags] if isinstance(own_tags, str) else own_tags
    base_models = _base_models(trainer.student, teacher, init)
    data = ModelCardData(
        **{key: value for key, value in metadata.items() if key in ("license", "language") and value},
        library_name=_library(subject),
        pipeline_tag=TASK,
        base_model=base_models[0] if len(base_models) == 1 else base_models or None,
        base_model_relation="finetune" if base_models else None,
        datasets=arguments.get("dataset") if on_hub(arguments.get("dataset"), "dataset") else None,
        tags=[*dict.fromkeys([*TAGS, *trainer.methods, *_library_tags(subject), *own_tags])],
        widget=[WIDGET],
        model_name=title,
        eval_results=_results(record) or None,
    )
    parts = [
        f"# {title}",
        f"An image encoder that was distilled from {_link(teacher.name)} without labels: its embeddings are "
        f"to imitate those of its teacher.",
        "\n\n".join(record.get("verdict", [])),
        f"## Use\n\n{usage(subject)}",
        f"## Training\n\n{_training(trainer, arguments, record, revision, licences)}",
        f"```\n{record['command']}\n```" if "command" in record else "",
        *_evaluation(record, folder),
        *_citations(trainer, arguments.get("dataset")),
    ]
    body = "\n\n".join(part for part in parts if part) + "\n"
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n\n{body}")


def _licence(role: str, network: Backbone, revision: str | None) -> str:
    """A sentence on the licence of a network that the student was made from; a warning where it has terms."""
    licence, sentence = licence_of(network.name, revision)
    if licence not in PERMISSIVE:
        logger.warning("Licence of the %s %s: %s", role, network.name, sentence.replace("*", ""))
    return sentence


def _base_models(student: Backbone, teacher: Backbone, init: str | None) -> list[str]:
    """Names on the Hub of the networks that a student comes from: its own pre-trained weights, then its teacher.

    The Hub has no relation for a distilled network. ``finetune`` is the nearest: weights were trained further, or were
    trained to give what the teacher gives.
    """
    started_from = [student.name] if init == "pretrained" else []
    # A network in memory that came from nowhere is called by its class.
    return [name for name in dict.fromkeys([*started_from, teacher.name]) if "/" in name and on_hub(name)]


def _library_tags(subject: Subject) -> list[str]:
    """Names of the libraries that load it, as the Hub filters by them, but for ``library_name``."""
    names = [name for name in ("transformers", "sentence-transformers") if is_loaded_by(name, subject)]
    return [name for name in names if name != _library(subject)]


def _library(subject: Subject) -> str:
    if subject.is_module:
        return "coss-hf"
    return "timm" if is_loaded_by("timm", subject) else "transformers"


def _results(record: dict) -> list[EvalResult]:
    dataset = record.get("arguments", {}).get("dataset") or "images"
    row = (record.get("results") or {}).get("student", {})
    where = {
        "task_type": TASK,
        "dataset_type": dataset if on_hub(dataset, "dataset") else _hub_word(Path(dataset).name),
        "dataset_name": Path(dataset).name or dataset,
        "dataset_config": record.get("arguments", {}).get("dataset_name"),
        "dataset_split": record.get("evaluated_on"),
        "dataset_revision": record.get("arguments", {}).get("dataset_revision"),
    }
    return [
        EvalResult(**where, metric_type=kind, metric_name=text, metric_value=round(row[key], 4))
        for key, (kind, text) in METRICS.items()
        if row.get(key) is not None
    ]


def _hub_word(name: str) -> str:
    """A name in the letters that the Hub allows for a data set; it refuses a card with another one."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "images"


def _link(name: str, prefix: str = "") -> str:
    kind = "dataset" if prefix else "model"
    return f"[{name}]({HUB}/{prefix}{name})" if on_hub(name, kind) else f"`{name}`"


def _training_images(record: dict) -> str:
    """How many images were seen again and again, and how many could not be decoded, as far as it is known."""
    if record.get("train_images") is None:
        return ""
    counts = {"left out": record["bad_images"], "replaced by others": record["replaced_images"]}
    damaged = [f"{len(names):,} {what}" for what, names in counts.items() if names]
    undecoded = f"; {' and '.join(damaged)}, since they cannot be decoded" if damaged else ""
    return f", of {record['train_images']:,} training images{undecoded}"


def _training(trainer, arguments: dict, record: dict, revision: str | None, licences: dict[str, str]) -> str:
    """What the student was made from, as a table."""
    teacher = trainer.teacher
    student = trainer.student
    head = "none"
    if trainer.model.head is not None:
        head = "`head.safetensors`, into the teacher's space; not part of the student"
    dataset = arguments.get("dataset")
    images = _link(dataset, "datasets/") if dataset else "not recorded"
    if arguments.get("dataset_revision"):
        images += f", revision `{arguments['dataset_revision']}`"
    facts = {
        "teacher": f"{_link(teacher.name)}, {teacher.num_parameters():,} parameters",
        "its revision": f"`{revision}`" if revision else f"weights and settings `{teacher.fingerprint()}`",
        "its licence": licences["its licence"],
        "student": f"{class_name(student.model)}, {student.num_parameters():,} parameters, started from "
        f"`{student.name}` ({arguments.get('student_init', 'as given')})",
        **{key: text for key, text in licences.items() if key != "its licence"},
        "embedding": f"{student.dim} numbers, pooling `{student.pooling}`; input {student.size[1]} x {student.size[0]}",
        "head": head,
        "method": f"`{trainer.method}`, no labels",
        "dataset": images,
        "images seen": f"{trainer.images_seen:,}{_training_images(record)}",
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return f"| | |\n|---|---|\n{rows}"


def _evaluation(record: dict, folder: Path) -> list[str]:
    results = record.get("results")
    if not results:
        return []
    split = f" (split `{record['evaluated_on']}`)" if record.get("evaluated_on") else ""
    parts = [
        f"## Evaluation\n\nOf images that were not trained on{split}, in %; `random` is the student at random "
        f"weights, `overlap` the share of an image's nearest neighbours that the teacher has, too, `mAP` of "
        f"{MAX_QUERIES:,} of the images at most.{sample_of_overlap(record)} More figures in `run.json`.\n\n"
        f"{table(results)}"
    ]
    if (folder / "neighbors.png").is_file():
        parts.append("![Images with their nearest neighbours in both spaces](neighbors.png)")
    return parts


def _citations(trainer, dataset: str | None) -> list[str]:
    """The papers of the methods, and links to what the student was made from."""
    cited = papers(trainer.methods)
    entries = "\n\n".join(entry for *_, entry in cited)
    links = [f"* [{paper}]({address})" if address else f"* {paper}" for paper, address, _ in cited]
    if on_hub(trainer.teacher.name):
        links.append(f"* teacher: {_link(trainer.teacher.name)}")
    if on_hub(dataset, "dataset"):
        links.append(f"* dataset: {_link(dataset, 'datasets/')}")
    parts = []
    if entries:
        parts.append(f"## Citation\n\n```bibtex\n{entries}\n```")
    if links:
        parts.append("## Links\n\n" + "\n".join(links))
    return parts
