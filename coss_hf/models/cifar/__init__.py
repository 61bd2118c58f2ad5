"""Networks for 32x32 images, registered with AutoConfig, AutoModel and AutoModelForImageClassification."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_cifar_resnet import CifarResNetConfig
from .configuration_cifar_vgg import CifarVGGConfig
from .configuration_cifar_wide_resnet import CifarWideResNetConfig
from .convert import CIFAR10_LABELS, convert_akamaster
from .modeling_cifar_resnet import CifarResNetForImageClassification, CifarResNetModel
from .modeling_cifar_vgg import CifarVGGForImageClassification, CifarVGGModel
from .modeling_cifar_wide_resnet import CifarWideResNetForImageClassification, CifarWideResNetModel
from .registry import CIFAR_NETWORKS, cifar_config, cifar_image_processor

__all__ = [
    "CIFAR10_LABELS",
    "CIFAR_NETWORKS",
    "CifarResNetConfig",
    "CifarResNetForImageClassification",
    "CifarResNetModel",
    "CifarVGGConfig",
    "CifarVGGForImageClassification",
    "CifarVGGModel",
    "CifarWideResNetConfig",
    "CifarWideResNetForImageClassification",
    "CifarWideResNetModel",
    "cifar_config",
    "cifar_image_processor",
    "convert_akamaster",
]

for config, model, classifier in (
    (CifarResNetConfig, CifarResNetModel, CifarResNetForImageClassification),
    (CifarVGGConfig, CifarVGGModel, CifarVGGForImageClassification),
    (CifarWideResNetConfig, CifarWideResNetModel, CifarWideResNetForImageClassification),
):
    AutoConfig.register(config.model_type, config)
    AutoModel.register(config, model)
    AutoModelForImageClassification.register(config, classifier)
    # save_pretrained copies the files of code into the checkpoint.
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModel")
    classifier.register_for_auto_class("AutoModelForImageClassification")
