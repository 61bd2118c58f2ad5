"""Any vision network as a teacher or a student: its pooling, its own pre-processing, its features."""

import contextlib
import copy
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModel, PreTrainedModel

from coss_hf.features import Features
from coss_hf.models.image_processor import Preprocessing, is_timm_processor, transformers_processor
from coss_hf.models.modules import ModuleNetwork, UnknownOutput
from coss_hf.models.pooling import (
    POOLINGS,
    Layout,
    evenly_spaced,
    feature_maps,
    is_channels_last,
    pool,
    token_layout,
)
from coss_hf.models.revision import commit_in_memory
from coss_hf.models.towers import (
    ProjectedTower,
    check_space,
    find_tower,
    joint_embedding,
    projected_tower,
    space_of,
    vision_config_of,
)
from coss_hf.utils.code_identity import code_identity
from coss_hf.utils.messages import first_line, flag, get_logger

logger = get_logger(__name__)

# Classification checkpoints of these do not train the dense pooler, and their classifier reads the class token.
_CLASS_TOKEN_TYPES = {"vit", "deit", "vit_msn", "vit_mae"}
# Outputs that hold a network's own embedding of an image: RADIO's summary is two of its class tokens.
_POOLED_OUTPUTS = ("pooler_output", "summary")
# CvT gives its class token apart from its map of patches.
_CLASS_OUTPUT = "cls_token_value"
# The entry of a configuration that counts the tokens after those of patches: YOLOS detects objects with them.
_SUFFIX_ENTRY = "num_detection_tokens"
# The entry of a configuration that says that a student's position embeddings are stretched to its size.
_INTERPOLATION_ENTRY = "embedding_interpolate_pos_encoding"
# Entries of a configuration that an embedding does not depend on, or that its fingerprint contains in another form.
_NOT_IN_FINGERPRINT = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "embedding_interpolate_pos_encoding",
    "embedding_pooling",
    "id2label",
    "label2id",
    "label_names",
    "num_classes",
    "num_features",
    "pretrained_cfg",
    "teacher_space",
    "torch_dtype",
    "transformers_version",
}
# Attribute of each module whose parameters `Backbone.freeze` froze: their names. Deep copies have it, too.
_FROZEN = "_frozen_by_backbone"
# Entries that change a pooled output alone, by their usual values: a student is saved with others.
_OF_POOLED_OUTPUT = {"do_pooling": True, "pooler_act": "tanh"}


