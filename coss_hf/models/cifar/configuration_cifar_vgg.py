from .configuration_cifar import CifarConfig


class CifarVGGConfig(CifarConfig):
    """VGG with batch norm for 32x32 images, five stages (Simonyan & Zisserman 2014, arXiv:1409.1556).

    Args:
        layers_per_stage: 3x3 convolutions of each stage: 1 (VGG8) or 2 (VGG13).
        hidden_sizes: channels of the five stages; the last is the dimension of the embedding.
        num_channels: channels of the input image.
        image_size: side in pixels of the training images. 2x2 max-pooling follows stages 1 to 3, from 64 pixels on also
            stage 4.

    Raises:
        ValueError: for numbers that define no such network.
    """

    model_type = "cifar_vgg"

    layers_per_stage: int = 1
    hidden_sizes: list[int] | tuple[int, ...] = (64, 128, 256, 512, 512)
    num_channels: int = 3
    image_size: int = 32

    def __post_init__(self, **kwargs):
        super().__post_init__(**self.check(5, "layers_per_stage", **kwargs))
