from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from coss_hf.models.cifar.registry import CIFAR_NETWORKS, cifar_config, cifar_image_processor
from coss_hf.utils.messages import first_line

# Of CIFAR-100.
CIFAR_MEAN, CIFAR_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def load_classifier(
    name: str,
    class_names: list[str],
    *,
    size: int | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    hidden_sizes: list[int] | None = None,
) -> tuple[PreTrainedModel, object]:
    """A network to train as a classifier, and its image processor.

    Args:
        name: one of `CIFAR_NETWORKS`, at random weights, or the Hub name or folder of a checkpoint, whose classifier is
            replaced by a random one where the number of classes differs.
        class_names: by class number.
        size, mean, std: input of a CIFAR network: side in pixels (32), and statistics of each channel in [0, 1]
            (CIFAR-100's). A checkpoint has its own.
        hidden_sizes: channels of a CIFAR network's stages, other than its name says.

    Raises:
        ValueError: a name that is neither, or `mean`, `std` or `hidden_sizes` for a checkpoint.
    """
    labels = {"id2label": dict(enumerate(class_names)), "label2id": {name: i for i, name in enumerate(class_names)}}
    if name in CIFAR_NETWORKS:
        for option, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) != 3:
                raise ValueError(f"--{option} {values}: give three numbers, for red, green and blue.")
        size = 32 if size is None else size
        widths = {} if hidden_sizes is None else {"hidden_sizes": hidden_sizes}
        config = cifar_config(name, **labels, **widths, image_size=size)
        model = AutoModelForImageClassification.from_config(config)
        return model, cifar_image_processor(mean or CIFAR_MEAN, std or CIFAR_STD, size)
    networks = ", ".join(CIFAR_NETWORKS)
    if mean or std or hidden_sizes:
        raise ValueError(f"--mean, --std and --hidden_sizes are for {networks}; --model {name} has its own.")
    try:
        model = AutoModelForImageClassification.from_pretrained(name, ignore_mismatched_sizes=True, **labels)
        return model, AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model {name} is no network that can classify images ({first_line(error)}); give a whole checkpoint, or "
            f"one of {networks}."
        ) from error