class Backbone:
    """A vision network with all that its embedding needs.

    The pooling is written into the network's configuration (``embedding_pooling``), where ``auto`` finds it again.

    Args:
        model: a network of Transformers in memory; a classifier or a text tower around it is left out. See
            ``from_module`` for any other.
        processor: its image processor; None where only pixel values will be embedded.
        pooling: ``auto``, ``cls``, ``mean``, ``pooler`` or ``gap``.
        missing: names of weights that its checkpoint did not contain.
        size: side of the input in pixels, or ``(h, w)`` where there is no processor; by default the image processor's.
        interpolate_pos_encoding: whether to stretch position embeddings, where the network has them and can do it.
        argument: the command-line flag that errors name.
        space: of a network of images and text, such as CLIP: ``tower``, the embedding of the vision tower; or
            ``projected``, that in the space which images share with text, for a teacher.

    Attributes:
        model: the network, without a classifier.
        name: Hub name or folder that the network came from, else its class.
        pooling: ``cls``, ``mean``, ``pooler`` or ``gap``.
        dim: dimension d of the embedding.
        layout: where its ``last_hidden_state`` has tokens or channels.
        size: ``(h, w)`` of its input, in pixels.
        preprocessing: the use of its image processor for evaluation and for training; None without a processor.
        processor: its image processor.
        missing: names of weights that its checkpoint did not contain.
        untrained: names of those of them that the embedding depends on; none but in a module that is no teacher yet.
        unused: names of parameters that the embedding does not depend on (an untrained pooler, a mask token).
        pooler_alone: names of those of them that the network's own pooled output depends on.
        pooler_untrained: whether those of them with matrices are not of a checkpoint, by their names or by zero biases.
        pooler_output: what that of the saved student is, found by ``coss_hf.models.pooler``; None until then.
        output_shapes: shapes, for one image, of ``last_hidden_state`` and of the pooled output where there is one.
        can_interpolate: whether it can stretch position embeddings.
        options: keyword arguments of the network's forward pass.
        maps: number of feature maps that ``features`` returns together with the embedding; 0 by default.
        has_texts: whether the network that it was taken from embeds texts, too.
        classifier: the linear layer on the embedding that was left out of a plain module; None where none is known.
        full: the network in memory that the tower was taken out of, with its classifier; None where it was given alone.
        checkpoint: Hub name or folder that the network was loaded from by name; None for one given in memory.
        revision: the commit on the Hub that its weights are of, else what was asked for; None where neither is known.

    Raises:
        ValueError: a network that reads no images, a pooling, size or space that it does not support, missing weights.
    """

    def __init__(
        self,
        model: PreTrainedModel | ModuleNetwork,
        processor,
        *,
        pooling: str = "auto",
        missing: set[str] = frozenset(),
        size: int | tuple[int, int] | None = None,
        interpolate_pos_encoding: bool = False,
        argument: str = "",
        space: str = "tower",
    ):
        check_space(space, pooling, argument)
        self.name = model.name_or_path or type(model).__name__
        _check_in_one_place(model, self.name, argument)
        self.maps = 0
        self.classifier: nn.Linear | None = None
        self.checkpoint: str | None = None
        self.revision = commit_in_memory(model)
        self.missing = set(missing)
        self.has_texts = callable(getattr(model, "get_text_features", None))
        if space == "projected":
            self.model = projected_tower(model, argument)
            self.missing = self.model.own_names(self.missing)
        else:
            self.model = vision_tower(model, argument)
        # A text tower would be kept alive, and there is no classifier next to it.
        self.full = None if self.has_texts or self.model is model else model
        self.preprocessing = None
        self.processor = None
        self.size = _sides(size)
        if is_timm_processor(processor) and self.model.config.model_type != "timm_wrapper":
            processor = transformers_processor(processor, argument)
        if processor is not None:
            try:
                self.preprocessing = Preprocessing(processor, size, argument)
            except ValueError as error:
                # The processor of a network of other inputs is not to blame.
                other = self._other_inputs(self.model, argument)
                if other:
                    raise ValueError(other) from error
                raise
            self.processor = self.preprocessing.processor
            self.size = self.preprocessing.size
        if self.size is None:
            raise ValueError(
                f"{flag(argument, 'size')}={size}: {self.name} has no image processor that says the size of its input; "
                f"give its side in pixels, or (h, w)."
            )
        self.can_interpolate = "interpolate_pos_encoding" in _inputs(self.model)
        # Teacher and student get the same flag: a ResNet takes any size without it.
        interpolate = interpolate_pos_encoding or getattr(self.model.config, _INTERPOLATION_ENTRY, False)
        self.options = {"interpolate_pos_encoding": True} if interpolate and self.can_interpolate else {}
        self.set_pooling(pooling, argument)
        if space == "projected":
            self._check_projection(model, argument)
        # Read by `embed` and by anybody who reloads the network.
        self.model.config.embedding_pooling = self.pooling
        if self.options:
            setattr(self.model.config, _INTERPOLATION_ENTRY, True)

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        *,
        size: int | tuple[int, int] | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        embedding: Callable | None = None,
        maps: Sequence[str] | None = None,
        pooling: str = "auto",
        argument: str = "",
    ) -> "Backbone":
        """A backbone of any module that maps normalised images ``(b, 3, h, w)`` to embeddings or feature maps.

        A network of ``timm.create_model`` becomes what its name ``timm/...`` would be, where it can be built by that;
        the classifier of a network of torchvision is left out. The module's parameters are used, not copied.

        Args:
            module: returns a tensor ``(b, d)``, ``(b, c, h, w)`` or ``(b, tokens, d)``, a list of maps ``(b, c, h,
                w)``, or an object with ``last_hidden_state`` or ``pooler_output``.
            size: side of the input in pixels, or ``(h, w)``; default: that of timm or torchvision.
            mean: subtracted from each channel, as a fraction of 1; default: that of timm or torchvision.
            std: each channel is divided by it, as a fraction of 1; default: that of timm or torchvision.
            embedding: takes what the module returns, and returns embeddings ``(b, d)``.
            maps: names of submodules whose outputs are the feature maps that some methods compare; default: the last
                of each size.
            pooling: ``auto``, ``cls``, ``mean``, ``pooler`` or ``gap``, for a module that returns maps or tokens.
            argument: the command-line flag that errors name.

        Raises:
            ValueError: no embedding can be read from what the module returns; size, mean or std are not known.

        Example::

            encoder = MyEncoder()
            teacher = Backbone.from_module(encoder, size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        """
        from coss_hf.models.from_module import backbone_from_module  # builds this class

        return backbone_from_module(
            module,
            size=size,
            mean=mean,
            std=std,
            embedding=embedding,
            maps=maps,
            pooling=pooling,
            argument=argument,
        )

    def set_pooling(self, pooling: str, argument: str = "") -> None:
        """Set the pooling, and find layout, dimension and unused parameters from shapes and graph, without arithmetic.

        Args:
            pooling: ``auto``, ``cls``, ``mean``, ``pooler`` or ``gap``.
            argument: the command-line flag that errors name.

        Raises:
            ValueError: a pooling or size that the network does not support, missing weights.
        """
        if isinstance(self.model, ProjectedTower):
            check_space("projected", pooling, argument)
            pooling = "pooler"
        pooling = getattr(self.model.config, "embedding_pooling", "auto") if pooling == "auto" else pooling
        if pooling not in (*POOLINGS, "auto"):
            raise ValueError(
                f"{flag(argument, 'pooling')}={pooling!r} is unknown: choose one of auto, {', '.join(POOLINGS)}."
            )
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            _shapes(self.model, lambda network: self._example_output(network, argument)) as (twin, output),
        ):
            self.layout = _layout(self.model, output, self.size, argument)
            parameters = {parameter: name for name, parameter in twin.named_parameters()}
            if not isinstance(self.model, ProjectedTower):
                pooling = self._choose_pooling(pooling, output, parameters, argument)
            embedding = pool(output, pooling, self.layout)
            used = _reached(embedding, parameters)
            pooled = getattr(output, self.layout.pooled) if self.layout.pooled else None
            reached_by_pooler = set() if pooled is None else _reached(pooled, parameters)
        names = set(parameters.values())
        self._check_missing(used, names, argument)
        self.pooling = pooling
        self.dim = embedding.shape[1]
        self.unused = names - used
        self.pooler_alone = reached_by_pooler - used
        self.pooler_untrained = self._is_untrained(self.pooler_alone)
        self.pooler_output = None
        self.output_shapes = {"last_hidden_state": tuple(output.last_hidden_state.shape[1:])}
        if pooled is not None:
            self.output_shapes[self.layout.pooled] = tuple(pooled.shape[1:])

    def _choose_pooling(self, pooling: str, output, parameters: dict[Tensor, str], argument: str) -> str:
        """``pooling``, chosen by the architecture where it is ``auto``, if the network supports it."""
        pooler = getattr(output, self.layout.pooled) if self.layout.pooled else None
        reached = set() if pooler is None else _reached(pooler, parameters)
        is_zero = self._are_zeros(reached - _reached(output.last_hidden_state, parameters))
        pooler_usable = pooler is not None and not reached & self.missing and not is_zero
        if pooling == "auto":
            # TextNet's pooler leaves a map, of which its classifier takes the mean.
            pooling = self._auto(pooler_usable and pooler.shape[2:].numel() == 1)
        given = f"{flag(argument, 'pooling')}={pooling}: {self.name}"
        if pooling == "pooler" and not pooler_usable:
            why = "has no pooler" if pooler is None else "has a pooler whose weights are not in the checkpoint"
            if is_zero:
                why = "has a pooler of zeros, as a student of another pooling is saved"
            raise ValueError(f"{given} {why}; use auto, cls, mean or gap.")
        if pooling == "cls" and not self.layout.has_class_token:
            raise ValueError(f"{given} has no class token; use auto, mean or gap.")
        return pooling

    def _are_zeros(self, names: set[str]) -> bool:
        """Whether parameters of these names are all zero; False without any."""
        values = [value for name, value in self.model.named_parameters() if name in names and not value.is_meta]
        return bool(values) and not any(value.any() for value in values)

    def _is_untrained(self, names: set[str]) -> bool:
        """Whether layers with matrices among these parameters are as they were initialised, or set to zero."""
        values = {name: value for name, value in self.model.named_parameters() if name in names}
        matrices = {name for name, value in values.items() if value.dim() > 1}
        layers = {name.rpartition(".")[0] for name in matrices}
        biases = {name for name in values if name.endswith("bias") and name.rpartition(".")[0] in layers}
        return bool(matrices & self.missing) or any(self._are_zeros({name}) for name in biases)

    def _check_missing(self, used: set[str], names: set[str], argument: str) -> None:
        """Refuse a checkpoint without weights that the embedding needs, of the network's parameters ``names``.

        New layers of a module are for a student to train: they are refused once it is a teacher (``check_trained``).
        """
        # Running means and variances, which no gradient reaches.
        statistics = {name for name, value in self.model.state_dict().items() if value.is_floating_point()}
        self.untrained = (used | statistics - names) & self.missing
        if argument == "teacher" or not isinstance(self.model, ModuleNetwork):
            self.check_trained(argument)
        elif self.untrained and argument != "student":
            logger.warning("%s is a student alone: %s.", self.name, self._lacks())

    def check_trained(self, argument: str = "teacher") -> None:
        """Refuse a network whose embedding needs weights that its checkpoint lacks.

        Raises:
            ValueError: the names of such weights, and the remedy.
        """
        if self.untrained:
            remedy = "give a complete checkpoint of this architecture"
            if isinstance(self.model, ModuleNetwork):
                remedy += ", or a module that returns another output, such as last_hidden_state"
            raise ValueError(f"{flag(argument)}={self.name}: {self._lacks()}; {remedy}.")

    def _lacks(self) -> str:
        names = sorted(self.untrained)
        return f"the checkpoint lacks weights that the embedding needs ({', '.join(names[:3])}; {len(names)} in all)"

    @torch.no_grad()
    def _check_projection(self, full: PreTrainedModel, argument: str) -> None:
        """Refuse a network that gets into the space of its texts by another way than a projection of the pooler."""
        first = next(self.model.parameters())
        noise = torch.randn(1, 3, *self.size, generator=torch.Generator().manual_seed(0)).to(first)
        with evaluating(full):
            expected = joint_embedding(full, noise, self.options)
            found = self.features(noise).embedding
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-2, atol=1e-3):
            raise ValueError(
                f"{flag(argument, 'space')}=projected: {self.name} ({type(full).__name__}) does not embed images in "
                f"the space of its texts by a projection of its pooler; leave {flag(argument, 'space')} out."
            )

    def _example_output(self, network: PreTrainedModel | ModuleNetwork, argument: str):
        """Output of two images of the network's input size; errors where it does not support them."""
        try:
            output = _output_of_images(network, self.size, self.options)
            hidden = getattr(output, "last_hidden_state", None)
            if hidden is not None and not hidden.numel():
                raise ValueError("nothing is left of them in its last map")
        except UnknownOutput:  # says what the remedy is
            raise
        except Exception as error:  # each network refuses images in its own way
            raise ValueError(self._misfit(network, error, argument)) from error
        if hidden is None:
            raise ValueError(
                f"{flag(argument)}={self.name}: {class_name(self.model)} gives no last_hidden_state; give the "
                f"backbone alone, as AutoModel loads it."
            )
        return output

    def _other_inputs(self, network: PreTrainedModel, argument: str) -> str:
        """What the network reads instead of RGB images; empty where it reads those."""
        given = f"{flag(argument)}={self.name}: {class_name(network)}"
        needed = _inputs_besides_images(network)
        if needed:
            return (
                f"{given} reads {', '.join(needed)} besides images; give a network that embeds images alone, such as "
                f"a ViT, DINOv2, ResNet or ConvNeXt."
            )
        channels = _input_channels(network)
        if channels not in (None, 3):
            return (
                f"{given} reads images of {channels} channel{'s' if channels > 1 else ''}, and images are RGB here, "
                f"of 3 channels; give a network of RGB images (num_channels 3)."
            )
        if _reads_videos(network):
            return f"{given} reads videos (b, frames, 3, h, w), not images (b, 3, h, w); give a network of images."
        return ""

    def _misfit(self, network: PreTrainedModel, error: Exception, argument: str) -> str:
        """What does not fit where the network refuses RGB images: its inputs, its channels or the size."""
        other = self._other_inputs(network, argument)
        if other:
            return other
        if isinstance(network, ModuleNetwork):
            return (
                f"{flag(argument)}={self.name} cannot embed RGB images of {self.size[0]}x{self.size[1]} pixels "
                f"({first_line(error)}); give it as Backbone.from_module(module, size=...), of the size that it was "
                f"built for."
            )
        given = f"{flag(argument)}={self.name}: {class_name(self.model)}"
        own = _trained_size(network)
        if own is not None and (own == self.size or not _takes_images(network, own, self.options)):
            return (
                f"{given} cannot embed RGB images (b, 3, h, w), whatever their size ({first_line(error)}); give a "
                f"network of images, such as a ViT, DINOv2, ResNet or ConvNeXt."
            )
        size = f"{self.size[0]}x{self.size[1]}"
        patch = _sides(getattr(network.config, "patch_size", None))
        whole = patch is None or not (self.size[0] % patch[0] or self.size[1] % patch[1])
        trained = f" ({getattr(network.config, 'image_size', None)})" if own else ""
        stretch = " or use --interpolate_pos_encoding" if self.can_interpolate and not self.options else ""
        if argument == "student" and own and own[0] == own[1]:
            stretch += (
                f", or with --student_init random build it so (--student_config_overrides image_size={self.size[0]})"
            )
        return (
            f"{flag(argument, 'size')}={size}: {class_name(self.model)} ({self.name}) cannot take images of this "
            f"size ({first_line(error)}){'' if whole else f', of which its patches are {patch[0]}x{patch[1]} pixels'}"
            f"; give {flag(argument, 'size')} as it was trained{trained}{stretch}."
        )

    def _auto(self, pooler_usable: bool) -> str:
        config = self.model.config
        if config.model_type in _CLASS_TOKEN_TYPES and self.layout.prefix:
            return "cls"
        if pooler_usable:
            return "pooler"
        if self.layout.has_class_token and not getattr(config, "use_mean_pooling", False):
            return "cls"
        return "mean" if self.layout.tokens else "gap"

    def __repr__(self) -> str:
        return (
            f"{self.name} ({class_name(self.model)}): {self.size[0]}x{self.size[1]} pixels, pooling {self.pooling}, "
            f"embedding {self.dim}, {self.num_parameters():,} parameters"
        )

    @property
    def space(self) -> str | None:
        """Of a network that was trained with text: ``projected`` or ``tower``, see ``towers.space_of``; else None."""
        return space_of(self.model, self.pooling)

    def num_parameters(self) -> int:
        """Number of parameters that the embedding depends on."""
        return sum(p.numel() for name, p in self.model.named_parameters() if name not in self.unused)

    def features(self, pixel_values: Tensor) -> Features:
        """Features of normalised images ``(b, 3, h, w)``; gradients and mode are left to the caller."""
        if not self.maps:
            output = self.model(pixel_values=pixel_values, **self.options)
            return Features(pool(output, self.pooling, self.layout))
        output = self._with_maps(pixel_values)
        maps = feature_maps(output, self.layout, self.size)
        return Features(pool(output, self.pooling, self.layout), evenly_spaced(maps, self.maps))

    def _with_maps(self, pixel_values: Tensor):
        options = dict(self.options)
        if self.model.config.model_type == "vit_mae":  # it shuffles patches by noise, also where it hides none
            patches = torch.arange(math.prod(self._grid()), dtype=torch.float32, device=pixel_values.device)
            options["noise"] = patches.expand(len(pixel_values), -1)
        return self.model(pixel_values=pixel_values, output_hidden_states=True, **options)

    def _grid(self) -> tuple[int, int]:
        """Number of rows and columns of patches."""
        patch = _sides(self.model.config.patch_size)
        return self.size[0] // patch[0], self.size[1] // patch[1]

    @torch.no_grad()
    def example(self, maps: bool = False) -> Features:
        """Features of two black images, in evaluation mode; with ``maps``, all feature maps of the network."""
        first = next(self.model.parameters())
        images = torch.zeros(2, 3, *self.size, dtype=first.dtype, device=first.device)
        with evaluating(self.model):
            if not maps:
                return self.features(images)
            output = self._with_maps(images)
        return Features(pool(output, self.pooling, self.layout), feature_maps(output, self.layout, self.size))

    def preprocess(self, images: list[Image.Image]) -> Tensor:
        """Process RGB images to ``(b, 3, h, w)`` by the full image processor, as in evaluation and neighbour search."""
        return self.required_preprocessing().full(images)

    def normalize(self, views: Tensor) -> Tensor:
        """Normalise views ``(b, 3, H, W)`` uint8 to this network's size, scale, mean and std; runs on any device."""
        return self.required_preprocessing().normalize(views)

    def required_preprocessing(self) -> Preprocessing:
        """The use of the image processor.

        Raises:
            ValueError: the backbone was built without one.
        """
        if self.preprocessing is None:
            raise ValueError(
                f"processor=None: {self.name} was built without an image processor, which images and saving need; "
                f"build it as Backbone(model, processor), or embed pixel values (b, 3, h, w)."
            )
        return self.preprocessing

    def freeze(self) -> "Backbone":
        """Set evaluation mode and switch gradients off, as for a teacher. ``unfreeze`` undoes it, also in copies."""
        for module in self.model.modules():
            names = [name for name, value in module.named_parameters(recurse=False) if value.requires_grad]
            if names:
                vars(module)[_FROZEN] = names
        self.model.eval().requires_grad_(False)
        return self

    @torch.no_grad()
    def code(self) -> str:
        """Hash of what a module of one's own does, its weights left out; empty for networks of Transformers.

        ``fingerprint`` tells these by their class and configuration. A module has no such configuration: two of one
        class and of equal weights can embed an image differently, by an attribute or by the ``embedding`` function.
        """
        if not isinstance(self.model, ModuleNetwork):
            return ""
        first = next(self.model.parameters())
        found = []
        for grey in (0, 1):  # what changes as it is called, such as a counter or its last output, tells no code apart
            images = torch.full((2, 3, *self.size), grey, dtype=first.dtype, device=first.device)
            with evaluating(self.model):
                self.features(images)
            # Not of the network around it, which gets hooks of a training's own.
            found.append(code_identity(self.model.module, self.model.embedding, ignored=(_FROZEN,)))
        if found[0] == found[1]:
            return found[0]
        return code_identity(type(self.model.module), self.model.embedding)

    def fingerprint(self) -> str:
        """Hash of network, configuration, weights, pooling and pre-processing; see also ``code``."""
        digest = hashlib.blake2b(digest_size=16)
        config = {key: value for key, value in self.model.config.to_dict().items() if key not in _NOT_IN_FINGERPRINT}
        if self.pooling != "pooler":
            usual = _OF_POOLED_OUTPUT | {"pooler_output_size": config.get("hidden_size")}
            config |= {key: value for key, value in usual.items() if key in config}
        entries = [
            type(self.model).__name__,
            config,
            self.pooling,
            self.size,
            sorted(self.options),
            self.required_preprocessing().processor.to_dict(),
        ]
        digest.update(json.dumps(entries, sort_keys=True, default=str).encode())
        # A pooler that the checkpoint lacks is drawn anew at each loading: what is unused stays out.
        state = {name: tensor for name, tensor in self.model.state_dict().items() if name not in self.unused}
        for name, tensor in sorted(state.items()):
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def backbone_classes(config) -> tuple[type, ...]:
    """Classes that ``AutoModel`` builds from a configuration; empty for code outside Transformers."""
    found = AutoModel._model_mapping.get(type(config), ())
    if isinstance(found, (tuple, list)):
        return tuple(found)
    return (found,)


