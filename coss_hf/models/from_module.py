"""A `Backbone` of any `nn.Module`: of timm, of torchvision, or of one's own."""

import itertools
import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel

from coss_hf.models.backbone import Backbone, evaluating
from coss_hf.models.loading import missing_weights
from coss_hf.models.modules import (
    ModuleConfig,
    ModuleNetwork,
    UnknownOutput,
    copy_sharing_tensors,
    module_name,
)
from coss_hf.utils.messages import flag, get_logger

logger = get_logger(__name__)

# Where torchvision's networks have their classifier.
CLASSIFIERS = ("fc", "classifier", "head", "heads")
CLASSES = 1000  # of torchvision's published weights
RESAMPLING = {name.lower(): value for name, value in Image.Resampling.__members__.items()}  # by timm's names, too


@dataclass
class InputDefaults:
    """What can be read off a module about the images that it takes; None for what cannot.

    Attributes:
        size: ``(h, w)`` in pixels.
        mean: of each channel, as fractions of 1.
        std: of each channel, as fractions of 1.
        resize: pixels of the shorter side before the central crop; None for a crop of the full shorter side.
        resample: how pixels are computed where an image is resized.
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: int | None = None
    resample: Image.Resampling = Image.Resampling.BICUBIC


def backbone_from_module(
    module: nn.Module,
    *,
    size: int | tuple[int, int] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    embedding: Callable | None = None,
    maps: Sequence[str] | None = None,
    pooling: str = "auto",
    teacher: Backbone | None = None,
    argument: str = "",
) -> Backbone:
    """See ``Backbone.from_module``.

    Args:
        teacher: source of size, mean and std where neither the caller nor the module gives them.
        argument: the command-line flag that errors name.
    """
    module = _unwrapped(module)
    size, mean, std = _checked(size, mean, std)
    if embedding is None and maps is None:
        network, classifier = _as_timm(module)
        if network is not None:
            _say_what_is_left_out(module, network.timm_model, argument)
            processor = _timm_processor(module, network.config, size, mean, std)
            backbone = Backbone(network, processor, pooling=pooling, argument=argument)
            backbone.classifier = classifier
            network.config.pretrained_cfg = backbone.processor.data_config
            return backbone
    defaults = read_defaults(module)
    classifier = None
    if embedding is None:
        full = module
        module, classifier = without_classifier(full)
        _say_what_is_left_out(full, module, argument)
    network = ModuleNetwork(module, embedding, maps, argument)
    processor, size = _processor(network, defaults, size, mean, std, teacher, argument)
    missing = _missing_inside(module)
    backbone = Backbone(network, processor, pooling=pooling, missing=missing, size=size, argument=argument)
    backbone.classifier = classifier
    if maps is not None:
        backbone.example(maps=True)  # names of submodules that give no maps are refused here
    return backbone


def _missing_inside(module: nn.Module) -> set[str]:
    """Names, in its ``ModuleNetwork``, of weights that no checkpoint of the networks of Transformers within it has.

    ``AutoModel`` draws the pooler that a classifier's checkpoint lacks, and gives its output like that of any other.
    """
    missing = set()
    inside: tuple[str, ...] = ()
    for path, part in module.named_modules():
        if isinstance(part, PreTrainedModel) and not f"{path}.".startswith(inside):
            inside += (f"{path}." if path else "",)
            start = ".".join(filter(None, ("module", path)))
            missing |= {f"{start}.{name}" for name in missing_weights(part, part.name_or_path)}
    return missing


def refuse_untrained(backbone: Backbone, argument: str) -> None:
    """Refuse a backbone as a teacher whose module has new layers that were not trained since it was made.

    Raises:
        ValueError: names of their weights, and the remedy.
    """
    if backbone.untrained:
        backbone.untrained = backbone.untrained & _missing_inside(backbone.model.module)
    backbone.check_trained(argument)


def load_module(
    name: str,
    weights: str,
    config: ModuleConfig,
    module,
    processor,
    *,
    pooling: str = "auto",
    size: int | None = None,
    argument: str = "",
) -> Backbone:
    """A backbone of a student that was saved from a plain module.

    Args:
        name: folder, or name on the Hub.
        weights: its ``model.safetensors``.
        config: its ``config.json``.
        module: a network that is built as the trained one was, its constructor, or a ``Backbone`` of it.
        processor: its image processor.
        pooling: default: that of the training.
        size: side of the input in pixels; default: that of the training.
        argument: the command-line flag that errors name.

    Raises:
        ValueError: no such module, or one that does not fit the weights.
    """
    if not isinstance(module, (nn.Module, Backbone)) and callable(module):
        module = module()
    network = None
    if isinstance(module, Backbone):
        network = module.model
    elif isinstance(module, nn.Module):
        network = ModuleNetwork(without_classifier(_unwrapped(module))[0], argument=argument)
    if not isinstance(network, ModuleNetwork):
        raise ValueError(
            f"module is a {type(module).__name__}; give an nn.Module, a function that builds one, or a Backbone of one."
        )
    function = getattr(config, "embedding_function", None)
    if function != network.config.embedding_function:
        raise ValueError(
            f"module: {name} was trained with embedding={function}, not {network.config.embedding_function}; give "
            f"module=Backbone.from_module(module, embedding=...) with the function that it was trained with."
        )
    network.load_weights(weights)
    network.config.teacher_space = getattr(config, "teacher_space", None)
    network.name_or_path = name
    if pooling == "auto":
        pooling = getattr(config, "embedding_pooling", "auto")
    return Backbone(network, processor, pooling=pooling, size=size, argument=argument)


def read_defaults(module: nn.Module) -> InputDefaults:
    """Size, mean and std of a module, from timm's configuration, torchvision's published weights, or its attributes."""
    cfg = _timm_cfg(module)
    if cfg:
        found = InputDefaults(tuple(cfg["input_size"][1:]), tuple(cfg["mean"]), tuple(cfg["std"]))
        if cfg.get("crop_pct") and cfg.get("crop_mode", "center") == "center":
            found.resize = math.floor(max(found.size) / cfg["crop_pct"])
        found.resample = RESAMPLING.get(cfg.get("interpolation"), found.resample)
        return found
    if _is_of_torchvision(module):
        return _torchvision_defaults(module)
    size = getattr(module, "image_size", None)
    size = (size, size) if isinstance(size, int) else size
    found = InputDefaults()
    if isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(side, int) for side in size):
        found.size = tuple(size)
    for name in ("mean", "std"):  # as open_clip's towers keep them
        value = getattr(module, f"image_{name}", None)
        if isinstance(value, (tuple, list)) and len(value) == 3:
            setattr(found, name, tuple(map(float, value)))
    return found


def without_classifier(module: nn.Module) -> tuple[nn.Module, nn.Linear | None]:
    """A network of timm or torchvision without the classifier of its classes, and that; any other module as it is.

    The network shares its parameters with ``module``, which keeps its classifier. Dropout in front of the classifier
    goes with it, and so do auxiliary classifiers.
    """
    if _is_of_timm(module):
        layer = module.get_classifier()
        module = copy_sharing_tensors(module)
        module.reset_classifier(0)
        return module, layer if isinstance(layer, nn.Linear) else None
    if not _is_of_torchvision(module):
        return module, None
    path = _classifier_path(module)
    if path is None:
        return module, None
    module = copy_sharing_tensors(module)
    layer = module.get_submodule(path)
    module.set_submodule(path, nn.Identity())
    parent, _, name = path.rpartition(".")
    for before in (f"{parent}.{int(name) - 1}" if name.isdigit() else "", "dropout"):
        if isinstance(dict(module.named_modules()).get(before), nn.Dropout):
            module.set_submodule(before, nn.Identity())
    if hasattr(module, "aux_logits"):
        module.aux_logits = False
    return module, layer if isinstance(layer, nn.Linear) else None


def _say_what_is_left_out(full: nn.Module, kept: nn.Module, argument: str) -> None:
    """Log the layers of a network that are missing in another: one may be the user's own, and meant to stay.

    Those of the published classes are told quietly, and a teacher's, too: methods of logits read its classifier.
    """
    names = {name for name, _ in kept.named_parameters()}
    layers = {name.rpartition(".")[0] for name, _ in full.named_parameters() if name not in names} - {""}
    if layers:
        shown = [f"{name}: {_in_one_line(full.get_submodule(name))}" for name in sorted(layers)]
        classes = _timm_cfg(full).get("num_classes") or CLASSES
        published = all(_outputs(full.get_submodule(name)) in (classes, None) for name in layers)
        loud = argument != "teacher" and not published and os.environ.get("RANK", "0") == "0"
        logger.log(
            logging.WARNING if loud else logging.INFO,
            "%s=%s: its classifier is left out (%s), and the embedding is what it reads. Where this layer makes the "
            "embedding, keep it by Backbone.from_module(module, embedding=lambda output: output).",
            *(flag(argument), module_name(full), "; ".join(shown)),
        )


def _outputs(layer: nn.Module) -> int | None:
    return getattr(layer, "out_features", getattr(layer, "out_channels", None))


def _in_one_line(layer: nn.Module) -> str:
    text = repr(layer)
    return type(layer).__name__ if "\n" in text else text


def _classifier_path(module: nn.Module) -> str | None:
    for name in CLASSIFIERS:
        part = getattr(module, name, None)
        if isinstance(part, nn.Module):
            for kind in (nn.Linear, nn.Conv2d):  # SqueezeNet classifies by a convolution
                layers = [path for path, layer in part.named_modules() if isinstance(layer, kind)]
                if layers:
                    return ".".join(filter(None, (name, layers[-1])))
    return None


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module inside what ``torch.compile`` and data parallelism put around it."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _unwrapped(module.module)
    inner = getattr(module, "_orig_mod", None)
    return _unwrapped(inner) if isinstance(inner, nn.Module) else module


def _checked(size, mean, std) -> tuple[tuple[int, int] | None, tuple | None, tuple | None]:
    """Size, mean and std in one form each, None where they were not given."""
    if isinstance(size, int) and not isinstance(size, bool):
        size = (size, size)
    if size is not None and not (len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)):
        raise ValueError(f"size={size}: give the side of the input in pixels, or (height, width).")
    channels = []
    for name, value in (("mean", mean), ("std", std)):
        if value is not None:
            value = [value] * 3 if isinstance(value, (int, float)) else list(value)
            least = 0 if name == "mean" else 1e-6
            if len(value) != 3 or not all(least <= float(one) <= 1 for one in value):
                raise ValueError(
                    f"{name}={value}: give a number for each of the 3 channels, as fractions of 1 (0.5, not 127.5)."
                )
            value = tuple(map(float, value))
        channels.append(value)
    return None if size is None else tuple(size), *channels


def _processor(
    network: ModuleNetwork, defaults: InputDefaults, size, mean, std, teacher: Backbone | None, argument: str
) -> tuple:
    """The image processor of a module, and the size to set it to; None where it has that already."""
    resize = defaults.resize if size in (None, defaults.size) else None
    size = size or defaults.size
    mean = mean or defaults.mean
    std = std or defaults.std
    if teacher is not None and (mean is None or std is None or size is None):
        given = {"size": size, "mean": mean, "std": std}
        taken = [name for name, value in given.items() if value is None]
        if mean is None and std is None and (size is None or size[0] == size[1]):
            logger.warning(
                "%s=%s: %s as the teacher's; Backbone.from_module(module, size=, mean=, std=) gives others.",
                *(flag(argument), network.name_or_path, " and ".join(taken)),
            )
            return teacher.processor, None if size in (None, teacher.size) else size[0]
        size = size or teacher.size
    missing = [name for name, value in (("size", size), ("mean", mean), ("std", std)) if value is None]
    if missing:
        _check_output(network, size or (224, 224))
        listed = ", ".join(f"{name}=" for name in missing)
        raise ValueError(
            f"{flag(argument)}={network.name_or_path}: {' and '.join(missing)} of its input cannot be read off this "
            f"module; give them by Backbone.from_module(module, {listed}), as it was trained: size in pixels, mean and "
            f"std of each channel as fractions of 1."
        )
    from transformers import BitImageProcessor  # imports torchvision's transforms

    height, width = size
    return BitImageProcessor(
        size={"shortest_edge": resize or max(height, width)},
        crop_size={"height": height, "width": width},
        resample=defaults.resample,
        image_mean=list(mean),
        image_std=list(std),
    ), None


def _check_output(network: ModuleNetwork, size: tuple[int, int]) -> None:
    """Refuse an output of no known form, where the network takes images of this size; else do nothing."""
    first = next(network.parameters())
    try:
        with torch.no_grad(), evaluating(network):
            network(torch.zeros(2, 3, *size, dtype=first.dtype, device=first.device))
    except UnknownOutput:
        raise
    except Exception as error:  # each network refuses images in its own way
        logger.debug("%s refuses images of %s: %s", network.name_or_path, size, error)


# ---- timm ----


def _timm_cfg(module: nn.Module) -> dict:
    """timm's description of a network of its own, with the size that it was built for; empty for any other."""
    cfg = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
    cfg = cfg.to_dict() if hasattr(cfg, "to_dict") else cfg
    if not isinstance(cfg, dict) or not {"input_size", "mean", "std"} <= {*cfg}:
        return {}
    size = getattr(getattr(module, "patch_embed", None), "img_size", None)
    if isinstance(size, (tuple, list)) and len(size) == 2:
        cfg = {**cfg, "input_size": (cfg["input_size"][0], *size)}
    return dict(cfg)


