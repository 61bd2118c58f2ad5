"""Teachers and students by name: from the Hub, a folder, or random weights of an architecture."""

import difflib
import json
import logging
from pathlib import Path

import torch
from huggingface_hub import HfApi, scan_cache_dir
from huggingface_hub.errors import CacheNotFound, HfHubHTTPError, OfflineModeIsEnabled
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from coss_hf.backbones import Backbone
from coss_hf.models import CIFAR_NETWORKS, cifar_config

logger = logging.getLogger(__name__)

INITS = ("pretrained", "random", "teacher_layers")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_backbone(
    name: str,
    *,
    argument: str = "model",
    pooling: str = "auto",
    size: int | None = None,
    interpolate_pos_encoding: bool = False,
    revision: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    init: str = "pretrained",
    config_overrides: dict | None = None,
    teacher: Backbone | None = None,
) -> Backbone:
    """Loads a vision network and finds its pooling, dimension and input size.

    Args:
        name: Hub name or folder. With ``init="random"`` also a CIFAR network of this package (``resnet20``) or a
            model type of Transformers (``vit``, ``timm_wrapper``).
        argument: the command-line flag that errors name.
        pooling: ``auto``, ``cls``, ``mean``, ``pooler`` or ``gap``.
        size: side of the input in pixels; by default the image processor's.
        interpolate_pos_encoding: stretch a transformer's position embeddings to ``size``.
        revision: branch, tag or commit on the Hub.
        dtype: of the weights: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.
        trust_remote_code: allow a checkpoint to run its own code.
        attn_implementation: ``eager``, ``sdpa``, ``flash_attention_2``.
        init: ``pretrained``; ``random``; ``teacher_layers``: every n-th layer of ``teacher``, a transformer.
        config_overrides: entries of the configuration to change, for ``random`` and ``teacher_layers``.
        teacher: source of layers, and of the image processor where ``name`` has none.

    Raises:
        ValueError: an unknown name (similar ones are suggested), a network that is not of images, a checkpoint that
            lacks needed weights, a size or pooling it cannot do.
    """
    if init not in INITS:
        raise ValueError(f"--{argument}_init={init!r} is unknown: choose one of {', '.join(INITS)}.")
    if config_overrides and init == "pretrained":
        raise ValueError(
            f"--{argument}_config_overrides={config_overrides}: a pretrained checkpoint has its own shape; "
            f"use --{argument}_init random (or teacher_layers)."
        )
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    missing = set()
    if init == "teacher_layers":
        model = _teacher_layers(teacher, config_overrides or {}, argument)
    elif init == "random":
        config = _images_only(_override(_architecture(name, argument, hub), config_overrides or {}, argument), argument)
        model = AutoModel.from_config(
            config, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code, dtype=torch.float32
        )
        model.name_or_path = name
    else:
        config = _images_only(_config(name, argument, hub), argument)
        try:
            model, info = AutoModel.from_pretrained(
                name,
                config=config,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                attn_implementation=attn_implementation,
                output_loading_info=True,
                **hub,
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"--{argument}={name}: cannot be loaded as a vision network: {_first_line(error)}") from error
        missing = set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}
    if model.main_input_name != "pixel_values":
        raise ValueError(f"--{argument}={name}: {type(model).__name__} reads {model.main_input_name}, not images.")
    return Backbone(
        model,
        _processor(name, model, init, teacher, argument, hub),
        pooling=pooling,
        missing=missing,
        size=size,
        interpolate_pos_encoding=interpolate_pos_encoding,
        argument=argument,
    )


def _config(name: str, argument: str, hub: dict):
    try:
        return AutoConfig.from_pretrained(name, **hub)
    except (OSError, ValueError, HfHubHTTPError, json.JSONDecodeError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"--{argument}={name} brings code of its own; read it, then allow it with --trust_remote_code."
            ) from error
        hint = suggestions(name, kind="model", known=list(CIFAR_NETWORKS))
        hint = f" Did you mean {' or '.join(hint)}?" if hint else ""
        raise ValueError(
            f"--{argument}={name} is not a folder with a config.json nor a model found on the Hub "
            f"({_first_line(error)}).{hint}"
        ) from error


def _architecture(name: str, argument: str, hub: dict):
    """Configuration for random weights: a folder, a Hub name, a CIFAR network or a model type."""
    if not Path(name).exists():
        if name in CIFAR_NETWORKS:
            return cifar_config(name)
        if name in CONFIG_MAPPING:
            return CONFIG_MAPPING[name]()
    return _config(name, argument, hub)


def _images_only(config, argument: str):
    """The vision tower of a two-tower configuration; errors for networks of text or sound."""
    config = getattr(config, "vision_config", None) or config
    mapped = type(config) in AutoModel._model_mapping.keys()
    model_class = AutoModel._model_mapping[type(config)] if mapped else None
    if isinstance(model_class, (list, tuple)):
        model_class = model_class[0]
    if model_class is not None and model_class.main_input_name != "pixel_values":
        raise ValueError(
            f"--{argument}: {model_class.__name__} ({config.model_type}) reads {model_class.main_input_name}, not "
            f"images; give a vision backbone such as a ViT, DINOv2, ResNet or ConvNeXt."
        )
    return config


