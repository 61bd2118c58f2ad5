"""The model card of a student: what it is, how to load it, and what it was made from."""

import logging
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData, try_to_load_from_cache

from coss_hf.evaluation.diagnostics import on_images
from coss_hf.evaluation.retrieval import MAX_QUERIES
from coss_hf.evaluation.tables import table
from coss_hf.hub.licences import PERMISSIVE, licence_of, on_hub
from coss_hf.losses.registry import papers
from coss_hf.models.backbone import Backbone
from coss_hf.models.modules import ModuleNetwork

logger = logging.getLogger(__name__)

HUB = "https://huggingface.co"
TASK = "image-feature-extraction"
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


def renamed(card: str, name: str) -> str:
    """The card with a snippet that loads ``name``."""
    return re.sub(r'(?m)^name = ".*"$', lambda _: f'name = "{name}"', card)


def revision_of(network: Backbone, given: str | None = None) -> str | None:
    """The commit that a network of the Hub was loaded from; ``given`` where that is not known."""
    if not on_hub(network.name):
        return None
    # Not every configuration keeps it; the cache has what was loaded.
    file = try_to_load_from_cache(network.name, "config.json", revision=given)
    kept = Path(file).parent.name if isinstance(file, str) else given
    return getattr(network.model.config, "_commit_hash", None) or kept


def snippet(name: str, student: Backbone) -> str:
    """Code that embeds an image with Transformers alone; of a plain module, what it takes to load it."""
    if isinstance(student.model, ModuleNetwork):
        return _module_snippet(name, student)
    trust = ", trust_remote_code=True" if getattr(student.model.config, "auto_map", None) else ""
    height, width = student.size
    expression = _pooling_expression(student)
    options = "".join(f", {key}={value}" for key, value in student.options.items())
    return f'''import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

name = "{name}"
model = AutoModel.from_pretrained(name{trust}).eval()
processor = AutoImageProcessor.from_pretrained(name)

image = Image.new("RGB", ({width}, {height}))  # yours
with torch.no_grad():
    output = model(**processor(image, return_tensors="pt"){options})
embedding = {expression}  # (1, {student.dim})'''


def _module_snippet(name: str, student: Backbone) -> str:
    config = student.model.config
    built = "module"
    if config.embedding_function is not None:
        built = (
            f"coss_hf.Backbone.from_module(module, embedding={config.embedding_function}{_input_arguments(student)})"
        )
    load = f"coss_hf.Student.from_pretrained(name, module={built})"
    use = "student.encode([image])"
    if config.teacher_space is None:
        load = f'coss_hf.load_backbone(name, module={built}, argument="student")'
        use = "coss_hf.embed(student, [image])"
    height, width = student.size
    return f'''import coss_hf
from PIL import Image

name = "{name}"
module = ...  # a {config.architecture}, built as the trained one was; its weights are replaced
student = {load}

image = Image.new("RGB", ({width}, {height}))  # yours
embedding = {use}'''


def _input_arguments(student: Backbone) -> str:
    """Of ``Backbone.from_module``, which cannot read them off every module."""
    processor = student.processor
    return f", size={student.size}, mean={tuple(processor.image_mean)}, std={tuple(processor.image_std)}"


def _pooling_expression(student: Backbone) -> str:
    layout = student.layout
    if student.pooling == "pooler":
        return f"output.{layout.pooled}.flatten(1)"
    if student.pooling == "cls" and layout.class_output:
        token = f"output.{layout.class_output}[:, 0]"
        return f"torch.nn.functional.layer_norm({token}, ({student.dim},))"
    if student.pooling == "cls":
        return "output.last_hidden_state[:, 0]"
    if layout.tokens:
        return f"output.last_hidden_state[:, {layout.prefix}:{-layout.suffix or ''}].mean(1)"
    axes = (1, 2) if layout.channels_last else (2, 3)
    return f"output.last_hidden_state.mean({axes})"


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
    revision = revision_of(teacher, arguments.get("teacher_revision"))
    licence, sentence = licence_of(teacher.name, revision)
    if licence not in PERMISSIVE:
        logger.warning("Licence of the teacher %s: %s", teacher.name, sentence.replace("*", ""))
    tags = metadata.pop("tags", None) or []
    data = ModelCardData(
        **{key: value for key, value in metadata.items() if key in ("license", "language") and value},
        library_name="coss-hf" if isinstance(trainer.student.model, ModuleNetwork) else "transformers",
        pipeline_tag=TASK,
        base_model=teacher.name if on_hub(teacher.name) else None,
        datasets=arguments.get("dataset") if on_hub(arguments.get("dataset")) else None,
        tags=["distillation", "coss", *([tags] if isinstance(tags, str) else tags)],
        model_name=title,
        eval_results=_results(record) or None,
    )
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    parts = [
        f"# {title}",
        f"An image encoder that was distilled from {_link(teacher.name)} without labels, to embed images as its "
        f"teacher does.",
        "\n\n".join(record.get("verdict", [])),
        f"## Use\n\n{_use(name, trainer.student)}",
        f"## Training\n\n{_training(trainer, arguments, revision, sentence)}",
        f"```\n{record['command']}\n```" if "command" in record else "",
        *_evaluation(record, folder),
        *_citations(trainer, arguments.get("dataset")),
    ]
    body = "\n\n".join(part for part in parts if part) + "\n"
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n\n{body}")


