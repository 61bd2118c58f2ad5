"""Conversion of checkpoints of github.com/akamaster/pytorch_resnet_cifar10."""

import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from .configuration_cifar_resnet import CifarResNetConfig
from .modeling_cifar_resnet import CifarResNetForImageClassification

CIFAR10_LABELS = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def convert_akamaster(folder: str | Path) -> CifarResNetForImageClassification:
    """Load a CIFAR-10 network of that source from its state dict in FOLDER/model.safetensors.

    The depth is read off the keys; shortcuts are padding ones. Inputs are normalised with the ImageNet constants.

    Raises:
        ValueError: a missing or damaged file, or tensors that are not exactly those of such a network.
    """
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"folder={str(folder)!r} has no model.safetensors: give the folder of the checkpoint")
    try:
        weights = {rename(key): value for key, value in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"folder={str(folder)!r}: model.safetensors is damaged ({error}); get it again") from error
    blocks = {key.split(".")[3] for key in weights if key.startswith("resnet.stages.0.")}
    if not blocks:
        raise ValueError(f"folder={str(folder)!r}: no key starts with 'layer1.': give a checkpoint of that source")
    config = CifarResNetConfig(
        depth=6 * len(blocks) + 2,
        shortcut="padding",
        id2label=dict(enumerate(CIFAR10_LABELS)),
        label2id={label: i for i, label in enumerate(CIFAR10_LABELS)},
    )
    model = CifarResNetForImageClassification(config)
    # The checkpoints are older than the num_batches_tracked buffer; it keeps its 0.
    expected = {key: value.shape for key, value in model.state_dict().items() if "num_batches_tracked" not in key}
    found = {key: value.shape for key, value in weights.items()}
    wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if wrong:
        raise ValueError(
            f"folder={str(folder)!r} is no resnet{config.depth} for CIFAR-10: missing, unexpected or misshapen "
            f"(by their names here): {', '.join(wrong[:5])} ({len(wrong)} in all); give an unchanged checkpoint"
        )
    model.load_state_dict(weights, strict=False)
    return model.eval()


def rename(key: str) -> str:
    """The name of a tensor of that source in this package."""
    if key.startswith("linear."):
        return key.replace("linear", "classifier", 1)
    return "resnet." + re.sub(r"^layer(\d)", lambda match: f"stages.{int(match[1]) - 1}", key)