def _is_of_timm(module: nn.Module) -> bool:
    return bool(_timm_cfg(module)) and hasattr(module, "forward_head") and hasattr(module, "reset_classifier")


def _as_timm(module: nn.Module) -> tuple[nn.Module | None, nn.Linear | None]:
    """A network of timm as Transformers builds it by its name, without classifier, and that; None for any other.

    Its parameters are those of ``module``, which keeps its classifier. None as well where ``timm.create_model`` was
    given what cannot be read off the network: it is a plain module then.
    """
    cfg = _timm_cfg(module)
    if not cfg.get("architecture") or not _is_of_timm(module):
        return None, None
    from transformers import TimmWrapperConfig, TimmWrapperModel  # import timm

    own, classifier = without_classifier(module)
    for model_args in _timm_arguments(module):
        entries = {"architecture": cfg["architecture"], "pretrained_cfg": dict(cfg), "model_args": model_args or None}
        config = TimmWrapperConfig.from_dict({**entries, "num_classes": cfg.get("num_classes") or CLASSES})
        try:
            with torch.device("meta"):
                network = TimmWrapperModel(config)
        except Exception as error:  # each architecture checks its arguments in its own way
            logger.debug("%s cannot be built with %s: %s", cfg["architecture"], model_args, error)
            continue
        if str(network.timm_model) == str(own) and _shapes(network.timm_model) == _shapes(own):
            network.timm_model = own
            network.train(module.training)
            network.name_or_path = module_name(module)
            return network, classifier
    return None, None


