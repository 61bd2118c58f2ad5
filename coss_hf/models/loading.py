"""Teachers and students by name: from the Hub, a folder, or random weights of an architecture."""

import contextlib
import copy
import difflib
import logging
import re
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging

from coss_hf.models.backbone import Backbone, backbone_classes
from coss_hf.models.cifar.registry import CIFAR_NETWORKS, cifar_config
from coss_hf.models.files import find_file
from coss_hf.models.image_processor import is_timm_processor
from coss_hf.models.initialization import build_from_layers, rebuild_config
from coss_hf.models.modules import WEIGHTS_FILE, ModuleConfig
from coss_hf.models.revision import commit_in_memory, commit_of
from coss_hf.models.towers import check_space, find_tower, vision_config_of, without_shared_space
from coss_hf.utils.hub_lookup import cached_names, search, similar_names
from coss_hf.utils.messages import did_you_mean, first_line, flag, get_logger, parameter_names
from coss_hf.utils.packages import MissingPackage, check_extra

logger = get_logger(__name__)

INITS = ("pretrained", "random", "teacher_layers")
# Where Transformers keeps an image processor: by itself, or in a processor of images and text.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
# Towers that AutoModel does not know alone, and the same network under a name that it does know.
SAME_TOWER = {"altclip_vision_model": "clip_vision_model", "metaclip_2_vision_model": "clip_vision_model"}
DTYPES = ("auto", "float32", "bfloat16", "float16")


@parameter_names()
def load_backbone(
    name: str,
    *,
    argument: str = "",
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
    module=None,
    space: str = "tower",
) -> Backbone:
    """Load a vision network and find its pooling, dimension and input size.

    Args:
        name: Hub name or folder. With ``init="random"`` also a CIFAR network of this package (``resnet20``) or a
            model type of Transformers (``vit``, ``timm_wrapper``).
        argument: the argument that errors name, such as ``teacher``.
        pooling: ``auto``, ``cls``, ``mean``, ``pooler`` or ``gap``.
        size: side of the input in pixels; by default the image processor's.
        interpolate_pos_encoding: whether to stretch a transformer's position embeddings to ``size``.
        revision: branch, tag or commit on the Hub.
        dtype: data type of the weights: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.
        trust_remote_code: whether a checkpoint may run its own code.
        attn_implementation: ``eager``, ``sdpa``, ``flash_attention_2``.
        init: ``pretrained``; ``random``; ``teacher_layers``: every n-th layer of ``teacher``, a transformer.
        config_overrides: entries of the configuration to change, for ``random`` and ``teacher_layers``.
        teacher: source of layers, and of the image processor where ``name`` has none.
        module: for a student that was saved from a plain ``nn.Module``: a network that is built as the trained one was,
            its constructor, or a ``Backbone`` of it.
        space: of a teacher of images and text, such as CLIP: ``tower``, the embedding of the vision tower; or
            ``projected``, that in the space which images share with text.

    Raises:
        ValueError: an unknown name (similar ones are suggested), a network that reads no images, a checkpoint that
            lacks needed weights, a size, pooling or space that the network does not support.
    """
    _check_start(argument, init, config_overrides, space, module)
    check_space(space, pooling, argument)
    options = {"dtype": _dtype(dtype, argument), "attn_implementation": attn_implementation}
    if init != "pretrained" and dtype == "auto":
        options["dtype"] = torch.float32
    is_checkpoint = init != "teacher_layers" and not (init == "random" and _is_architecture(name))
    hub = _hub_arguments(name, argument, revision, trust_remote_code) if is_checkpoint else {}
    if module is not None:
        backbone = _load_saved_module(name, argument, hub, module, pooling, size)
        backbone.revision = commit_of(name, revision)
        return backbone
    if space == "projected":
        model, missing = _load_with_projection(name, argument, hub, options)
    elif init == "pretrained":
        model, missing = _load_pretrained(name, argument, hub, options)
    elif init == "random":
        model = _draw(
            name, config_overrides or {}, argument, hub if is_checkpoint else None, trust_remote_code, options
        )
        missing = set()
    else:
        model, missing = build_from_layers(teacher, config_overrides or {}, options, argument)
    if init == "teacher_layers":
        processor = teacher.processor
    else:
        processor = find_processor(model, teacher, argument, hub)
    if argument == "student" and not backbone_classes(model.config) and not getattr(model.config, "auto_map", None):
        raise ValueError(
            f"{flag(argument)}={name}: AutoModel does not load a {type(model).__name__} alone, so a student of this "
            f"kind could not be loaded again; give another student (it can be a teacher)."
        )
    backbone = Backbone(
        model,
        processor,
        pooling=pooling,
        missing=missing,
        size=size,
        interpolate_pos_encoding=interpolate_pos_encoding,
        argument=argument,
        space=space,
    )
    backbone.checkpoint = name if init == "pretrained" else None
    backbone.revision = commit_of(name, revision) if init == "pretrained" else None
    if init == "pretrained" and backbone.space is not None:
        backbone.has_texts |= vision_config_of(_load_config(name, argument, hub)) is not None
    if is_timm_processor(backbone.processor):
        # timm's processors are saved in the network's configuration, not next to it.
        own = getattr(model.config, "pretrained_cfg", None) or {}
        model.config.pretrained_cfg = {**own, **backbone.processor.data_config}
    return backbone


