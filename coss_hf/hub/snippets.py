"""Code on a student's card that loads it: one entry of ``LOADERS`` for each library, shown where it holds.

A new library is one more entry: when it holds, or why not, and its code. Each code runs as it stands, leaves the
embedding of one image as ``embedding``, and has a line ``name = "..."`` that ``renamed`` finds.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from coss_hf.features import Features
from coss_hf.hub import sentence_modules
from coss_hf.hub.export_folders import exported_folders, exported_with_head
from coss_hf.models.backbone import Backbone, evaluating
from coss_hf.models.from_module import removal_of_classifier, torchvision_name
from coss_hf.models.image_processor import brings_code, is_timm_processor
from coss_hf.models.loading import has_own_code
from coss_hf.models.modules import ModuleNetwork
from coss_hf.models.pooler import FIRST_TIMM, TIMM, PoolerOutput, pooler_is_embedding, pooler_output
from coss_hf.models.towers import describe_space

LOCAL = "local-dir:"  # timm's words for a folder
HUB = "hf-hub:"  # and for a name on the Hub
NOT_MENTIONED = None
TRUST = ", trust_remote_code=True"
# By what is imported: the package to install, where its name is another or its version matters.
PACKAGES = {
    "PIL": "pillow",
    "coss_hf": "coss-hf",
    "optimum": "optimum-onnx[onnxruntime]",
    "sentence_transformers": sentence_modules.PACKAGE,
    "timm": f"timm>={FIRST_TIMM}",
}
# What the installation of this package brings.
BROUGHT = {"PIL", "safetensors", "torch", "torchvision", "transformers"}


@dataclass(frozen=True)
class Subject:
    """A student whose card is written.

    Attributes:
        name: folder or name on the Hub that the code loads.
        student: the student.
        head: its projection head, or None.
        folder: where its files are.
        on_hub: whether ``name`` is one on the Hub; default: where it is no folder.
    """

    name: str
    student: Backbone
    head: nn.Module | None
    folder: Path
    on_hub: bool | None = None

    @property
    def is_module(self) -> bool:
        """Whether it was trained from a plain module, which no library builds by its name."""
        return isinstance(self.student.model, ModuleNetwork)

    @property
    def space(self) -> dict | None:
        """What ``config.json`` says of the teacher's space; None where the student is not in it."""
        return getattr(self.student.model.config, "teacher_space", None)

    @cached_property
    def builder(self) -> str | None:
        """The function of torchvision that builds the plain module; None where there is none. Networks are built."""
        return torchvision_name(self.student.model.module) if self.is_module else None


@dataclass(frozen=True)
class Loader:
    """A way to load a student.

    Attributes:
        title: the heading above its code.
        why_not: the reason why it does not give this student's embedding, as a clause; empty where it does;
            ``NOT_MENTIONED`` where the card does not speak of it.
        code: the code, for the card.
        remark: a sentence or more above the code, of the student and the code.
        language: of the code.
    """

    title: str
    why_not: Callable[[Subject], str | None]
    code: Callable[[Subject], str]
    remark: Callable[[Subject, str], str]
    language: str = "python"


def renamed(card: str, name: str, on_hub: bool | None = None, revision: str | None = None) -> str:
    """The card with code that loads ``name``, a folder or a name on the Hub; ``on_hub`` is as in ``Subject``.

    Args:
        card: its text.
        name: that is loaded.
        on_hub: whether it is one on the Hub.
        revision: branch that it is loaded from; None for main.
    """
    card = re.sub(r'(?m)^((?:const )?name = )".*"(?=;?$)', lambda found: f'{found[1]}"{name}"', card)
    card = re.sub(rf'"(?:{LOCAL}|{HUB})"(?= \+ name\b)', f'"{_timm_source(name, on_hub)}"', card)
    return _at_revision(card, None if revision == "main" else revision)


