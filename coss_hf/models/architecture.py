"""What kind of network a module is, and whether it was trained, read off its layers, whoever built it."""

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

TRANSFORMER = "transformer"
BATCH_NORM = "convolutional, with batch norm"
LAYER_NORM = "without batch norm and attention"

# How attention calls its projections: in Transformers, timm, torchvision and most other code.
_QUERIES = re.compile(
    r"(to_|w)?qkv?(_proj|_bias)?|(to_|w)?q(_?proj|_?lin|_bias|_norm)?|query(_proj|_projection|_layer)?|"
    r"quer(y|ies)_keys?_values?|in_proj(_weight)?|convolution_projection_query",
    re.IGNORECASE,
)
# Networks with a layer of attention here and there are convolutional.
MIN_ATTENTION_SHARE = 0.1


def family(network: nn.Module) -> str:
    """Return the family of a network: ``TRANSFORMER``, ``BATCH_NORM`` or ``LAYER_NORM``.

    The norm that most of its channels go through tells networks with batch norm from those without, among which those
    with attention are transformers. Of the networks with batch norm those are transformers of whose parameters a tenth
    or more belong to attention, not counting a single layer of it that pools.

    Args:
        network: any module.

    Example:
        >>> family(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
        'convolutional, with batch norm'
        >>> family(nn.TransformerEncoderLayer(16, 2))
        'transformer'
    """
    batch_norm, other_norm = _channels(network)
    attention = list(_attention(network))
    total = sum(parameter.numel() for parameter in network.parameters())
    share = sum(parameter.numel() for module in attention for parameter in module.parameters()) / max(total, 1)
    if batch_norm <= other_norm:
        return TRANSFORMER if attention else LAYER_NORM
    return TRANSFORMER if len(attention) > 1 and share >= MIN_ATTENTION_SHARE else BATCH_NORM


def is_trained(network: nn.Module) -> bool:
    """Return whether a network has weights that were trained, or copied from trained ones.

    Norms tell: at random weights each of their scales is one number everywhere, and each shift is 0; and a batch norm
    that has seen no images has a mean of 0. Of a network without norms, such as VGG, the biases tell: at random weights
    those of a layer are one number, or drawn as PyTorch draws them, none above 1 / sqrt(inputs of a unit). A network
    without norms and biases counts as random.

    Args:
        network: any module.

    Example:
        >>> is_trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        False
    """
    norms = [module for module in network.modules() if _is_batch_norm(module) or _is_other_norm(module)]
    norms = [norm for norm in norms if _has_statistics(norm)]  # the others cannot tell
    if norms:
        return any(_has_moved(norm) for norm in norms)
    return any(_has_moved_biases(layer) for layer in network.modules())


def _has_statistics(norm: nn.Module) -> bool:
    """Whether a norm has a scale, a shift or a mean, which ``_has_moved`` reads."""
    return any(isinstance(getattr(norm, name, None), Tensor) for name in ("weight", "bias", "running_mean"))


@torch.no_grad()
def _has_moved(norm: nn.Module) -> bool:
    mean = getattr(norm, "running_mean", None)
    if isinstance(mean, Tensor) and not mean.any():
        return False  # it has seen no images, however its scales were drawn
    scale = getattr(norm, "weight", None)
    shift = getattr(norm, "bias", None)
    if isinstance(shift, Tensor) and shift.any():
        return True
    if isinstance(scale, Tensor) and scale.numel():
        return bool((scale != scale.flatten()[0]).any())
    return isinstance(mean, Tensor)  # without a scale its statistics are all that there is


@torch.no_grad()
def _has_moved_biases(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    bias = getattr(layer, "bias", None)
    if not (isinstance(weight, Tensor) and isinstance(bias, Tensor) and weight.dim() >= 2 and bias.numel()):
        return False
    bound = weight[0].numel() ** -0.5  # of PyTorch's own initial values
    return bool((bias != bias.flatten()[0]).any() and bias.abs().max() > bound * (1 + 1e-5))


def _channels(network: nn.Module) -> tuple[int, int]:
    """Numbers of channels that go through batch norms, and through other norms."""
    batch = other = 0
    for module in network.modules():
        count = max((parameter.numel() for parameter in _of_its_own(module)), default=0)
        if _is_batch_norm(module):
            batch += max(count, getattr(module, "num_features", 0))
        elif _is_other_norm(module):
            other += max(count, 1)
    return batch, other


def _of_its_own(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _is_batch_norm(module: nn.Module) -> bool:
    # Frozen ones are classes of their own in torchvision, timm and Transformers.
    named = "batchnorm" in type(module).__name__.lower()
    return isinstance(module, _BatchNorm) or (named and not _is_layer_or_block(module))


def _is_other_norm(module: nn.Module) -> bool:
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
        return True
    if "norm" not in type(module).__name__.lower() or _is_batch_norm(module) or _is_layer_or_block(module):
        return False
    return any(True for _ in module.parameters(recurse=False))


def _is_layer_or_block(module: nn.Module) -> bool:
    """Whether a module multiplies by matrices, and is no norm, whatever its name: timm's ``NormFreeBlock``, for one.

    What norms contain, such as the activation of ``FilterResponseNormAct2d``, has one number per channel at most.
    """
    if isinstance(module, (nn.Linear, _ConvNd)):  # with normalised weights
        return True
    return any(parameter.dim() > 1 for child in module.children() for parameter in child.parameters())


def _attention(network: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that project their inputs to queries."""
    inside: set[nn.Module] = set()
    for module in network.modules():
        if module in inside or not _projects_to_queries(module):
            continue
        inside.update(module.modules())
        yield module


def _projects_to_queries(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return True
    names = [name for name, _ in module.named_children()]
    names += [name for name, _ in module.named_parameters(recurse=False)]
    return any(_QUERIES.fullmatch(name) for name in names)