def _check_start(argument: str, init: str, config_overrides: dict | None, space: str, module) -> None:
    """Refuse an unknown start of a network, and options that do not go with it."""
    if init not in INITS:
        raise ValueError(f"{flag(argument, 'init')}={init!r} is unknown: choose one of {', '.join(INITS)}.")
    if config_overrides and init == "pretrained":
        raise ValueError(
            f"{flag(argument, 'config_overrides')}={config_overrides}: a pretrained checkpoint has its own shape; "
            f"use {flag(argument, 'init')} random (or teacher_layers)."
        )
    if space == "projected" and (argument == "student" or module is not None or init != "pretrained"):
        raise ValueError(
            f"{flag(argument, 'space')}=projected is for the checkpoint of a teacher of images and text, such as CLIP "
            f"or SigLIP: a student learns that space by a head, and a plain module has no projection; leave it out."
        )


def _draw(
    name: str, overrides: dict, argument: str, hub: dict | None, trust_remote_code: bool, options: dict
) -> PreTrainedModel:
    """A network of an architecture at random weights; ``hub`` where a checkpoint names the architecture."""
    config = _architecture_config(name) if hub is None else _load_config(name, argument, hub)
    _check_packages(config, f"{flag(argument)}={name}")
    if hub is None and config.model_type == "timm_wrapper" and "architecture" not in overrides:
        raise ValueError(
            f"{flag(argument)}={name}: which of timm's networks? Give {flag(argument, 'config_overrides')} "
            f"architecture=resnet18, or another one of timm.list_models()."
        )
    config = rebuild_config(_vision_config(config, argument), overrides, argument)
    model = _build(name, config, overrides, argument, {"trust_remote_code": trust_remote_code, **options})
    model.name_or_path = name
    return model


def _build(name: str, config, overrides: dict, argument: str, options: dict) -> PreTrainedModel:
    """A network at random weights; values that its code refuses are those of ``overrides``, if there are any."""
    try:
        return AutoModel.from_config(config, **options)
    except Exception as error:  # each architecture checks its values in its own way
        given = flag(argument, "config_overrides") + f"={overrides}" if overrides else f"{flag(argument)}={name}"
        hint = ""
        if config.model_type == "timm_wrapper":
            import timm

            close = difflib.get_close_matches(str(config.architecture), timm.list_models(), n=3)
            if config.architecture not in close:
                hint = did_you_mean(f"architecture={found}" for found in close)
        raise ValueError(
            f"{given}: {type(config).__name__} cannot be built so ({first_line(error)}); correct the values.{hint}"
        ) from error


def has_own_code(config) -> bool:
    """Whether a network's code comes with its checkpoint, so that loading it needs ``trust_remote_code``."""
    packages = ("coss_hf", "transformers")
    return bool(getattr(config, "auto_map", None)) and type(config).__module__.partition(".")[0] not in packages


def load_network(name: str, space: str = "tower", trust_remote_code: bool = False) -> tuple[PreTrainedModel, set[str]]:
    """The backbone of a checkpoint, without classifier or text tower, and the names of weights that it lacks.

    Args:
        name: Hub name or folder.
        space: ``projected`` to load the text tower, too, and what leads to the space of both.
        trust_remote_code: whether a checkpoint may run its own code.
    """
    load = _load_pretrained if space == "tower" else _load_with_projection
    return load(name, "", _hub_arguments(name, "", None, trust_remote_code), {"dtype": torch.float32})


