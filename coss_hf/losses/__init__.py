"""One file a loss."""

from coss_hf.utils.lazy import lazy_names

__all__ = ["LOSSES", "build_loss"]
__getattr__ = lazy_names(__name__, dict.fromkeys(__all__, "registry"))
