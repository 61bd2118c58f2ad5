"""Networks to train as classifiers: CIFAR networks at random weights, or checkpoints."""

from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from coss_hf.models.cifar.registry import CIFAR_NETWORKS, cifar_config, cifar_image_processor
from coss_hf.utils.messages import first_line

# Statistics of CIFAR-100's channels, in [0, 1].
CIFAR_MEAN = (0.5071, 0.4867, 0.4408)
CIFAR_STD = (0.2675, 0.2565, 0.2761)


def load_classifier(
    name: str,
    class_names: list[str],
    *,
    size: int | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    hidden_sizes: list[int] | None = None,
) -> tuple[PreTrainedModel, object]:
    """Load a network to train as a classifier, and its image processor.

    Args:
        name: one of `CIFAR_NETWORKS`, at random weights, or the Hub name or folder of a checkpoint, whose classifier is
            replaced by a random one where the number of classes differs.
        class_names: names of the classes, by class number.
        size: side of a CIFAR network's input in pixels; by default 32. A checkpoint has its own.
        mean: mean of each channel in [0, 1], for a CIFAR network; by default CIFAR-100's.
        std: standard deviation of each channel in [0, 1], for a CIFAR network; by default CIFAR-100's.
        hidden_sizes: channels of a CIFAR network's stages; by default those of its name.

    Raises:
        ValueError: an unknown name, or `mean`, `std` or `hidden_sizes` for a checkpoint.
    """
    labels = {"id2label": dict(enumerate(class_names)), "label2id": {name: i for i, name in enumerate(class_names)}}
    if name in CIFAR_NETWORKS:
        for option, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) != 3:
                raise ValueError(f"--{option} {values}: give three numbers, for red, green and blue.")
        if size is None:
            size = 32
        widths = {} if hidden_sizes is None else {"hidden_sizes": hidden_sizes}
        config = cifar_config(name, **labels, **widths, image_size=size)
        model = AutoModelForImageClassification.from_config(config)
        return model, cifar_image_processor(mean or CIFAR_MEAN, std or CIFAR_STD, size)
    networks = ", ".join(CIFAR_NETWORKS)
    if mean or std or hidden_sizes:
        raise ValueError(f"--mean, --std and --hidden_sizes are for {networks}; --model {name} has its own.")
    try:
        model = AutoModelForImageClassification.from_pretrained(name, ignore_mismatched_sizes=True, **labels)
    except Exception as error:  # damaged files of every format
        raise ValueError(
            f"--model {name} is no network that can classify images ({first_line(error)}); give a complete checkpoint, "
            f"or one of {networks}."
        ) from error
    try:
        return model, AutoImageProcessor.from_pretrained(name)
    except Exception as error:  # damaged files, packages that are not installed
        raise ValueError(
            f"--model {name}: its image processor cannot be loaded ({first_line(error)}); give it a correct "
            f"preprocessor_config.json."
        ) from error