def vision_tower(model: PreTrainedModel, argument: str) -> PreTrainedModel:
    """The part of a network that embeds images, without its classifier or text tower."""
    if isinstance(model, ModuleNetwork):
        return model
    tower = model
    if vision_config_of(model.config) is not None:
        tower = find_tower(model) or model
    elif not isinstance(model, backbone_classes(model.config)):
        tower = model.base_model
    if not isinstance(tower, PreTrainedModel):
        raise ValueError(
            f"{flag(argument)}: the backbone cannot be taken out of a {type(model).__name__}; give it alone, as "
            f"AutoModel loads it."
        )
    # A tower can take the other tower's main input for its own.
    if tower.main_input_name != "pixel_values" and "pixel_values" not in inspect.signature(tower.forward).parameters:
        raise ValueError(f"{flag(argument)}: {type(tower).__name__} reads {tower.main_input_name}, not images.")
    if tower.config.model_type == "vit_mae" and tower.config.mask_ratio:
        raise ValueError(
            f"{flag(argument)}: this ViT-MAE hides a random part of each image; set config.mask_ratio = 0."
        )
    return tower


@contextlib.contextmanager
def _shapes(model: PreTrainedModel | ModuleNetwork, run):
    """A network and ``run`` of it: without storage where its code allows that, else itself, left as it was."""
    if isinstance(model, (ModuleNetwork, ProjectedTower)):  # there is no configuration to build another from
        with evaluating(model):
            model.requires_grad_(True)
            yield model, run(model)
        return
    config = copy.deepcopy(model.config)
    if config._attn_implementation not in (None, "sdpa"):
        config._attn_implementation = "eager"  # other kernels need a device
    output = None
    try:
        with torch.device("meta"):
            twin = type(model)._from_config(config)
        if _parameter_shapes(twin) == _parameter_shapes(model):
            output = run(twin.eval().requires_grad_(True))
    except Exception as error:  # code of any origin may refuse the meta device in any way
        logger.debug("no meta twin of %s: %s", type(model).__name__, error)
    if output is not None:
        yield twin, output
        return
    with evaluating(model):
        model.requires_grad_(True)
        yield model, run(model)


