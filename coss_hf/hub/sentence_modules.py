"""A student for the package sentence-transformers: pooling and head as modules of its own kinds, next to the weights.

``SentenceTransformer(folder).encode([image])`` reads ``modules.json``: the network as Transformers loads it, the
pooling of its tokens, and one dense layer after another. No code travels along, but for a mean that leaves several
tokens out (``patch_pooling.py``).
"""

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from coss_hf.models.backbone import Backbone
from coss_hf.models.modules import ModuleNetwork
from coss_hf.models.pooler import pooler_is_embedding

PACKAGE = "sentence-transformers>=6.2"  # earlier ones were not tried; before 5.4 they take images for CLIP alone
MODULES_FILE = "modules.json"
NETWORK_FILE = "sentence_bert_config.json"
CODE_FILE = "patch_pooling.py"
FILES = [MODULES_FILE, NETWORK_FILE, "config_sentence_transformers.json", CODE_FILE]
FOLDERS = ["*_Pooling/*", "*_PatchPooling/*", "*_LayerNorm/*", "*_Dense/*"]
FOLDER = re.compile(r"\d+_(Pooling|PatchPooling|LayerNorm|Dense)")
KINDS = {
    "PatchPooling": "patch_pooling.PatchPooling",
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "LayerNorm": "sentence_transformers.sentence_transformer.modules.layer_norm.LayerNorm",
    "Dense": "sentence_transformers.base.modules.dense.Dense",
}
TOKENS = "token_embeddings"
EMBEDDING = "sentence_embedding"
# Activations between the layers of a head: of torch, and built without arguments.
ACTIVATIONS = (nn.Identity, nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid)


class NotExpressible(ValueError):
    """No sequence of the package's modules computes these embeddings; the message is the reason, a clause."""


@dataclass
class Stage:
    """One module: its kind, a key of ``KINDS``, its configuration, and its weights."""

    kind: str
    config: dict
    weights: dict[str, Tensor] = field(default_factory=dict)


def stages(student: Backbone, head: nn.Module | None, state: dict[str, Tensor] | None = None) -> list[Stage]:
    """The modules that compute a student's embeddings from images, in the teacher's space where there is a head.

    Args:
        student: the network with its pooling.
        head: the projection head, or None.
        state: state dict of the head, instead of its own.

    Raises:
        NotExpressible: a plain module, a pooling or a head that the package has no modules for.
    """
    if isinstance(student.model, ModuleNetwork):
        raise NotExpressible("AutoModel does not build this module")
    if getattr(student.model.config, "teacher_space", None) is None:
        head = None  # leads nowhere that is named
    output, name, pooling = _pooling(student)
    # An entry of its configuration may have the weights' data type, and the head is of float32.
    config = {
        "transformer_task": "feature-extraction",
        "model_kwargs": {"dtype": "float32"},
        "modality_config": {"image": {"method": "forward", "method_output_name": output}},
        "module_output_name": name,
    }
    return [Stage("Transformer", config), *pooling, *_head(head, state)]


def _pooling(student: Backbone) -> tuple[str, str, list[Stage]]:
    """Which output of the network is read, as what, and how it is pooled."""
    layout = student.layout
    if student.pooling == "pooler":
        shape = student.output_shapes[layout.pooled]
        if len(shape) == 1:
            return layout.pooled, EMBEDDING, []
        if shape != (student.dim, 1, 1):
            raise NotExpressible("its pooled output is a map, which is flattened")
        return layout.pooled, TOKENS, [_pooling_of(student, "mean")]
    if student.pooling == "cls" and layout.class_output:
        ones = {"norm.weight": torch.ones(student.dim), "norm.bias": torch.zeros(student.dim)}
        norm = Stage("LayerNorm", {"dimension": student.dim}, ones)
        return layout.class_output, TOKENS, [_pooling_of(student, "cls"), norm]
    if student.pooling == "cls":
        return "last_hidden_state", TOKENS, [_pooling_of(student, "cls")]
    if layout.prefix + layout.suffix > 1 or layout.channels_last:
        if len(student.output_shapes.get("pooler_output", ())) == 1 and pooler_is_embedding(student):
            return "pooler_output", EMBEDDING, []
        config = {"first": layout.prefix, "last": -layout.suffix or None, "channels_last": layout.channels_last}
        return "last_hidden_state", TOKENS, [Stage("PatchPooling", {"dimension": student.dim} | config)]
    if layout.prefix or layout.suffix:
        return "last_hidden_state", TOKENS, _mean_of_patches(student)
    return "last_hidden_state", TOKENS, [_pooling_of(student, "mean")]


def _pooling_of(student: Backbone, *modes: str) -> Stage:
    mode = modes[0] if len(modes) == 1 else list(modes)
    return Stage("Pooling", {"embedding_dimension": student.dim, "pooling_mode": mode, "include_prompt": True})