def _at_revision(card: str, revision: str | None) -> str:
    """The card with code that loads the student, which each code calls ``name``, from a branch; None for main."""
    given = f', revision="{revision}"' if revision else ""
    call = r'((?:from_pretrained|load_backbone|SentenceTransformer)\(name\b|\bmodel=name\b|cached_file\(name, "[^"]*")'
    card = re.sub(rf'{call}(?:, revision="[^"]*")?', lambda found: found[1] + given, card)
    at = f' + "@{revision}"' if revision else ""
    card = re.sub(rf'("{HUB}" \+ name)(?: \+ "@[^"]*")?', lambda found: found[1] + at, card)
    option = f', revision: "{revision}"' if revision else ""
    card = re.sub(r'(, name, \{ dtype: "\w+")(?:, revision: "[^"]*")?', lambda found: found[1] + option, card)
    if not revision:
        return card
    trust = TRUST if f"coss_hf.embed(student, [image]{TRUST})" in card else ""
    return re.sub(r"(?m)^student = name$", f"student = coss_hf.load_backbone(name{given}{trust})", card)


def usage(subject: Subject) -> str:
    """The section of a card on how to use a student: code for each library that loads it, and why others do not."""
    parts = []
    reasons = []
    for loader in LOADERS:
        reason = loader.why_not(subject)
        if reason == "":
            code = loader.code(subject)
            remark = loader.remark(subject, code)
            parts.append(f"### {loader.title}\n\n{remark}\n\n```{loader.language}\n{code}\n```")
        elif reason is not NOT_MENTIONED:
            reasons.append(f"* {loader.title}: {reason}.")
    if reasons:
        parts.append(
            "### What does not load it\n\nThese do not give this student's embedding:\n\n" + "\n".join(reasons)
        )
    return "\n\n".join(parts)


def is_loaded_by(library: str, subject: Subject) -> bool:
    """Whether the loader of this title, in any case of letters, gives a student's embedding."""
    return any(loader.why_not(subject) == "" for loader in LOADERS if loader.title.lower() == library)


# ---- parts of several codes ----


def _image(subject: Subject) -> str:
    height, width = subject.student.size
    # As the training read images: upright, and in RGB whatever their mode.
    yours = 'ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")'
    return f'image = Image.new("RGB", ({width}, {height}))  # or yours, by ImageOps of PIL: {yours}'


def _needs(code: str, with_timm: bool = False) -> str:
    """The beginning of a sentence on the packages that a code needs: those that it imports, and those that they load.

    Args:
        code: the code of a loader.
        with_timm: whether Transformers loads something of timm.
    """
    names = re.findall(r"(?m)^(?:import|from) (\w+)", code)
    if "transformers" in names:
        names.append("torch")  # for return_tensors="pt", whatever computes the embedding
    if with_timm:
        names.append("timm")
    if "coss_hf" in names:
        names = [name for name in names if name not in BROUGHT]
    names = sorted(dict.fromkeys(names), key=lambda name: name == "PIL")  # what loads the student comes first
    *first, last = [f"`{PACKAGES.get(name, name)}`" for name in names]
    return f"Needs {', '.join(first)} and {last}" if first else f"Needs {last}"


def _trust(subject: Subject) -> str:
    return TRUST if getattr(subject.student.model.config, "auto_map", None) else ""


def _trust_processor(subject: Subject) -> str:
    return TRUST if brings_code(subject.student.processor) else ""


def _trust_either(subject: Subject) -> str:
    """Where one call loads network and image processor."""
    return _trust(subject) or _trust_processor(subject)


def _dtype(subject: Subject) -> str:
    """The data type of the pixels, as an argument: by default Transformers computes in that of the weights."""
    return "" if subject.student.model.dtype == torch.float32 else ", dtype=torch.float32"


def _own_space(subject: Subject) -> str:
    """A sentence for loaders that do not carry the head."""
    if subject.space is None or subject.head is None:
        return ""
    return (
        f" It is the student's own embedding, of {subject.student.dim} numbers; the projection head into the teacher's "
        f"space is not part of it."
    )