def _use(name: str, student: Backbone) -> str:
    if isinstance(student.model, ModuleNetwork):
        return (
            f"A state dict in the keys of `{student.model.config.architecture}`, the module that it was trained from "
            f"(`model.safetensors`), and its image processor. With that module at hand:\n\n"
            f"```python\n{snippet(name, student)}\n```"
        )
    ours = "import coss_hf\n\nembeddings = coss_hf.embed(name, [image])"
    text = (
        f"```python\n{snippet(name, student)}\n```\n\nor, with pooling and pre-processing looked after, many images at "
        f"once:\n\n```python\n{ours}\n```"
    )
    space = student.model.config.teacher_space
    if space is not None:
        text += (
            f"\n\nIn the teacher's space ({space['dim']} numbers), to be compared with the teacher's embeddings, for "
            f"instance in a gallery that the teacher has embedded:\n\n```python\n"
            f"embeddings = coss_hf.Student.from_pretrained(name).embed([image])\n```"
        )
    return text


def _results(record: dict) -> list[EvalResult]:
    dataset = record.get("arguments", {}).get("dataset") or "images"
    row = (record.get("results") or {}).get("student", {})
    where = {
        "task_type": TASK,
        "dataset_type": dataset if on_hub(dataset) else Path(dataset).name,
        "dataset_name": Path(dataset).name,
        "dataset_config": record.get("arguments", {}).get("dataset_name"),
        "dataset_split": record.get("evaluated_on"),
        "dataset_revision": record.get("arguments", {}).get("dataset_revision"),
    }
    return [
        EvalResult(**where, metric_type=kind, metric_name=text, metric_value=round(row[key], 4))
        for key, (kind, text) in METRICS.items()
        if row.get(key) is not None
    ]


def _link(name: str, prefix: str = "") -> str:
    return f"[{name}]({HUB}/{prefix}{name})" if on_hub(name) else f"`{name}`"


def _training(trainer, arguments: dict, revision: str | None, licence: str) -> str:
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
        "its licence": licence,
        "student": f"{_class_of(student)}, {student.num_parameters():,} parameters, started from "
        f"`{student.name}` ({arguments.get('student_init', 'as given')})",
        "embedding": f"{student.dim} numbers, pooling `{student.pooling}`; input {student.size[1]} x {student.size[0]}",
        "head": head,
        "method": f"`{trainer.method}`, no labels",
        "dataset": images,
        "images seen": f"{trainer.images_seen:,}",
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return f"| | |\n|---|---|\n{rows}"


def _class_of(student: Backbone) -> str:
    network = student.model.module if isinstance(student.model, ModuleNetwork) else student.model
    return type(network).__name__


def _sample(record: dict) -> str:
    images = record.get("evaluated_images")
    return f" Overlap {on_images(images)}." if images else ""


def _evaluation(record: dict, folder: Path) -> list[str]:
    results = record.get("results")
    if not results:
        return []
    split = f" (split `{record['evaluated_on']}`)" if record.get("evaluated_on") else ""
    parts = [
        f"## Evaluation\n\nOf images that were not trained on{split}, in %; `random` is the student at random "
        f"weights, `overlap` the share of an image's nearest neighbours that the teacher has, too, `mAP` of "
        f"{MAX_QUERIES:,} of the images at most.{_sample(record)} More figures in `run.json`.\n\n{table(results)}"
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
    if on_hub(dataset):
        links.append(f"* dataset: {_link(dataset, 'datasets/')}")
    parts = []
    if entries:
        parts.append(f"## Citation\n\n```bibtex\n{entries}\n```")
    if links:
        parts.append("## Links\n\n" + "\n".join(links))
    return parts