def _override(config, overrides: dict, argument: str):
    known = config.to_dict()
    for key in overrides:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=3)
            raise ValueError(
                f"--{argument}_config_overrides: {type(config).__name__} has no entry {key!r}"
                + (f"; did you mean {' or '.join(close)}?" if close else ".")
            )
    # Built anew, so that entries derived from others follow and are checked.
    return type(config).from_dict({**known, **overrides})


def _teacher_layers(teacher: Backbone | None, overrides: dict, argument: str) -> PreTrainedModel:
    """A student of every n-th layer of a transformer teacher, embeddings and norms included."""
    if teacher is None:
        raise ValueError(f"--{argument}_init=teacher_layers needs a teacher to take layers from.")
    config = teacher.model.config
    total = getattr(config, "num_hidden_layers", None)
    stacks = [
        (path, module)
        for path, module in teacher.model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == total
    ]
    if not total or len(stacks) != 1:
        raise ValueError(
            f"--{argument}_init=teacher_layers: {teacher.name} ({config.model_type}) is no plain stack of transformer "
            f"layers; use --{argument}_init random or pretrained."
        )
    if set(overrides) - {"num_hidden_layers"}:
        raise ValueError(
            f"--{argument}_config_overrides={overrides}: with teacher_layers only num_hidden_layers can differ."
        )
    kept = int(overrides.get("num_hidden_layers", max(total // 2, 1)))
    if not 1 <= kept <= total:
        raise ValueError(f"--{argument}_config_overrides: num_hidden_layers={kept} must lie in 1..{total}.")
    student = type(teacher.model)(type(config).from_dict({**config.to_dict(), "num_hidden_layers": kept}))
    chosen = torch.linspace(0, total - 1, kept).round().int().tolist()
    prefix = stacks[0][0] + "."
    state = {}
    for key, tensor in teacher.model.state_dict().items():
        if key.startswith(prefix):
            layer, rest = key.removeprefix(prefix).split(".", 1)
            for position in (p for p, source in enumerate(chosen) if source == int(layer)):
                state[f"{prefix}{position}.{rest}"] = tensor.float()
        else:
            state[key] = tensor.float()
    student.load_state_dict(state)
    student.name_or_path = f"{teacher.name}, layers {chosen}"
    logger.info("student takes layers %s of the teacher's %d", chosen, total)
    return student


def _processor(name: str, model: PreTrainedModel, init: str, teacher: Backbone | None, argument: str, hub: dict):
    timm_model = getattr(model, "timm_model", None)
    if init == "teacher_layers":
        return teacher.processor
    if timm_model is not None and not getattr(model.config, "pretrained_cfg", None):
        # timm keeps pre-processing in the network's configuration, from where AutoImageProcessor reads it.
        keys = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
        model.config.pretrained_cfg = {key: timm_model.pretrained_cfg[key] for key in keys}
        from transformers import TimmWrapperImageProcessor

        return TimmWrapperImageProcessor(model.config.pretrained_cfg, architecture=model.config.architecture)
    try:
        if init == "random" and not Path(name).exists() and (name in CIFAR_NETWORKS or name in CONFIG_MAPPING):
            raise OSError(f"{name} is an architecture, not a checkpoint")
        return AutoImageProcessor.from_pretrained(name, **hub)
    except (OSError, ValueError) as error:
        if teacher is not None:
            logger.info("%s has no image processor: the teacher's is used", name)
            return teacher.processor
        raise ValueError(
            f"--{argument}={name}: no image processor beside the weights; add its preprocessor_config.json "
            f"({_first_line(error)})."
        ) from error


def suggestions(name: str, *, kind: str, known: list[str] = (), limit: int = 3) -> list[str]:
    """Full names close to ``name``: among ``known``, folders beside it, the local cache, and the Hub if reachable.

    Args:
        name: what was asked for.
        kind: ``model`` or ``dataset``.
    """
    path = Path(name)
    candidates = list(known)
    if path.parent.is_dir() and (path.parent != Path(".") or "/" not in name):
        candidates += [str(path.parent / entry.name) for entry in path.parent.iterdir() if entry.is_dir()]
    try:
        candidates += [repo.repo_id for repo in scan_cache_dir().repos if repo.repo_type == kind]
    except CacheNotFound:
        pass
    try:
        search = HfApi().list_models if kind == "model" else HfApi().list_datasets
        candidates += [repo.id for repo in search(search=path.name, limit=20)]
    except (OSError, HfHubHTTPError, OfflineModeIsEnabled, RuntimeError):
        pass  # no network: what is here has to do
    except Exception as error:  # huggingface_hub's HTTP library, and with it its errors, changes between versions
        logger.debug("no suggestions from the Hub: %s", error)
    by_tail = {candidate.rsplit("/", 1)[-1].lower(): candidate for candidate in reversed(candidates)}
    close = difflib.get_close_matches(name, candidates, n=limit, cutoff=0.6)
    close += [by_tail[tail] for tail in difflib.get_close_matches(path.name.lower(), by_tail, n=limit, cutoff=0.6)]
    return list(dict.fromkeys(close))[:limit]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
