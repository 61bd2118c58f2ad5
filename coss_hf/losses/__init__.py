"""One file for each loss; ``base`` has the contract that they follow."""

from coss_hf.utils.lazy import lazy_names

__all__ = ["LOSSES", "Citation", "DistillationLoss", "build_loss"]
__getattr__ = lazy_names(
    __name__,
    {
        "LOSSES": "registry",
        "Citation": "base",
        "DistillationLoss": "base",
        "build_loss": "registry",
    },
)