def _timm_arguments(module: nn.Module) -> list[dict]:
    """Arguments that ``timm.create_model`` may have been given, as far as the network shows them; the fewest first."""
    shown = {}
    size = getattr(getattr(module, "patch_embed", None), "img_size", None)
    if isinstance(size, (tuple, list)):
        shown["img_size"] = tuple(size)
    if isinstance(getattr(module, "global_pool", None), str):
        shown["global_pool"] = module.global_pool
    rates = [getattr(part, "drop_prob", 0) for part in module.modules() if type(part).__name__ == "DropPath"]
    if any(rates):
        shown["drop_path_rate"] = max(rates)
    counts = range(len(shown) + 1)
    return [dict(chosen) for count in counts for chosen in itertools.combinations(shown.items(), count)]


def _shapes(module: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, value.shape) for name, value in module.state_dict().items()]


def _timm_processor(module: nn.Module, config, size, mean, std):
    from transformers import TimmWrapperImageProcessor  # imports timm

    cfg = _timm_cfg(module)
    given = {"mean": mean, "std": std, "input_size": None if size is None else (3, *size)}
    cfg |= {key: value for key, value in given.items() if value is not None}
    if "input_size" in config.pretrained_cfg and size is not None:
        cfg.pop("test_input_size", None)
    return TimmWrapperImageProcessor(pretrained_cfg=cfg, architecture=config.architecture)


