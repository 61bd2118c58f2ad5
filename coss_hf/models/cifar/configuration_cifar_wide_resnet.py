from .configuration_cifar import CifarConfig


class CifarWideResNetConfig(CifarConfig):
    """Wide residual network of depth 6n + 4 for 32x32 images (Zagoruyko & Komodakis 2016, arXiv:1605.07146).

    Args:
        depth: number of weighted layers, shortcuts counted once, 6n + 4 with n blocks in each of the three stages.
        stem_width: channels after the 3x3 stem.
        hidden_sizes: channels of the three stages, 16, 32 and 64 times the widening factor; the last is the dimension
            of the embedding.
        num_channels: channels of the input image.
        image_size: side in pixels of the training images; the network accepts any size.

    Raises:
        ValueError: for a depth or list of widths that defines no such network.
    """

    model_type = "cifar_wide_resnet"

    depth: int = 40
    stem_width: int = 16
    hidden_sizes: list[int] | tuple[int, ...] = (32, 64, 128)
    num_channels: int = 3
    image_size: int = 32

    def __post_init__(self, **kwargs):
        if self.depth < 10 or self.depth % 6 != 4:
            raise ValueError(f"depth={self.depth} is not 6n + 4: use 10, 16, 22, 28 or 40")
        super().__post_init__(**self.check(3, "stem_width", **kwargs))