def _shape(subject: Subject) -> str:
    return f"(1, {subject.student.dim})"


def _described_space(subject: Subject) -> str:
    space = subject.space
    if space is None:
        return "the student's own embedding"
    return f"in the teacher's space, {space['dim']} numbers"


# ---- Transformers ----


def _transformers_code(subject: Subject) -> str:
    student = subject.student
    options = "".join(f", {key}={value}" for key, value in student.options.items())
    return f'''import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

name = "{subject.name}"
model = AutoModel.from_pretrained(name{_trust(subject)}{_dtype(subject)}).eval()
processor = AutoImageProcessor.from_pretrained(name{_trust_processor(subject)})

{_image(subject)}
with torch.no_grad():
    output = model(**processor(image, return_tensors="pt"){options})
embedding = {pooling_expression(student)}  # {_shape(subject)}'''


def pooling_expression(student: Backbone) -> str:
    """The embedding as an expression of ``output``, what the network returns."""
    layout = student.layout
    if student.pooling == "pooler":
        return f"output.{layout.pooled}.flatten(1)"
    if student.pooling == "cls" and layout.class_output:
        token = f"output.{layout.class_output}[:, 0]"
        return f"torch.nn.functional.layer_norm({token}, ({student.dim},))"
    return _pooled(student, "output.last_hidden_state")


def _pooled(student: Backbone, hidden: str) -> str:
    layout = student.layout
    if student.pooling == "cls":
        return f"{hidden}[:, 0]"
    if layout.tokens:
        patches = f"[:, {layout.prefix}:{-layout.suffix or ''}]" if layout.prefix or layout.suffix else ""
        return f"{hidden}{patches}.mean(1)"
    return f"{hidden}.mean({(1, 2) if layout.channels_last else (2, 3)})"


def _transformers_remark(subject: Subject, code: str) -> str:
    text = f"{_needs(code, _is_of_timm(subject))}.{_own_space(subject)}"
    trust = _trust_either(subject)
    return f"{text} Its code is in this repository (`trust_remote_code`)." if trust else text


def _no_module(subject: Subject) -> str | None:
    return NOT_MENTIONED if subject.is_module else ""


# ---- the pipeline of Transformers ----


def _pipeline_code(subject: Subject) -> str:
    dtype = _dtype(subject)
    return f'''{"import torch" if dtype else ""}
from PIL import Image
from transformers import pipeline

name = "{subject.name}"
extractor = pipeline("image-feature-extraction", model=name, pool=True{_trust_either(subject)}{dtype})

{_image(subject)}
embedding = extractor(image, return_tensors=True).flatten(1)  # {_shape(subject)}'''.lstrip()


def _pipeline_remark(subject: Subject, code: str) -> str:
    needs = _needs(code, _is_of_timm(subject))
    text = f"{needs}. The same embedding from the pipeline of Transformers"
    if _trust_either(subject):
        return f"{text}. Inference Endpoints do not run its code by themselves: they need a handler of your own."
    if _is_of_timm(subject):
        return f"{text}. Inference Endpoints need a handler of your own, with `timm` installed."
    text += (
        ", and from Inference Endpoints, whose default handler is this pipeline: send "
        '`{"inputs": ..., "parameters": {"pool": true}}`, with an image in base64.'
    )
    if _dtype(subject):
        text += f" They compute in {str(subject.student.model.dtype).removeprefix('torch.')}, as the weights are kept."
    return text