# ---- torchvision ----


def _is_of_torchvision(module: nn.Module) -> bool:
    """Whether it is a network for images of torchvision: not of boxes or videos, nor one with a forward of its own."""
    source = _source_of(module)
    others = ("detection", "segmentation", "video", "optical_flow", "quantization")
    return source.startswith("torchvision.models.") and source.split(".")[2] not in others


def _torchvision_defaults(module: nn.Module) -> InputDefaults:
    """The input of torchvision's published weights of this network, told by its number of parameters.

    Of another number of classes or none, too. For a network that was never published, what all weights of its family
    have in common.
    """
    from torchvision import models
    from torchvision.transforms import InterpolationMode

    file = _source_of(module)
    builders = [name for name in models.list_models(module=models) if _file_of(models, name) == file]
    weights = [entry for name in builders for entry in models.get_model_weights(name)]
    path = _classifier_path(module)
    layer = None if path is None else module.get_submodule(path)
    count = sum(parameter.numel() for parameter in module.parameters())
    count -= 0 if layer is None else sum(parameter.numel() for parameter in layer.parameters())
    # A classifier of d inputs has (d + 1) * 1000 or d * 1000 parameters.
    published = [entry for entry in weights if _is_classifier(entry.meta.get("num_params", 0) - count, layer)]
    presets = [entry.transforms() for entry in published or weights]
    found = InputDefaults()
    found.mean = _common(tuple(preset.mean) for preset in presets)
    found.std = _common(tuple(preset.std) for preset in presets)
    size = getattr(module, "image_size", None) or _common(preset.crop_size[0] for preset in presets)
    if size is not None:
        found.size = (size, size)
    for preset in presets:  # the last one is of the newest weights
        if size == preset.crop_size[0]:
            found.resize = preset.resize_size[0]
            is_bicubic = preset.interpolation == InterpolationMode.BICUBIC
            found.resample = Image.Resampling.BICUBIC if is_bicubic else Image.Resampling.BILINEAR
    if not published:
        logger.warning(
            "%s is none of torchvision's published networks: the input of its family is taken (size %s, mean %s, std "
            "%s); Backbone.from_module(module, size=, mean=, std=) gives another.",
            *(module_name(module), found.size, found.mean, found.std),
        )
    return found


