"""Any `nn.Module` as the network of a `Backbone`: what its output means, how it is saved and loaded again."""

import copy
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from coss_hf.features import Features
from coss_hf.models.pooling import channels_first
from coss_hf.utils.messages import did_you_mean, first_line, first_names, flag, get_logger

logger = get_logger(__name__)

MODEL_TYPE = "coss_hf_module"
WEIGHTS_FILE = "model.safetensors"
OUTPUT_FORMS = (
    "a tensor (b, d), (b, c, h, w) or (b, tokens, d), a list of maps (b, c, h, w), or an object with last_hidden_state "
    "or pooler_output"
)


class UnknownOutput(ValueError):
    """No embedding can be read from what a module returns; the message says what it returns, and the remedy."""


class ModuleConfig(PreTrainedConfig):
    """What is known of a plain module, next to its weights: ``Backbone`` writes pooling and size into it."""

    model_type = MODEL_TYPE


AutoConfig.register(MODEL_TYPE, ModuleConfig, exist_ok=True)


@dataclass
class ModuleOutput:
    """The output of a module in the form that pooling reads.

    Attributes:
        last_hidden_state: a map ``(b, d, h, w)``, of 1 x 1 where the module gives one embedding alone, or tokens.
        pooler_output: the module's own embedding ``(b, d)``; None where it gives none.
        hidden_states: outputs of its layers, where the module gives them by this name.
        maps: feature maps ``(b, c, h, w)``, from the first to the last.
        logits: class scores, where the module gives them.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    hidden_states: Sequence[Tensor] | None = None
    maps: tuple[Tensor, ...] = ()
    logits: Tensor | None = None


class ModuleNetwork(nn.Module):
    """A module with the few things that a network of Transformers has and a `Backbone` needs.

    Args:
        module: maps images ``(b, 3, h, w)`` to one of ``OUTPUT_FORMS``. It is not copied.
        embedding: takes the module's output, and returns embeddings ``(b, d)``; None for an output of a known form.
        maps: names of the submodules whose outputs are feature maps; None to find one for each size of a map.
        argument: the command-line flag that errors name.

    Raises:
        ValueError: a module without parameters, with state that is no tensor, or without a submodule of these names.
    """

    main_input_name = "pixel_values"
    supports_gradient_checkpointing = False
    _no_split_modules = None

    def __init__(
        self,
        module: nn.Module,
        embedding: Callable | None = None,
        maps: Sequence[str] | None = None,
        argument: str = "",
    ):
        super().__init__()
        self.module = module
        self.embedding = embedding
        self.maps = None if maps is None else list(maps)
        self.argument = argument
        self.name_or_path = module_name(module)
        self.config = ModuleConfig(architecture=f"{type(module).__module__}.{type(module).__qualname__}")
        self.config.embedding_function = None if embedding is None else _function_name(embedding)
        patch = getattr(getattr(module, "patch_embed", module), "patch_size", None)
        if isinstance(patch, (int, tuple, list)):
            self.config.patch_size = patch
        self._check()

    def _check(self) -> None:
        given = f"{flag(self.argument)}={self.name_or_path}"
        if next(self.module.parameters(), None) is None:
            raise ValueError(f"{given} has no parameters; give a network that has some.")
        others = [name for name, value in self.module.state_dict().items() if not isinstance(value, Tensor)]
        if others:
            raise ValueError(
                f"{given} keeps {first_names(others)} in its state dict, which are no tensors and cannot be saved; "
                f"give a network whose state is tensors alone."
            )
        names = dict(self.module.named_modules())
        for name in self.maps or ():
            if name not in names:
                hint = did_you_mean(difflib.get_close_matches(name, names, n=3))
                raise ValueError(f"maps: {self.name_or_path} has no submodule {name!r}.{hint}")

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False) -> ModuleOutput:
        """Run the module on normalised images ``(b, 3, h, w)``.

        Raises:
            UnknownOutput: no embedding can be read from what it returns.
        """
        if not output_hidden_states:
            return self._read(self.module(pixel_values), pixel_values)
        if self.maps is None:
            own = self._read(self.module(pixel_values), pixel_values)
            self.maps = [] if own.hidden_states or own.maps else self._find_maps(pixel_values)
        outputs, output = self._run_with_outputs(pixel_values, self.maps)
        read = self._read(output, pixel_values)
        found = [self._checked_map(name, outputs.get(name)) for name in self.maps]
        read.maps = channels_first(found, tuple(pixel_values.shape[2:])) or read.maps
        return read

    def _read(self, output, pixel_values: Tensor) -> ModuleOutput:
        """The output in one form, whichever of ``OUTPUT_FORMS`` it has."""
        maps = channels_first(_as_maps(output), tuple(pixel_values.shape[2:]))
        if self.embedding is not None:
            return _vector(self._embedded(output), maps=maps)
        if isinstance(output, Features):
            return _vector(output.embedding, maps=tuple(output.maps), logits=output.logits)
        if maps:  # the last one is pooled by its own axes
            return ModuleOutput(_as_maps(output)[-1], maps=maps if len(maps) > 1 else ())
        hidden = _entry(output, "last_hidden_state")
        pooled = _entry(output, "pooler_output")
        if _is_tensor(output, 2):
            return _vector(output)
        if _is_tensor(output, 3):
            return ModuleOutput(output)
        if hidden is None and _is_tensor(pooled, 2, 4):
            return _vector(pooled.flatten(1), logits=_entry(output, "logits"))
        if _is_tensor(hidden, 3, 4):
            return ModuleOutput(hidden, pooled, _entry(output, "hidden_states"), logits=_entry(output, "logits"))
        raise UnknownOutput(
            f"{flag(self.argument)}={self.name_or_path} returns {_described(output)}, from which no embedding can be "
            f"read; give a module that returns {OUTPUT_FORMS}, or Backbone.from_module(module, embedding=...) with a "
            f"function from this output to embeddings (b, d)."
        )

    def _embedded(self, output) -> Tensor:
        name = self.config.embedding_function
        given = f"embedding={name} of {self.name_or_path}"
        try:
            embedding = self.embedding(output)
        except Exception as error:  # code of any origin
            raise UnknownOutput(
                f"{given} fails on the module's output, {_described(output)} ({type(error).__name__}: "
                f"{first_line(error)}); give a function from this output to embeddings (b, d)."
            ) from error
        if not _is_tensor(embedding, 2):
            raise UnknownOutput(f"{given} returns {_described(embedding)}; it must return embeddings, a tensor (b, d).")
        return embedding

    def _run_with_outputs(self, pixel_values: Tensor, names: Sequence[str]) -> tuple[dict, object]:
        """Outputs of submodules, in the order in which they end, and the output of the module."""
        outputs = {}

        def keep(name: str) -> Callable:
            def hook(module, inputs, output) -> None:
                outputs.pop(name, None)
                outputs[name] = output

            return hook

        handles = [self.module.get_submodule(name).register_forward_hook(keep(name)) for name in names]
        try:
            return outputs, self.module(pixel_values)
        finally:
            for handle in handles:
                handle.remove()

    def _find_maps(self, pixel_values: Tensor) -> list[str]:
        """Names of the two outermost levels of submodules that give the last map of each size; none for one size."""
        candidates = [name for name, _ in self.module.named_modules() if name and name.count(".") < 2]
        outputs, _ = self._run_with_outputs(pixel_values, candidates)
        count = len(pixel_values)
        found = {name: output for name, output in outputs.items() if _is_tensor(output, 4) and len(output) == count}
        maps = channels_first(list(found.values()), tuple(pixel_values.shape[2:]))
        sizes = {name: tuple(one.shape[-2:]) for name, one in zip(found, maps, strict=True)}
        last_of_size = {size: name for name, size in sizes.items() if min(size) > 1}
        return list(last_of_size.values()) if len(last_of_size) > 1 else []

    def _checked_map(self, name: str, output) -> Tensor:
        if not _is_tensor(output, 4):
            raise ValueError(
                f"maps: {name} of {self.name_or_path} gives {_described(output)}, no feature map (b, c, h, w); name "
                f"other submodules."
            )
        return output

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the module's state dict by its own keys to ``model.safetensors``, and what is known of it.

        Args:
            folder: made where it is missing.
            state_dict: that of this network, instead of its own.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(folder)
        tensors = {}
        stored = set()
        for key, value in (self.state_dict() if state_dict is None else state_dict).items():
            value = value.detach().cpu().contiguous()
            # Tied weights are written under each of their names: anybody's load_state_dict takes the file.
            tensors[key.removeprefix("module.")] = value.clone() if value.data_ptr() in stored else value
            stored.add(value.data_ptr())
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})

    def load_weights(self, path: str | Path) -> "ModuleNetwork":
        """Read what ``save_pretrained`` wrote, strictly.

        Raises:
            ValueError: the module has other parameters, or the file cannot be read.
        """
        try:
            self.module.load_state_dict(load_file(path), strict=True)
        except Exception as error:  # other keys and shapes, cut short, not readable
            raise ValueError(
                f"module={self.name_or_path} does not fit the weights in {path} ({' '.join(str(error).split())}); give "
                f"a module that is built as the trained one was."
            ) from error
        return self

    @staticmethod
    def saved_weights(folder: str | Path) -> dict[str, Tensor]:
        """What ``save_pretrained`` wrote, by the keys of a ``ModuleNetwork``."""
        return {f"module.{key}": value for key, value in load_file(Path(folder, WEIGHTS_FILE)).items()}

    def at_random(self) -> "ModuleNetwork":
        """A copy with weights drawn anew from torch's global generator.

        Each layer draws as PyTorch does by default (its ``reset_parameters``). Parameters that no layer resets are
        drawn from a normal distribution of standard deviation 0.02, or are 1 (scales) or 0 (shifts).
        """
        network = copy.deepcopy(self)
        reset = set()
        for module in network.modules():
            if callable(getattr(module, "reset_parameters", None)):
                module.reset_parameters()
                reset |= {id(parameter) for parameter in module.parameters()}
        for name, parameter in network.named_parameters():
            if id(parameter) not in reset:
                _draw(name.rpartition(".")[2], parameter)
        return network


def module_name(module: nn.Module) -> str:
    """What a module is called in records and messages: its class and where that comes from, never a name on the Hub."""
    cfg = getattr(module, "pretrained_cfg", None)
    architecture = cfg.get("architecture") if isinstance(cfg, Mapping) else getattr(cfg, "architecture", None)
    return f"{architecture} (timm)" if architecture else f"{type(module).__name__} ({type(module).__module__})"


def copy_sharing_tensors(module: nn.Module) -> nn.Module:
    """A module of the same parameters and buffers whose submodules can be replaced without changing the original.

    Both keep them in the same dictionaries: ``to`` puts new tensors there, for buffers always, and the original must
    not stay behind with those of before the training.
    """
    memo = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    for part in module.modules():
        memo |= {id(tensors): tensors for tensors in (part._parameters, part._buffers)}
    return copy.deepcopy(module, memo)


def _function_name(function: Callable) -> str:
    return getattr(function, "__qualname__", None) or type(function).__name__


def _vector(embedding: Tensor, maps: tuple[Tensor, ...] = (), logits: Tensor | None = None) -> ModuleOutput:
    return ModuleOutput(embedding[:, :, None, None], embedding, maps=maps, logits=logits)


def _is_tensor(value, *dimensions: int) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() in dimensions


def _entry(output, name: str):
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _as_maps(output) -> tuple[Tensor, ...]:
    """Maps, where the output is one or a list of them."""
    values = output if isinstance(output, (list, tuple)) else (output,)
    return tuple(values) if values and all(_is_tensor(value, 4) for value in values) else ()


def _described(output) -> str:
    if isinstance(output, Tensor):
        return f"a tensor {tuple(output.shape)} of {output.dtype}"
    kind = f"a {type(output).__name__}"
    if isinstance(output, Mapping):
        return f"{kind} of {first_names([f'{key!r}' for key in output])}"
    if isinstance(output, (list, tuple)):
        shapes = [str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in output]
        return f"{kind} of {first_names(shapes)}"
    return kind


@torch.no_grad()
def _draw(name: str, parameter: Tensor) -> None:
    if parameter.dim() > 1:
        parameter.normal_(std=0.02)
    else:
        parameter.fill_(0.0 if "bias" in name else 1.0)
