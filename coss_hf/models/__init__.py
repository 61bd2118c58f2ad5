from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .cifar import CIFAR_NETWORKS, cifar_config, cifar_image_processor
from .configuration_cifar_resnet import CifarResNetConfig
from .convert import CIFAR10_LABELS, convert_akamaster
from .modeling_cifar_resnet import CifarResNetForImageClassification, CifarResNetModel

__all__ = [
    "CIFAR10_LABELS",
    "CIFAR_NETWORKS",
    "CifarResNetConfig",
    "CifarResNetForImageClassification",
    "CifarResNetModel",
    "cifar_config",
    "cifar_image_processor",
    "convert_akamaster",
]

AutoConfig.register("cifar_resnet", CifarResNetConfig)
AutoModel.register(CifarResNetConfig, CifarResNetModel)
AutoModelForImageClassification.register(CifarResNetConfig, CifarResNetForImageClassification)
# save_pretrained copies the two files of code into the checkpoint.
CifarResNetConfig.register_for_auto_class()
CifarResNetModel.register_for_auto_class("AutoModel")
CifarResNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")
