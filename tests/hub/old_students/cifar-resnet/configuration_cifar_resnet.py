from .configuration_cifar import CifarConfig


class CifarResNetConfig(CifarConfig):
    """Residual network of depth 6n + 2 for 32x32 images (He et al. 2015, arXiv:1512.03385, section 4.2).

    Args:
        depth: number of weighted layers, 6n + 2 with n basic blocks in each of the three stages.
        stem_width: channels after the 3x3 stem.
        hidden_sizes: channels of the three stages; the last is the dimension of the embedding.
        shortcut: where a block changes the shape, `"projection"` is a 1x1 convolution and batch norm (option B),
            `"padding"` subsamples and zero-pads the channels on both sides (option A, no parameters).
        num_channels: channels of the input image.
        image_size: side in pixels of the training images; the network accepts any size.

    Raises:
        ValueError: for a depth, list of widths or shortcut that defines no such network.
    """

    model_type = "cifar_resnet"

    depth: int = 20
    stem_width: int = 16
    hidden_sizes: list[int] | tuple[int, ...] = (16, 32, 64)
    shortcut: str = "projection"
    num_channels: int = 3
    image_size: int = 32

    def __post_init__(self, **kwargs):
        if self.depth < 8 or self.depth % 6 != 2:
            raise ValueError(f"depth={self.depth} is not 6n + 2: use 8, 14, 20, 32, 44, 56 or 110")
        kwargs = self.check(3, "stem_width", **kwargs)
        if self.shortcut not in ("projection", "padding"):
            raise ValueError(f"shortcut={self.shortcut!r} is unknown: use 'projection' or 'padding'")
        widths = [self.stem_width, *self.hidden_sizes]
        if self.shortcut == "padding" and any(o < i or (o - i) % 2 for i, o in zip(widths, widths[1:])):
            raise ValueError(
                f"shortcut='padding' cannot pad the widths {widths} evenly on both sides: "
                "use widths growing by even steps, or shortcut='projection'"
            )
        super().__post_init__(**kwargs)