def _load_saved_module(name: str, argument: str, hub: dict, module, pooling: str, size: int | None) -> Backbone:
    from coss_hf.models.from_module import load_module  # of plain modules alone

    config = _load_config(name, argument, hub)
    if not isinstance(config, ModuleConfig):
        raise ValueError(
            f"module: {name} was not saved from a plain nn.Module ({config.model_type}) and is loaded by its name "
            f"alone; leave module out."
        )
    processor = _load_processor(name, argument, hub, PROCESSOR_FILES[0])
    options = {key: value for key, value in hub.items() if key != "trust_remote_code"}
    try:
        weights = cached_file(name, WEIGHTS_FILE, **options)
    except OSError as error:
        raise ValueError(
            f"{flag(argument)}={name}: its {WEIGHTS_FILE} cannot be found ({first_line(error)}); give a complete "
            f"folder."
        ) from error
    return load_module(name, weights, config, module, processor, pooling=pooling, size=size, argument=argument)


def _load_pretrained(name: str, argument: str, hub: dict, options: dict) -> tuple[PreTrainedModel, set[str]]:
    given = _load_config(name, argument, hub)
    if isinstance(given, ModuleConfig):
        function = getattr(given, "embedding_function", None)
        built = f"Backbone.from_module(..., embedding={function})" if function else "..."
        raise ValueError(
            f"{flag(argument)}={name} was saved from a plain nn.Module ({given.architecture}), which cannot be built "
            f"by its name: load it in Python by `coss_hf.Student.from_pretrained({name!r}, module={built})`, or by "
            f"`coss_hf.load_backbone` with the same two, with a module that is built as the trained one was."
        )
    config = _vision_config(given, argument)
    tower = vision_config_of(given)
    try:
        # `Backbone` checks the weights that the embedding needs, and reports those itself.
        with quiet_loading():
            if tower is None or _loads_alone(tower):
                model, info = AutoModel.from_pretrained(name, config=config, output_loading_info=True, **hub, **options)
                missing = _missing_names(info)
            # Not every class finds its own weights among those of several towers.
            if tower is not None and (not _loads_alone(tower) or missing.issuperset(model.state_dict())):
                model, missing = _load_tower(name, config, hub, options)
    except Exception as error:  # damaged files of every format, code of any origin, packages that are not installed
        remedy = "give a complete checkpoint of this architecture"
        if isinstance(error, ImportError):
            remedy = "install what its code imports"
        raise ValueError(
            f"{flag(argument)}={name} cannot be loaded as a vision network ({first_line(error)}); {remedy}."
        ) from error
    return model, missing


def _load_with_projection(name: str, argument: str, hub: dict, options: dict) -> tuple[PreTrainedModel, set[str]]:
    """A network of images and text, or its half with a projection, and the names of weights that it lacks."""
    config = _load_config(name, argument, hub)
    loader = AutoModel
    if vision_config_of(config) is None:
        kind = (getattr(config, "architectures", None) or [config.model_type])[0]
        loader = getattr(transformers, kind, None) if kind.endswith("VisionModelWithProjection") else None
        if loader is None:
            raise without_shared_space(name, kind, argument)
    try:
        with quiet_loading():
            model, info = loader.from_pretrained(name, output_loading_info=True, **hub, **options)
    except Exception as error:  # damaged files of every format, code of any origin, packages that are not installed
        raise ValueError(
            f"{flag(argument)}={name} cannot be loaded as a network of images and text ({first_line(error)}); give a "
            f"complete checkpoint of this architecture."
        ) from error
    return model, _missing_names(info)


def _loads_alone(tower_config) -> bool:
    """Whether ``AutoModel`` loads a tower that reads images without the others."""
    return bool(backbone_classes(tower_config)) and tower_config.model_type not in SAME_TOWER


def _load_tower(name: str, config, hub: dict, options: dict) -> tuple[PreTrainedModel, set[str]]:
    """The tower that reads images, out of the full network, and the names of weights that the checkpoint lacks."""
    full, info = AutoModel.from_pretrained(name, output_loading_info=True, **hub, **options)
    tower = find_tower(full)
    if tower is None:
        raise ValueError(f"{type(full).__name__} has no network of its own that reads images")
    prefix = next(path for path, module in full.named_modules() if module is tower) + "."
    missing = {path.removeprefix(prefix) for path in _missing_names(info) if path.startswith(prefix)}
    if config.model_type != tower.config.model_type:
        state = tower.state_dict()
        tower = AutoModel.from_config(config, **{**options, "dtype": tower.dtype})
        tower.load_state_dict(state)
    tower.name_or_path = name
    return tower, missing