def _check_in_one_place(model: nn.Module, name: str, argument: str) -> None:
    """Refuse a network whose weights are quantised, or are not all on one device.

    Raises:
        ValueError: what it is, and how to load it.
    """
    parts = list(model.modules())
    devices = {str(one) for part in parts for one in (getattr(part, "hf_device_map", None) or {}).values()}
    # To embed alone, several GPUs do.
    is_spread = len(devices) > 1 and (bool(argument) or bool(devices & {"cpu", "disk"}))
    quantizers = [part.hf_quantizer for part in parts if getattr(part, "hf_quantizer", None) is not None]
    if any(getattr(quantizer, "pre_quantized", False) for quantizer in quantizers):
        raise ValueError(
            f"{flag(argument)}={name} is a checkpoint of quantised weights, and floating-point ones are needed; give "
            f"the checkpoint that it was quantised from."
        )
    if quantizers:
        kind = "is quantised"
    elif is_spread or "disk" in devices:
        kind = f"is spread by device_map over {', '.join(sorted(devices))}"
    else:
        return
    remedy = f"{flag(argument, 'dtype')} bfloat16" if argument else "dtype=torch.bfloat16"
    raise ValueError(
        f"{flag(argument)}={name} {kind}, and it is moved and computed with as one network of floating-point weights; "
        f"load it as such, in bfloat16 if memory is short ({remedy})."
    )


