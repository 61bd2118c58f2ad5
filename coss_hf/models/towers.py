"""Networks of several towers, such as CLIP and SigLIP: the tower that reads images, and the space shared with text."""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from coss_hf.utils.messages import flag

# What a teacher's embedding can be: the vision tower's own, or what is compared with embeddings of texts.
SPACES = ("tower", "projected")
# Vision towers whose pooled output is compared with embeddings of texts as it is.
_WITHOUT_PROJECTION = {"align_vision_model", "siglip_vision_model", "tipsv2_vision_model"}
# Vision towers that a projection follows in all checkpoints of their family.
_BEFORE_PROJECTION = {
    "altclip_vision_model",
    "chinese_clip_vision_model",
    "clip_vision_model",
    "clipseg_vision_model",
    "groupvit_vision_model",
    "metaclip_2_vision_model",
    "owlv2_vision_model",
    "owlvit_vision_model",
}
_PROJECTION = "visual_projection"
# What a network that was trained to compare images with texts scales its cosines by.
_SCALES = ("logit_scale", "temperature")


class ProjectedTower(nn.Module):
    """The half of a network of images and text that embeds images in the space of both.

    Its parts are those of the network, which are not copied; the text tower is none of them.

    Args:
        full: the network.
        tower: its vision tower.

    Attributes:
        tower: the vision tower.
        projection: from the tower's pooled output to the shared space.
        config: a copy of the tower's configuration.
    """

    main_input_name = "pixel_values"
    supports_gradient_checkpointing = False
    _no_split_modules = None

    def __init__(self, full: PreTrainedModel, tower: PreTrainedModel):
        super().__init__()
        self.tower = tower
        self.projection = getattr(full, _PROJECTION, None) or nn.Identity()
        self.name_or_path = full.name_or_path
        self.config = copy.deepcopy(tower.config)
        path = next(path for path, module in full.named_modules() if module is tower)
        self._own = {f"{path}.": "tower.", f"{_PROJECTION}.": "projection."}

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def own_names(self, names: set[str]) -> set[str]:
        """Names of parameters of the full network, as they are called here; those of other parts are left out."""
        found = set()
        for start, own in self._own.items():
            found |= {own + name.removeprefix(start) for name in names if name.startswith(start)}
        return found

    def forward(self, pixel_values: Tensor, **options):
        """Run the tower on images ``(b, 3, h, w)``; ``pooler_output`` ``(b, d)`` is in the shared space."""
        output = self.tower(pixel_values=pixel_values, **options)
        output.pooler_output = self.projection(output.pooler_output)
        return output


def check_space(space: str, pooling: str, argument: str) -> None:
    """Refuse an unknown space, and a pooling that its projection does not read.

    Raises:
        ValueError: the space or the pooling, and the remedy.
    """
    if space not in SPACES:
        raise ValueError(f"{flag(argument, 'space')}={space!r} is unknown: choose one of {', '.join(SPACES)}.")
    if space == "projected" and pooling not in ("auto", "pooler"):
        raise ValueError(
            f"{flag(argument, 'pooling')}={pooling} next to {flag(argument, 'space')}=projected: the projection reads "
            f"the network's own pooler; leave {flag(argument, 'pooling')} out."
        )


def vision_config_of(config) -> PreTrainedConfig | None:
    """The configuration of the tower that reads images, of a network of several towers; None for any other."""
    found = getattr(config, "vision_config", None)
    return found if isinstance(found, PreTrainedConfig) else None


def find_tower(model: PreTrainedModel) -> PreTrainedModel | None:
    """The tower that reads images within a network of several towers; None where there is none."""
    wanted = vision_config_of(model.config)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config.model_type == wanted.model_type:
            return module
    return None


def projected_tower(model: nn.Module, argument: str) -> ProjectedTower:
    """The part of a network of images and text that embeds images in the space of both.

    Args:
        model: such as a ``CLIPModel``, ``SiglipModel`` or ``CLIPVisionModelWithProjection``.
        argument: the command-line flag that errors name.

    Raises:
        ValueError: a network without such a space.
    """
    tower = None
    if isinstance(model, PreTrainedModel) and _compares_with_text(model):
        towers = [part for part in model.children() if isinstance(part, PreTrainedModel)]
        tower = (towers or [None])[0] if vision_config_of(model.config) is None else find_tower(model)
    if tower is None:
        raise without_shared_space(getattr(model, "name_or_path", ""), type(model).__name__, argument)
    return ProjectedTower(model, tower)


def _compares_with_text(model: PreTrainedModel) -> bool:
    """Whether a network embeds images and text in one space, or is the half of such a one that ends in it."""
    if vision_config_of(model.config) is None:
        return hasattr(model, _PROJECTION)
    both = all(callable(getattr(model, name, None)) for name in ("get_image_features", "get_text_features"))
    return both and any(hasattr(model, name) for name in _SCALES)


def without_shared_space(name: str, kind: str, argument: str) -> ValueError:
    """The refusal of a network that has no space of images and text."""
    return ValueError(
        f"{flag(argument, 'space')}=projected: {name or 'the network'} ({kind}) does not project images into a space "
        f"that they share with text; give a checkpoint of both towers, such as those of CLIP or SigLIP, or leave "
        f"{flag(argument, 'space')} out to take the embedding of the images' network itself."
    )


def joint_embedding(full: PreTrainedModel, pixel_values: Tensor, options: dict) -> Tensor:
    """The embedding ``(b, d)`` that a network of images and text itself compares with those of texts."""
    if vision_config_of(full.config) is None:
        return full(pixel_values=pixel_values, **options).image_embeds
    output = full.get_image_features(pixel_values=pixel_values, **options)
    return output if isinstance(output, Tensor) else output.pooler_output


def space_of(model: nn.Module, pooling: str) -> str | None:
    """Where the embedding of a network that was trained with text lies.

    Args:
        model: the network that embeds images.
        pooling: how its output becomes one embedding.

    Returns:
        ``projected`` in the space that images share with text, ``tower`` before the projection into it; None for a
        network that was not trained with text, as far as its configuration tells.
    """
    if isinstance(model, ProjectedTower):
        return "projected"
    kind = getattr(model.config, "model_type", "")
    if kind in _WITHOUT_PROJECTION:
        return "projected" if pooling == "pooler" else "tower"
    return "tower" if kind in _BEFORE_PROJECTION else None


def describe_space(space: str | None, *, texts: bool = True) -> str:
    """A sentence on what embeddings in a teacher's space can be compared with; empty where there is nothing to say.

    Args:
        space: of ``space_of``.
        texts: whether the teacher has a text tower itself.
    """
    search = "the teacher's text tower searches images that the student has embedded"
    if not texts:
        search = "the text tower that the teacher was trained with can search images that the student has embedded"
    return {
        "projected": "The space is the one that the teacher's images share with its texts (after the projection): "
        f"{search}.",
        "tower": "The space is that of the teacher's vision tower, before the projection into the space of its texts: "
        "it is compared with embeddings of images alone. A student of `--teacher_space projected` is compared with "
        "texts, too.",
    }.get(space, "")
