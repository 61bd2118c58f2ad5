from transformers import ViTImageProcessor

from .configuration_cifar_resnet import CifarResNetConfig

WIDE = {"stem_width": 32, "hidden_sizes": [64, 128, 256]}
CIFAR_NETWORKS = {
    "resnet20": {"depth": 20},
    "resnet32": {"depth": 32},
    "resnet44": {"depth": 44},
    "resnet56": {"depth": 56},
    "resnet110": {"depth": 110},
    "resnet8x4": {"depth": 8, **WIDE},
    "resnet32x4": {"depth": 32, **WIDE},
}


def cifar_config(name: str, **overrides) -> CifarResNetConfig:
    """Configuration of one of `CIFAR_NETWORKS`; `overrides` are arguments of `CifarResNetConfig`.

    Raises:
        ValueError: for an unknown name, or an override that defines no such network.
    """
    if name not in CIFAR_NETWORKS:
        raise ValueError(f"name={name!r} is no CIFAR network: use one of {', '.join(CIFAR_NETWORKS)}")
    return CifarResNetConfig(**{**CIFAR_NETWORKS[name], **overrides})


def cifar_image_processor(mean: tuple[float, ...], std: tuple[float, ...], size: int = 32) -> ViTImageProcessor:
    """Image processor that resizes to `size` x `size` pixels, scales to [0, 1] and normalises with `mean` and `std`."""
    return ViTImageProcessor(size={"height": size, "width": size}, image_mean=list(mean), image_std=list(std))
