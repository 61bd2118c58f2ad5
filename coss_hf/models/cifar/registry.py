"""CIFAR networks by name: their configurations, and their image processor."""

from transformers import PreTrainedConfig, ViTImageProcessor

from .configuration_cifar_resnet import CifarResNetConfig
from .configuration_cifar_vgg import CifarVGGConfig
from .configuration_cifar_wide_resnet import CifarWideResNetConfig

WIDE = {"stem_width": 32, "hidden_sizes": [64, 128, 256]}
TWICE = {"hidden_sizes": [32, 64, 128]}
ONCE = {"hidden_sizes": [16, 32, 64]}
CIFAR_NETWORKS = {
    "resnet20": (CifarResNetConfig, {"depth": 20}),
    "resnet32": (CifarResNetConfig, {"depth": 32}),
    "resnet44": (CifarResNetConfig, {"depth": 44}),
    "resnet56": (CifarResNetConfig, {"depth": 56}),
    "resnet110": (CifarResNetConfig, {"depth": 110}),
    "resnet8x4": (CifarResNetConfig, {"depth": 8, **WIDE}),
    "resnet32x4": (CifarResNetConfig, {"depth": 32, **WIDE}),
    "vgg8": (CifarVGGConfig, {"layers_per_stage": 1}),
    "vgg13": (CifarVGGConfig, {"layers_per_stage": 2}),
    "wrn_16_2": (CifarWideResNetConfig, {"depth": 16, **TWICE}),
    "wrn_40_2": (CifarWideResNetConfig, {"depth": 40, **TWICE}),
    "wrn_40_1": (CifarWideResNetConfig, {"depth": 40, **ONCE}),
}


def cifar_config(name: str, **overrides) -> PreTrainedConfig:
    """Build the configuration of one of `CIFAR_NETWORKS`; `overrides` are arguments of its class.

    Raises:
        ValueError: an unknown name, or an override that defines no such network.
    """
    if name not in CIFAR_NETWORKS:
        raise ValueError(f"name={name!r} is no CIFAR network: use one of {', '.join(CIFAR_NETWORKS)}")
    kind, arguments = CIFAR_NETWORKS[name]
    return kind(**{**arguments, **overrides})


def cifar_image_processor(mean: tuple[float, ...], std: tuple[float, ...], size: int = 32) -> ViTImageProcessor:
    """Build an image processor: to `size` x `size` pixels, scaled to [0, 1], normalised with `mean` and `std`."""
    return ViTImageProcessor(size={"height": size, "width": size}, image_mean=list(mean), image_std=list(std))
