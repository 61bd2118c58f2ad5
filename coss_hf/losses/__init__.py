"""One file for each loss; ``base`` has the contract that they follow.

Every loss class can be imported from here, such as ``from coss_hf.losses import CoSSLoss``, and needs torch alone.
"""

from coss_hf.utils.lazy import lazy_names

__all__ = ["LOSSES", "Citation", "DistillationLoss", "build_loss"]
_names = lazy_names(
    __name__,
    {
        "LOSSES": "registry",
        "Citation": "base",
        "DistillationLoss": "base",
        "build_loss": "registry",
    },
)


def __getattr__(name: str):
    if name.endswith("Loss") and name not in __all__:
        from coss_hf.losses.registry import LOSSES  # imports the file of every loss

        for loss in LOSSES.values():
            if loss.__name__ == name:
                return loss
    return _names(name)