def _why_no_pipeline(subject: Subject) -> str | None:
    student = subject.student
    if subject.is_module:
        return NOT_MENTIONED
    if student.options:
        return f"it cannot be told to use `{'`, `'.join(student.options)}`, with which the student was trained"
    given = f"with `pool=True` it returns `pooler_output`, which a {type(student.model).__name__}"
    return {
        PoolerOutput.EMBEDDING: "",
        PoolerOutput.ZEROS: f"{given} does not pool by `{student.pooling}`: its pooler was not trained, and is zero",
        PoolerOutput.ABSENT: "there is no `pooler_output`, and `pool=True` is an error",
        PoolerOutput.ANOTHER: f"{given} does not pool by `{student.pooling}`: it is another vector, which was not "
        f"trained to resemble the teacher's embedding",
    }[pooler_output(student)]


# ---- sentence-transformers ----


def _sentence_code(subject: Subject) -> str:
    options = "".join(f", {key}={value}" for key, value in subject.student.options.items())
    dim = subject.space["dim"] if subject.space else subject.student.dim
    trust = _trust_either(subject) or (TRUST if sentence_modules.needs_code(subject.student) else "")
    return f'''from PIL import Image
from sentence_transformers import SentenceTransformer

name = "{subject.name}"
model = SentenceTransformer(name{trust})

{_image(subject)}
embedding = model.encode([image]{options})  # (1, {dim})
similarity = model.similarity(embedding, embedding)  # cosines'''


def _sentence_remark(subject: Subject, code: str) -> str:
    text = _needs(code, _is_of_timm(subject))
    if sentence_modules.needs_code(subject.student):
        text += f", and trust in the few lines of `{sentence_modules.CODE_FILE}`, which leave out what is no patch"
    text += f"; {_described_space(subject)}"
    text += "." if subject.space is None else ", to be compared with embeddings of the teacher."
    if sentence_modules.needs_size(subject.student):
        height, width = subject.student.size
        text += f" It is right for images of {width} x {height} pixels alone, to which its image processor brings them."
    return text


def _why_no_sentence(subject: Subject) -> str | None:
    if subject.is_module:
        return NOT_MENTIONED
    return sentence_modules.why_not(subject.student, subject.head)


# ---- timm ----


def _is_of_timm(subject: Subject) -> bool:
    return not subject.is_module and subject.student.model.config.model_type == TIMM


def _timm_source(name: str, on_hub: bool | None) -> str:
    if on_hub is None:
        on_hub = not (Path(name).is_dir() or Path(name).is_absolute())
    return HUB if on_hub else LOCAL


def _timm_code(subject: Subject) -> str:
    head = """import timm
import torch
from PIL import Image
"""
    pixels = 'processor(image, return_tensors="pt")["pixel_values"]'
    prepare = f"processor = AutoImageProcessor.from_pretrained(name{_trust_processor(subject)})"
    if is_timm_processor(subject.student.processor):
        pixels = "transform(image).unsqueeze(0)"
        prepare = "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
    else:
        head += "from transformers import AutoImageProcessor\n"
    return f'''{head}
name = "{subject.name}"
model = timm.create_model("{_timm_source(subject.name, subject.on_hub)}" + name, pretrained=True).eval()
{prepare}

{_image(subject)}
with torch.no_grad():
    embedding = model({pixels})  # {_shape(subject)}'''


def _timm_remark(subject: Subject, code: str) -> str:
    return f"{_needs(code)}; `{LOCAL}` loads a folder, `{HUB}` from the Hub.{_own_space(subject)}"


def _why_no_timm(subject: Subject) -> str | None:
    if not _is_of_timm(subject):
        return NOT_MENTIONED
    if subject.student.pooling != "pooler" and not pooler_is_embedding(subject.student):
        return f"its networks pool by themselves, and not by `{subject.student.pooling}`"
    return ""


# ---- a plain module ----