def missing_weights(model: PreTrainedModel, name: str, revision: str | None = None) -> set[str]:
    """Names of weights that the checkpoint of a network in memory did not contain, and that were not trained since.

    Found without reading weights. Of a module that the checkpoint lacks altogether, all weights count as trained where
    one that each initialisation sets to the same number (a bias, the scale of a norm) has another value.

    Args:
        model: the network.
        name: Hub name or folder of its checkpoint.
        revision: commit of the checkpoint; by default that of the network, as far as it is known.

    Returns:
        The names; none where there is no such checkpoint.
    """
    if not name:
        return set()
    revision = revision or commit_in_memory(model)
    try:
        with quiet_loading():
            _, info = type(model).from_pretrained(
                name,
                config=copy.deepcopy(model.config),
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                revision=revision,
                local_files_only=True,
            )
    except Exception as error:  # each format and network fails in its own way
        if is_checkpoint(name, revision):
            logger.warning("Which weights the checkpoint %s lacks cannot be found out: %s", name, first_line(error))
        return set()
    missing = _missing_names(info)
    return missing - _trained_since(model, missing)


def _trained_since(model: PreTrainedModel, missing: set[str]) -> set[str]:
    """Those names of ``missing``, which a checkpoint lacks, whose weights are no longer as they were initialised."""
    state = model.state_dict()
    # Matrices are drawn anew each time, and tell nothing.
    vectors = {name: state[name] for name in missing if name in state and state[name].dim() < 2}
    candidates = {name for name, value in vectors.items() if not value.is_meta and not _is_usual(value)}
    if not candidates:
        return set()
    try:
        with torch.random.fork_rng(devices=[]), quiet_loading():
            initial = type(model)._from_config(copy.deepcopy(model.config)).state_dict()
    except Exception as error:  # code of any origin
        logger.debug("%s cannot be initialised again: %s", type(model).__name__, error)
        return set()
    fixed = {name: initial[name].to(state[name]) for name in candidates if _is_one_number(initial.get(name))}
    moved = [name for name, value in fixed.items() if not torch.equal(value, state[name])]
    modules = tuple(_module_of_missing(name, state, missing) for name in moved)
    return {name for name in missing if name.startswith(modules)} if modules else set()


def _is_usual(tensor: torch.Tensor) -> bool:
    """Whether all values are 0 or all are 1, as most initialisations leave biases and the scales of norms."""
    return not tensor.any() or bool((tensor == 1).all())


