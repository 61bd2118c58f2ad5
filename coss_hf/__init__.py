"""Unsupervised knowledge distillation of vision backbones: a big teacher, unlabelled images, a small student."""

import importlib

_ROOMS = {
    "embed": "embedding",
    "Features": "features",
    "LOSSES": "losses",
    "load_backbone": "loading",
    "load_images": "images",
    "add_neighbors": "neighbors",
    "Student": "student",
    "ViewDataset": "views",
    "DistillationArguments": "config",
    "DistillationTrainer": "trainer",
    "Evaluator": "evaluation.evaluator",
}
__all__ = list(_ROOMS)


def __getattr__(name: str):
    # On first use: a loss alone should not import Trainer, datasets and faiss.
    if name in _ROOMS:
        return getattr(importlib.import_module(f"coss_hf.{_ROOMS[name]}"), name)
    raise AttributeError(f"module 'coss_hf' has no attribute {name!r}")