def torchvision_name(module: nn.Module) -> str | None:
    """The function of ``torchvision.models`` that builds a network without classifier; None where there is none."""
    if not _is_of_torchvision(module):
        return None
    from torchvision import models

    file = _source_of(module)
    count = sum(parameter.numel() for parameter in module.parameters())
    for name in models.list_models(module=models):
        if _file_of(models, name) != file:
            continue
        published = [entry.meta.get("num_params", 0) for entry in models.get_model_weights(name)]
        if not any(_is_classifier(parameters - count, None) for parameters in published):
            continue  # to build each takes a second
        with torch.device("meta"):
            built, _ = without_classifier(models.get_model_builder(name)())
        if str(built) == str(module) and _shapes(built) == _shapes(module) and _settings(built) == _settings(module):
            return name
    return None


def _settings(module: nn.Module) -> list[dict]:
    """Plain attributes of each part of a module, which its ``repr`` need not show: Inception's ``transform_input``."""
    plain = (bool, int, float, str, tuple, type(None))
    return [
        {key: value for key, value in vars(part).items() if isinstance(value, plain) and key != "training"}
        for part in module.modules()
    ]


def removal_of_classifier(module: nn.Module) -> str:
    """The statement that removes the classifier of ``module`` as ``without_classifier`` did; empty where it did not."""
    if _is_of_timm(module):
        return "module.reset_classifier(0)"
    if not _is_of_torchvision(module):
        return ""
    for name in CLASSIFIERS:
        part = getattr(module, name, None)
        layers = part.named_modules() if isinstance(part, nn.Module) else ()
        removed = [path for path, layer in layers if isinstance(layer, nn.Identity)]
        if removed:
            path = ".".join(filter(None, (name, removed[-1])))
            place = re.sub(r"\.(\d+)", r"[\1]", path)
            return f"module.{place} = torch.nn.Identity()"
    return ""


def _source_of(module: nn.Module) -> str:
    """The Python module of its forward pass; empty for compiled code."""
    return getattr(getattr(type(module), "forward", None), "__module__", None) or ""


def _file_of(models, name: str) -> str:
    return models.get_model_builder(name).__module__


def _is_classifier(parameters: int, layer: nn.Module | None) -> bool:
    """Whether it is the number of parameters of a classifier of ``CLASSES`` classes, on the inputs of ``layer``."""
    inputs = getattr(layer, "in_features", None) or getattr(layer, "in_channels", None)
    if inputs is not None:
        return parameters in (inputs * CLASSES, (inputs + 1) * CLASSES)
    return parameters > 0 and parameters % CLASSES == 0


def _common(values):
    """The value that all have; None where they differ."""
    found = {*values}
    return found.pop() if len(found) == 1 else None