def _output_of_images(network: PreTrainedModel, size: tuple[int, int], options: dict):
    first = next(network.parameters())
    images = torch.zeros(2, 3, *size, device=first.device, dtype=first.dtype)
    return network(pixel_values=images, **options)


def _takes_images(network: PreTrainedModel, size: tuple[int, int], options: dict) -> bool:
    try:
        _output_of_images(network, size, options)
    except Exception as error:  # each network refuses images in its own way
        logger.debug("%s refuses images of %s: %s", type(network).__name__, size, error)
        return False
    return True


def _inputs_besides_images(network: PreTrainedModel) -> list[str]:
    """Names of the arguments without which the network cannot run, apart from the images."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [
        name
        for name, parameter in _inputs(network).items()
        if name != "pixel_values" and parameter.default is inspect.Parameter.empty and parameter.kind in named
    ]


def _inputs(network: nn.Module):
    """Arguments of a network's forward pass; those of the tower where a projection follows it."""
    network = network.tower if isinstance(network, ProjectedTower) else network
    return inspect.signature(network.forward).parameters


def _input_channels(network: PreTrainedModel) -> int | None:
    """Number of channels of the images that the network reads; None where it cannot be found."""
    given = getattr(network.config, "num_channels", None)
    if isinstance(given, int):
        return given
    stems = (module.in_channels for module in network.modules() if isinstance(module, torch.nn.Conv2d))
    return next(stems, None)