def _mean_of_patches(student: Backbone) -> list[Stage]:
    """The mean without the one token that is no patch: a linear function of the mean of all and of that token.

    Its weights depend on the number of tokens, and so on the size of the images, which the image processor fixes.
    """
    count = student.output_shapes["last_hidden_state"][0]
    other = "cls" if student.layout.prefix else "lasttoken"
    unit = torch.eye(student.dim)
    weight = torch.cat([count * unit, -unit], 1) / (count - 1)
    return [_pooling_of(student, "mean", other), _dense(weight, None, nn.Identity())]


def _dense(weight: Tensor, bias: Tensor | None, activation: nn.Module) -> Stage:
    config = {
        "in_features": weight.shape[1],
        "out_features": weight.shape[0],
        "bias": bias is not None,
        "activation_function": f"{type(activation).__module__}.{type(activation).__name__}",
        "module_input_name": EMBEDDING,
        "module_output_name": EMBEDDING,
    }
    weights = {"linear.weight": weight} | ({} if bias is None else {"linear.bias": bias})
    return Stage("Dense", config, weights)


def _head(head: nn.Module | None, state: dict[str, Tensor] | None) -> list[Stage]:
    """A dense module for each linear layer of a head, with the activation that follows it."""
    if head is None:
        return []
    state = head.state_dict() if state is None else state
    layers = [("", head)] if isinstance(head, nn.Linear) else list(head.named_children())
    is_sequence = isinstance(head, nn.Sequential) and layers and isinstance(layers[0][1], nn.Linear)
    if not isinstance(head, nn.Linear) and not is_sequence:
        raise NotExpressible(f"its head is a {type(head).__name__}, no linear layers one after the other")
    found = []
    for name, layer in layers:
        key = f"{name}." if name else ""
        if isinstance(layer, nn.Linear):
            found.append([state[f"{key}weight"], state.get(f"{key}bias"), nn.Identity()])
        elif _is_plain_activation(layer) and isinstance(found[-1][2], nn.Identity):
            found[-1][2] = layer
        else:
            raise NotExpressible(f"its head has a {type(layer).__name__}")
    return [_dense(*layer) for layer in found]


def _is_plain_activation(layer: nn.Module) -> bool:
    """Whether the class alone says what a layer computes."""
    return type(layer) in ACTIVATIONS and (isinstance(layer, nn.ReLU) or repr(layer) == repr(type(layer)()))


def write_modules(
    folder: str | Path, student: Backbone, head: nn.Module | None, state: dict[str, Tensor] | None = None
) -> None:
    """Write what ``SentenceTransformer`` reads next to a saved network; nothing where it cannot compute the embeddings.

    Args:
        folder: of the network; what an earlier call wrote there is replaced.
        student: the network with its pooling.
        head: the projection head, or None.
        state: state dict of the head, instead of its own.
    """
    folder = Path(folder)
    _remove(folder)
    try:
        modules = stages(student, head, state)
    except NotExpressible:
        return  # the card says why
    entries = []
    for number, stage in enumerate(modules):
        path = f"{number}_{stage.kind}" if number else ""
        entry = {"idx": number, "name": str(number), "path": path, "type": KINDS[stage.kind]}
        if number:
            _write_stage(folder / path, stage)
        else:
            _write_json(folder / NETWORK_FILE, stage.config)
            if student.options:
                entry["kwargs"] = list(student.options)  # of ``encode``, for the network
        entries.append(entry)
        if stage.kind == "PatchPooling":
            shutil.copy(Path(__file__).with_name(CODE_FILE), folder / CODE_FILE)
    _write_json(folder / FILES[2], {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"})
    _write_json(folder / MODULES_FILE, entries)


def _remove(folder: Path) -> None:
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    for path in folder.iterdir() if folder.is_dir() else ():
        if FOLDER.fullmatch(path.name) and path.is_dir():
            shutil.rmtree(path)


def _write_stage(folder: Path, stage: Stage) -> None:
    folder.mkdir(exist_ok=True)
    _write_json(folder / "config.json", stage.config)
    if stage.weights:
        tensors = {name: value.detach().float().cpu().contiguous() for name, value in stage.weights.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, entries: dict | list) -> None:
    path.write_text(json.dumps(entries, indent=2) + "\n")


def module_folders(folder: Path) -> list[str]:
    """Names of the folders of modules that ``modules.json`` lists, in this folder."""
    path = folder / MODULES_FILE
    if not path.is_file():
        return []
    return [entry["path"] for entry in json.loads(path.read_text()) if FOLDER.fullmatch(entry["path"])]


def needs_size(student: Backbone) -> bool:
    """Whether the modules hold for images of the student's size alone."""
    layout = student.layout
    is_mean = student.pooling in ("mean", "gap") and layout.tokens
    return is_mean and layout.prefix + layout.suffix == 1


def needs_code(student: Backbone) -> bool:
    """Whether the package must trust a file in the student's folder."""
    return any(stage.kind == "PatchPooling" for stage in stages(student, None))


def why_not(student: Backbone, head: nn.Module | None) -> str:
    """Why the package cannot compute a student's embeddings, as a clause; empty where it can."""
    try:
        stages(student, head)
    except NotExpressible as reason:
        return str(reason)
    return ""