def _module_code(subject: Subject) -> str:
    student = subject.student
    config = student.model.config
    imports = "import torch\n"
    build = f"module = ...  # a {config.architecture}, built as the trained one was"
    if subject.builder is not None:
        imports += "import torchvision\n"
        build = f"module = torchvision.models.{subject.builder}()"
    without = removal_of_classifier(student.model.module)
    without = f"{without}  # no classifier\n" if without else ""
    return f'''{imports}from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor
from transformers.utils import cached_file

name = "{subject.name}"
{build}{_reading(subject)}
{without}module.load_state_dict(load_file(cached_file(name, "model.safetensors")))
module.eval()
processor = AutoImageProcessor.from_pretrained(name{_trust_processor(subject)})

{_image(subject)}
with torch.no_grad():
    output = module(processor(image, return_tensors="pt")["pixel_values"])
embedding = {_module_expression(student)}  # {_shape(subject)}'''


def _reading(subject: Subject) -> str:
    """The line of a function that reads the embedding: its name alone is known, which need not be importable."""
    name = subject.student.model.config.embedding_function
    return "" if name is None else f"\nread = ...  # {name}, the function that it was trained with as embedding="


@torch.no_grad()
def _module_expression(student: Backbone) -> str:
    """The embedding as an expression of ``output``, what the module itself returns."""
    network = student.model
    if network.embedding is not None:
        return "read(output)"
    first = next(network.parameters())
    with evaluating(network):
        output = network.module(torch.zeros(2, 3, *student.size, device=first.device, dtype=first.dtype))
    if isinstance(output, Features):
        return "output.embedding"
    if isinstance(output, Tensor):
        return "output" if output.dim() == 2 else _pooled(student, "output")
    if isinstance(output, (list, tuple)):
        return _pooled(student, "output[-1]")
    is_mapping = hasattr(output, "keys")
    hidden = output.get("last_hidden_state") if is_mapping else getattr(output, "last_hidden_state", None)
    name = "pooler_output" if student.pooling == "pooler" or hidden is None else "last_hidden_state"
    value = f'output["{name}"]' if is_mapping else f"output.{name}"
    return f"{value}.flatten(1)" if name == "pooler_output" else _pooled(student, value)


def _module_remark(subject: Subject, code: str) -> str:
    config = subject.student.model.config
    return (
        f"{_needs(code)}. The student is a state dict in the keys of "
        f"`{config.architecture}`, the module that it was trained from (`model.safetensors`), with its image "
        f"processor.{_own_space(subject)}"
    )


def _only_module(subject: Subject) -> str | None:
    return "" if subject.is_module else NOT_MENTIONED


# ---- this package ----


def _own_trust(subject: Subject) -> str:
    """Networks of this package bring code for others, and need none here."""
    return _trust_processor(subject) or (TRUST if has_own_code(subject.student.model.config) else "")


def _own_code(subject: Subject) -> str:
    trust = _own_trust(subject)
    imports = "" if subject.builder is None else "import torchvision\n"
    return f'''import coss_hf
{imports}from PIL import Image

name = "{subject.name}"
{_own_loading(subject)}

{_image(subject)}
embedding = {"student.encode([image])" if subject.space else f"coss_hf.embed(student, [image]{trust})"}'''


def _own_loading(subject: Subject) -> str:
    if not subject.is_module:
        load = f"coss_hf.Student.from_pretrained(name{_own_trust(subject)})" if subject.space else "name"
        return f"student = {load}"
    config = subject.student.model.config
    built = "module"
    if config.embedding_function is not None:
        processor = subject.student.processor
        built = (
            f"coss_hf.Backbone.from_module(module, embedding=read, size={subject.student.size}, "
            f"mean={tuple(processor.image_mean)}, std={tuple(processor.image_std)})"
        )
    trust = _trust_processor(subject)
    load = f"coss_hf.Student.from_pretrained(name, module={built}{trust})"
    if subject.space is None:
        load = f'coss_hf.load_backbone(name, module={built}, argument="student"{trust})'
    line = f"module = ...  # a {config.architecture}, built as the trained one was; its weights are replaced"
    if subject.builder is not None:
        line = f"module = torchvision.models.{subject.builder}()  # its weights are replaced"
    return f"{line}{_reading(subject)}\nstudent = {load}"