def _reads_videos(network: PreTrainedModel) -> bool:
    config = network.config
    frames = getattr(config, "num_frames", None) or getattr(config, "tubelet_size", None)
    return bool(frames) or any(isinstance(module, torch.nn.Conv3d) for module in network.modules())


def class_name(network: nn.Module) -> str:
    """Name of a network's class, for messages and cards; of timm with its architecture."""
    if isinstance(network, ProjectedTower):
        return f"{type(network.tower).__name__} with projection"
    if isinstance(network, ModuleNetwork):
        return type(network.module).__name__
    # One class has all networks of timm.
    architecture = getattr(network.config, "architecture", None)
    return f"{type(network).__name__} {architecture}" if isinstance(architecture, str) else type(network).__name__


def _sides(value) -> tuple[int, int] | None:
    """``(h, w)`` of an entry of a configuration that is a number or a pair; None for anything else."""
    if isinstance(value, int) and value > 0:
        return (value, value)
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(side, int) for side in value):
        return tuple(value)
    return None


def _trained_size(network: PreTrainedModel) -> tuple[int, int] | None:
    return _sides(getattr(network.config, "image_size", None))


def _parameter_shapes(model: PreTrainedModel) -> list[tuple[str, torch.Size]]:
    return [(name, value.shape) for name, value in model.named_parameters()]


