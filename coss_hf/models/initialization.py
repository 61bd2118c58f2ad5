"""Networks that no checkpoint has: a changed configuration, or a student of layers of the teacher."""

import difflib

import torch
from torch import nn
from transformers import PreTrainedModel

from coss_hf.models.backbone import Backbone
from coss_hf.models.towers import ProjectedTower
from coss_hf.utils.messages import did_you_mean, flag, get_logger

logger = get_logger(__name__)


def rebuild_config(config, changes: dict, argument: str):
    """Build a configuration anew with changed entries, so that entries derived from others follow and are checked."""
    given = flag(argument, "config_overrides")
    known = config.to_dict()
    for key in changes:
        if key not in known and key not in config.attribute_map:
            hint = did_you_mean(difflib.get_close_matches(key, known, n=3))
            raise ValueError(f"{given}: {type(config).__name__} has no entry {key!r}.{hint}")
    # Stages are named and numbered by depth, for uses other than as a backbone.
    kept = {key: value for key, value in known.items() if key not in ("stage_names", "out_features", "out_indices")}
    try:
        return type(config).from_dict({**kept, **changes})
    except Exception as error:  # each configuration checks in its own way
        reason = " ".join(str(error).split())
        raise ValueError(f"{given}={changes}: {type(config).__name__} refuses this ({reason}).") from error


def build_from_layers(
    teacher: Backbone | None, overrides: dict, options: dict, argument: str
) -> tuple[PreTrainedModel, set[str]]:
    """Build a student from every n-th layer of a transformer teacher, with its embeddings and norms.

    Returns:
        The student, and the names of weights that it does not have from a checkpoint: those that the teacher's lacks,
        and those that the teacher lacks itself, such as the pooler of a classifier's tower.
    """
    given = f"{flag(argument, 'init')}=teacher_layers"
    if teacher is None:
        raise ValueError(f"{given} needs a teacher to take layers from.")
    if set(overrides) - {"num_hidden_layers"}:
        raise ValueError(
            f"{flag(argument, 'config_overrides')}={overrides}: with teacher_layers only num_hidden_layers can differ."
        )
    network = teacher.model.tower if isinstance(teacher.model, ProjectedTower) else teacher.model
    config = network.config
    timm_blocks = getattr(getattr(network, "timm_model", None), "blocks", ())
    total = getattr(config, "num_hidden_layers", None) or len(timm_blocks)
    stacks = [path for path, module in network.named_modules() if total and _is_stack(module, total)]
    if len(stacks) != 1:
        raise ValueError(
            f"{given}: {teacher.name} ({config.model_type}) is no plain stack of transformer layers; use "
            f"{flag(argument, 'init')} random or pretrained."
        )
    kept = overrides.get("num_hidden_layers", max(total // 2, 1))
    if not isinstance(kept, int) or not 1 <= kept <= total:
        raise ValueError(f"{flag(argument, 'config_overrides')}: num_hidden_layers={kept} must lie in 1..{total}.")
    if timm_blocks:  # a timm network is built from its name, with other arguments where given
        depth = {"model_args": {**(config.model_args or {}), "depth": kept}}
    else:
        depth = {"num_hidden_layers": kept}
    student = type(network)._from_config(rebuild_config(config, depth, argument), **options)
    chosen = torch.linspace(0, total - 1, kept).round().int().tolist()
    unset = student.load_state_dict(_chosen_layers(network.state_dict(), stacks[0], chosen), strict=False).missing_keys
    student.name_or_path = f"{teacher.name}, layers {chosen}"
    logger.info("the student takes layers %s of the teacher's %d", chosen, total)
    return student, {name.removeprefix("tower.") for name in teacher.missing} | set(unset)


def _chosen_layers(source: dict[str, torch.Tensor], stack: str, chosen: list[int]) -> dict[str, torch.Tensor]:
    """State dict with the chosen layers of a stack alone, numbered from 0."""
    state = {key: value for key, value in source.items() if not key.startswith(f"{stack}.")}
    for position, layer in enumerate(chosen):
        path = f"{stack}.{layer}."
        for key, value in source.items():
            if key.startswith(path):
                state[f"{stack}.{position}.{key.removeprefix(path)}"] = value
    return state


def _is_stack(module: nn.Module, count: int | None) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) != count:
        return False
    shapes = [[parameter.shape for parameter in layer.parameters()] for layer in module]
    return all(layer == shapes[0] for layer in shapes)  # unlike the stages of a Swin or ConvNeXt