def _own_remark(subject: Subject, code: str) -> str:
    needs = _needs(code, _is_of_timm(subject))
    text = f"{needs}; pooling and pre-processing are looked after, many images at once"
    if subject.space is None:
        return f"{text}."
    text = f"{text}; {_described_space(subject)}, to be compared with embeddings of the teacher."
    space = describe_space(subject.space.get("space"), texts=subject.space.get("texts", True))
    return f"{text} {space}".rstrip()


# ---- texts ----


def _text_code(subject: Subject) -> str:
    torchvision = "" if subject.builder is None else "import torchvision\n"
    revision = subject.space.get("revision")
    given = f', revision="{revision}"' if revision else ""
    return f'''import coss_hf
import torch
{torchvision}from PIL import Image
from transformers import AutoModel, AutoTokenizer

name = "{subject.name}"
teacher = "{subject.space["teacher"]}"
texts = ["a photo of a cat", "a photo of a dog"]
text_model = AutoModel.from_pretrained(teacher{given}).eval()
length = text_model.config.text_config.max_position_embeddings
tokenizer = AutoTokenizer.from_pretrained(teacher{given})
tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
if text_model.config.model_type.startswith("siglip"):
    tokens.pop("attention_mask", None)  # it was trained without
with torch.no_grad():
    text_embeddings = text_model.get_text_features(**tokens).pooler_output
{_own_loading(subject)}

{_image(subject)}
embedding = student.encode([image])
print(student.similarity(embedding, text_embeddings))  # cosines (1, 2)'''


def _text_remark(subject: Subject, code: str) -> str:
    needs = _needs(code, _is_of_timm(subject))
    return f"{needs}. The teacher embeds the texts, and the student the images."


def _no_text(subject: Subject) -> str | None:
    space = subject.space or {}
    reads_texts = space.get("space") == "projected" and space.get("texts", True)
    return "" if reads_texts else NOT_MENTIONED


# ---- exported files ----


def _exported(kind: str) -> Callable[[Subject], str | None]:
    """A loader's ``why_not``: it is shown where ``coss-hf export`` wrote files of the present weights."""
    return lambda subject: "" if kind in exported_folders(subject.folder)[0] else NOT_MENTIONED


def _exported_code(subject: Subject, imports: str, load: str, run: str) -> str:
    return f'''{imports}
from PIL import Image
from transformers import AutoImageProcessor
from transformers.utils import cached_file

name = "{subject.name}"
{load}
processor = AutoImageProcessor.from_pretrained(name{_trust_processor(subject)})

{_image(subject)}
pixels = processor(image, return_tensors="pt")["pixel_values"]
{run}'''


def _onnx_code(subject: Subject) -> str:
    load = 'session = onnxruntime.InferenceSession(cached_file(name, "onnx/model.onnx"))'
    run = 'embedding = session.run(["embedding"], {"pixel_values": pixels.numpy()})[0]'
    return _exported_code(subject, "import onnxruntime", load, run)


def _openvino_code(subject: Subject) -> str:
    load = """cached_file(name, "openvino/openvino_model.bin")  # the weights, next to it
graph = cached_file(name, "openvino/openvino_model.xml")
model = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})"""
    return _exported_code(subject, "import openvino", load, 'embedding = model(pixels.numpy())["embedding"]')


def _executorch_code(subject: Subject) -> str:
    load = """program = Runtime.get().load_program(cached_file(name, "executorch/model.pte"))
method = program.load_method("forward")"""
    imports = "from executorch.runtime import Runtime"
    return _exported_code(subject, imports, load, "(embedding,) = method.execute([pixels])  # one image at a time")


def _why_no_optimum(subject: Subject) -> str | None:
    reason = _exported("onnx")(subject)
    if reason != "":
        return reason
    if _trust_either(subject):
        return "it supports an earlier Transformers, for which the code in this student's folder was not written"
    if is_timm_processor(subject.student.processor):
        return "it supports an earlier Transformers, which was not tried with students of timm"
    return ""