def unfreeze(network: torch.nn.Module) -> None:
    """Undo ``Backbone.freeze`` of a network, or of one that it is a copy of; what was frozen before stays so."""
    for module, names in forget_freezing(network):
        for name in names:
            if parametrize.is_parametrized(module, name):  # since it was frozen
                module.parametrizations[name].requires_grad_(True)
            elif module._parameters.get(name) is not None:  # else the user took it away since
                module._parameters[name].requires_grad_(True)


def forget_freezing(network: torch.nn.Module) -> list[tuple[torch.nn.Module, list[str]]]:
    """Leave a network as it is from now on: what is frozen in it after this was frozen by the user.

    Returns:
        Modules of which ``Backbone.freeze`` had frozen parameters, with the names of these.
    """
    modules = list(network.modules())
    return [(module, vars(module).pop(_FROZEN)) for module in modules if _FROZEN in vars(module)]


@contextlib.contextmanager
def evaluating(model: torch.nn.Module):
    """Set evaluation mode, and restore mode and ``requires_grad`` of every part on exit."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield model.eval()
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


def _reached(output: Tensor, names: dict[Tensor, str]) -> set[str]:
    """Names of the parameters that an output depends on, by its graph."""
    found = set()
    seen = set()
    todo = [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [function for function, _ in node.next_functions]
            found.add(names.get(getattr(node, "variable", None)))  # only leaves of the graph have one
    return found - {None}


def _layout(model: PreTrainedModel, output, size: tuple[int, int], argument: str) -> Layout:
    hidden = output.last_hidden_state
    name = class_name(model)
    if hidden.dim() not in (3, 4):
        raise ValueError(f"{flag(argument)}: {name} gives features of shape {tuple(hidden.shape)}, not of images.")
    if len(hidden) != 2:
        raise ValueError(f"{flag(argument)}: {name} packs images into one row of features; give a network of images.")
    queries = getattr(model.config, "num_queries", None)
    if getattr(output, "encoder_last_hidden_state", None) is not None or (queries and hidden.shape[1] == queries):
        raise ValueError(
            f"{flag(argument)}: {name} gives what its decoder asks of an image, not features of the image; give its "
            f"backbone alone."
        )
    layout = _positions(model, hidden, size)
    if getattr(output, _CLASS_OUTPUT, None) is not None:
        layout = layout._replace(class_output=_CLASS_OUTPUT)
    for field in _POOLED_OUTPUTS:
        if getattr(output, field, None) is not None:
            return layout._replace(pooled=field)
    return layout._replace(pooled="")


def _positions(model: PreTrainedModel, hidden: Tensor, size: tuple[int, int]) -> Layout:
    """The layout of ``last_hidden_state`` alone."""
    timm_model = getattr(model, "timm_model", None)
    if hidden.dim() == 4:
        if timm_model is not None:
            return Layout(tokens=False, channels_last=getattr(timm_model, "output_fmt", "NCHW") == "NHWC")
        return Layout(tokens=False, channels_last=is_channels_last(tuple(hidden.shape), size))
    if timm_model is not None:
        return Layout(tokens=True, prefix=getattr(timm_model, "num_prefix_tokens", 0))
    suffix = getattr(model.config, _SUFFIX_ENTRY, None) or 0
    return token_layout(hidden.shape[1], size, _sides(getattr(model.config, "patch_size", None)), suffix)