def _is_one_number(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.numel() > 0 and bool((tensor == tensor.flatten()[0]).all())


def _module_of_missing(name: str, state: dict[str, torch.Tensor], missing: set[str]) -> str:
    """The start of the names of the outermost module around a weight all of whose weights are missing."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        start = ".".join(parts[:count]) + "."
        if all(other in missing for other in state if other.startswith(start)):
            return start
    return name


def is_checkpoint(name: str, revision: str | None = None) -> bool:
    """Whether a folder, or a model of the Hub in the cache, has a configuration; whether it can be read or not."""
    if Path(name).is_dir():
        return Path(name, "config.json").exists()
    try:
        return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    except HFValidationError:  # a class, or whatever else a network in memory is called
        return False


@contextlib.contextmanager
def quiet_loading():
    """Silence Transformers' report of missing and unexpected weights, timm's of what it reads, and progress bars."""
    verbosity = hf_logging.get_verbosity()
    of_timm = logging.getLogger("timm")
    level = of_timm.level
    hf_logging.set_verbosity(hf_logging.CRITICAL)
    of_timm.setLevel(logging.WARNING)
    try:
        with without_bars():
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        of_timm.setLevel(level)


@contextlib.contextmanager
def without_bars():
    """Without the progress bars of Transformers, which it draws for the smallest file, too."""
    progress = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if progress:
            hf_logging.enable_progress_bar()


def _missing_names(info: dict) -> set[str]:
    return set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}


def _dtype(dtype: str, argument: str) -> torch.dtype | str:
    if dtype not in DTYPES:
        raise ValueError(f"{flag(argument, 'dtype')}={dtype!r} is unknown: choose one of {', '.join(DTYPES)}.")
    return dtype if dtype == "auto" else getattr(torch, dtype)


def _hub_arguments(name: str, argument: str, revision: str | None, trust_remote_code: bool) -> dict:
    """Arguments of ``from_pretrained``; asks the Hub for ``name`` once, where that would retry for half a minute."""
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    if Path(name).exists():
        return hub
    try:
        HfApi().model_info(name, revision=revision, timeout=10)
    except RevisionNotFoundError as error:
        raise ValueError(
            f"{flag(argument, 'revision')}={revision}: {name} has no such branch, tag or commit."
        ) from error
    except HFValidationError as error:
        raise _unknown(name, argument, "is no folder, nor a valid name of a model on the Hub") from error
    except RepositoryNotFoundError as error:
        reason = "is no folder, nor a model on the Hub (if it is private: hf auth login)"
        raise _unknown(name, argument, reason, ask_hub=True) from error
    except Exception as error:  # no network, in the words of whichever HTTP library huggingface_hub uses
        logger.warning("The Hub cannot be reached (%s): %s is looked for in the cache.", first_line(error), name)
        return hub | {"local_files_only": True}
    return hub


def _hub_arguments_in_memory(name: str, argument: str, commit: str | None, trust_remote_code: bool) -> dict:
    """As ``_hub_arguments``, for what lies next to the weights of a network in memory.

    Nobody gave its commit. Where the Hub does not have it, since the history was squashed, the files are those of that
    commit in the cache, else those of main.
    """
    try:
        return _hub_arguments(name, argument, commit, trust_remote_code)
    except ValueError as error:
        if not isinstance(error.__cause__, RevisionNotFoundError):
            raise
    hub = {"revision": commit, "trust_remote_code": trust_remote_code}
    if any(isinstance(try_to_load_from_cache(name, file, revision=commit), str) for file in PROCESSOR_FILES):
        return hub | {"local_files_only": True}
    return hub | {"revision": None}


def _load_config(name: str, argument: str, hub: dict):
    given = f"{flag(argument)}={name}"
    try:
        config = AutoConfig.from_pretrained(name, **hub)
        _check_packages(config, given)
        return config
    except MissingPackage:
        raise
    except Exception as error:  # damaged files, code of any origin
        if isinstance(error, ImportError) and "timm" in str(error):
            check_extra("timm", needed_by=given)
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{given} brings code of its own; read it, then allow it with --trust_remote_code."
            ) from error
        if "local_files_only" in hub and not is_checkpoint(name, hub["revision"]):
            reason = "is no folder, nor in the local cache, and the Hub cannot be reached to look for it there"
            raise _unknown(name, argument, reason) from error
        if checkpoint := _newest_checkpoint(name):
            raise ValueError(
                f"{given} holds checkpoints and no saved student: trainer.save_model() writes it there; the student of "
                f"a checkpoint is loaded by its own folder, {checkpoint}."
            ) from error
        raise ValueError(f"{given}: no config.json of a known network can be read ({first_line(error)}).") from error


def _newest_checkpoint(name: str) -> str | None:
    """Folder of the newest checkpoint in the folder of a run without its student."""
    return get_last_checkpoint(name) if Path(name).is_dir() and not Path(name, "config.json").exists() else None


def _check_packages(config, given: str) -> None:
    """Check that the package of a network of timm is installed, before its classes miss it."""
    if config.model_type == "timm_wrapper":
        check_extra("timm", needed_by=given)


def _unknown(name: str, argument: str, reason: str, ask_hub: bool = False) -> ValueError:
    """An error that suggests names of this package, the parent folder, the local cache and, if it answered, the Hub."""
    text = f"{flag(argument)}={name} {reason}."
    if _is_architecture(name):
        return ValueError(
            f"{text} It is an architecture without weights: {flag(argument, 'init')} random would build it."
        )
    if architecture := _timm_architecture(name):
        return ValueError(
            f"{text} {architecture} is an architecture of timm: {flag(argument)} timm_wrapper {flag(argument, 'init')} "
            f"random {flag(argument, 'config_overrides')} architecture={architecture} builds it without weights, and "
            f"{flag(argument)} timm/NAME reads those with weights from the Hub, by their full name there."
        )
    names = list(CIFAR_NETWORKS)
    parent = Path(name).parent
    if parent.is_dir():
        names += [str(parent / entry.name) for entry in parent.iterdir() if entry.is_dir()]
    names += cached_names("models")
    if ask_hub:
        names += search("models", name)
    return ValueError(text + did_you_mean(similar_names(name, names)))


def _timm_architecture(name: str) -> str:
    """The network of timm that a name means, such as ``timm/resnet18.a1_in1k``; empty where there is none."""
    if find_spec("timm") is None:
        return ""
    import timm

    found = re.sub(r"^(hf[-_]hub:|timm[:/])+", "", name).split(".")[0]
    return found if found in timm.list_models() else ""


def _is_architecture(name: str) -> bool:
    return not Path(name).exists() and (name in CIFAR_NETWORKS or name in CONFIG_MAPPING)


def _architecture_config(name: str):
    return cifar_config(name) if name in CIFAR_NETWORKS else CONFIG_MAPPING[name]()


def _vision_config(config, argument: str):
    """The configuration, or its vision tower where it has two towers; errors for networks of text or sound."""
    config = vision_config_of(config) or config
    if config.model_type in SAME_TOWER:
        entries = config.to_dict()
        del entries["model_type"]
        config = CONFIG_MAPPING[SAME_TOWER[config.model_type]](**entries)
    for model_class in backbone_classes(config)[:1]:
        if model_class.main_input_name != "pixel_values":
            raise ValueError(
                f"{flag(argument)}: {model_class.__name__} ({config.model_type}) reads {model_class.main_input_name}, "
                f"not images; give a vision backbone such as a ViT, DINOv2, ResNet or ConvNeXt."
            )
    if config.model_type == "vit_mae":
        config.mask_ratio = 0.0  # its pre-training hides a random part of each image
    return config


def find_processor(
    model: PreTrainedModel,
    teacher: Backbone | None = None,
    argument: str = "",
    hub: dict | None = None,
    trust_remote_code: bool = False,
):
    """Find a network's image processor: in its checkpoint, else timm's own, else the teacher's.

    Args:
        model: the network.
        teacher: source of the image processor where the checkpoint has none.
        argument: the command-line flag that errors name.
        hub: arguments of ``from_pretrained``; by default found by asking the Hub.
        trust_remote_code: whether a checkpoint may run its own code, where ``hub`` does not say so.

    Raises:
        ValueError: there is no image processor.
    """
    timm_model = getattr(model, "timm_model", None)
    name = model.name_or_path
    if timm_model is not None:
        # In the network's configuration; before it is saved for the first time, in timm.
        pretrained_cfg = getattr(model.config, "pretrained_cfg", None) or timm_model.pretrained_cfg
        from transformers import TimmWrapperImageProcessor  # imports timm

        return TimmWrapperImageProcessor(pretrained_cfg, architecture=model.config.architecture)
    absent = "it is not from a checkpoint"
    if name and not _is_architecture(name):
        hub = hub or _hub_arguments_in_memory(name, argument, commit_in_memory(model), trust_remote_code)
        file = _processor_file(name, argument, hub)
        if file is not None:
            return _load_processor(name, argument, hub, file)
        absent = f"it has no {PROCESSOR_FILES[0]}"
    if teacher is not None:
        logger.info("%s has no image processor: the teacher's is used", name)
        return teacher.processor
    raise ValueError(
        f"{flag(argument)}={name or type(model).__name__}: no image processor is next to its weights ({absent}); add "
        f"a {PROCESSOR_FILES[0]}."
    )


def _processor_file(name: str, argument: str, hub: dict) -> str | None:
    """Name of the file that describes a checkpoint's image processor; None where it has none."""
    for file in PROCESSOR_FILES:
        options = {"local_files_only": hub.get("local_files_only", False), "given": f"{flag(argument)}={name}"}
        if find_file(name, file, hub.get("revision"), **options) is not None:
            return file
    return None


def _load_processor(name: str, argument: str, hub: dict, file: str):
    try:
        return AutoImageProcessor.from_pretrained(name, **hub)
    except Exception as error:  # damaged files, code of any origin, packages that are not installed
        raise ValueError(
            f"{flag(argument)}={name}: its image processor ({file}) cannot be loaded ({first_line(error)}); correct "
            f"the file."
        ) from error