def _optimum_code(subject: Subject) -> str:
    return f'''from optimum.onnxruntime import ORTModelForFeatureExtraction
from PIL import Image
from transformers import AutoImageProcessor

name = "{subject.name}"
model = ORTModelForFeatureExtraction.from_pretrained(name, subfolder="onnx", file_name="model.onnx")
processor = AutoImageProcessor.from_pretrained(name{_trust_processor(subject)})

{_image(subject)}
embedding = model(**processor(image, return_tensors="pt")).last_hidden_state  # (1, d), and no tokens'''


def _optimum_remark(subject: Subject, code: str) -> str:
    return (
        f"{_needs(code)}, in releases that Optimum supports; {_exported_space(subject, 'onnx')}. "
        f"Optimum knows no output of the name `embedding` and returns it as `last_hidden_state`."
    )


def _transformers_js_code(subject: Subject) -> str:
    return f'''import {{ pipeline }} from "@huggingface/transformers";

const name = "{subject.name}";
const extractor = await pipeline("image-feature-extraction", name, {{ dtype: "fp32" }});
const embedding = await extractor("photo.jpg"); // (1, d)'''


def _transformers_js_remark(subject: Subject, code: str) -> str:
    return (
        f"Needs `@huggingface/transformers`; {_exported_space(subject, 'onnx')}. It takes a name on the Hub; for a "
        f"folder, set `env.localModelPath` to the folder that contains it and `name` to the last part of its path. Its "
        f"resizing differs a little from that of Transformers."
    )


def _why_no_transformers_js(subject: Subject) -> str | None:
    reason = _exported("onnx")(subject)
    if reason == "" and is_timm_processor(subject.student.processor):
        return "it prepares images as `preprocessor_config.json` says, which students of timm do not have"
    return reason


def _exported_space(subject: Subject, kind: str) -> str:
    return _described_space(subject) if exported_with_head(subject.folder, kind) else "the student's own embedding"


def _exported_remark(kind: str) -> Callable[[Subject, str], str]:
    def remark(subject: Subject, code: str) -> str:
        needs = _needs(code, with_timm=is_timm_processor(subject.student.processor))
        return f"{needs}; {_exported_space(subject, kind)}."

    return remark


def renewed(card: str, subject: Subject) -> str:
    """The card with its section on use as of the files that are there now; its name and its branch stay."""
    named = re.search(r'(?m)^name = "(.*)"$', card)
    if named is None:
        return card
    branch = re.search(r'\bname, revision="([^"]*)"', card)
    section = f"## Use\n\n{_at_revision(usage(replace(subject, name=named[1])), branch and branch[1])}\n\n"
    return re.sub(r"(?ms)^## Use\n.*?(?=^## Training$)", lambda _: section, card, count=1)


LOADERS = [
    Loader("Transformers", _no_module, _transformers_code, _transformers_remark),
    Loader("Pipeline", _why_no_pipeline, _pipeline_code, _pipeline_remark),
    Loader("sentence-transformers", _why_no_sentence, _sentence_code, _sentence_remark),
    Loader("timm", _why_no_timm, _timm_code, _timm_remark),
    Loader("PyTorch", _only_module, _module_code, _module_remark),
    Loader("coss_hf", lambda subject: "", _own_code, _own_remark),
    Loader("Search by text", _no_text, _text_code, _text_remark),
    Loader("ONNX Runtime", _exported("onnx"), _onnx_code, _exported_remark("onnx")),
    Loader("Optimum", _why_no_optimum, _optimum_code, _optimum_remark),
    Loader("Transformers.js", _why_no_transformers_js, _transformers_js_code, _transformers_js_remark, "javascript"),
    Loader("OpenVINO", _exported("openvino"), _openvino_code, _exported_remark("openvino")),
    Loader("ExecuTorch", _exported("executorch"), _executorch_code, _exported_remark("executorch")),
]
