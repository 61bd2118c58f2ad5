"""Unsupervised knowledge distillation of vision backbones: a big teacher, unlabelled images, a small student."""

from typing import TYPE_CHECKING

from coss_hf.utils.lazy import lazy_names

if TYPE_CHECKING:
    from coss_hf.data.loading import load_images
    from coss_hf.data.views import ViewDataset
    from coss_hf.evaluation.evaluator import Evaluator
    from coss_hf.features import Features
    from coss_hf.hub.student import Student
    from coss_hf.losses.registry import LOSSES
    from coss_hf.models.backbone import Backbone
    from coss_hf.models.embedding import embed
    from coss_hf.models.loading import load_backbone
    from coss_hf.neighbors.mining import add_neighbors
    from coss_hf.trainer.arguments import DataArguments
    from coss_hf.trainer.trainer import DistillationTrainer
    from coss_hf.trainer.training_args import DistillationArguments

__version__ = "0.1.0"
__all__ = [
    "Backbone",
    "DataArguments",
    "DistillationArguments",
    "DistillationTrainer",
    "Evaluator",
    "Features",
    "LOSSES",
    "Student",
    "ViewDataset",
    "add_neighbors",
    "embed",
    "load_backbone",
    "load_images",
]

# On first use: a loss alone should not import Trainer, datasets and faiss.
__getattr__ = lazy_names(
    __name__,
    {
        "Backbone": "models.backbone",
        "DataArguments": "trainer.arguments",
        "DistillationArguments": "trainer.training_args",
        "DistillationTrainer": "trainer.trainer",
        "Evaluator": "evaluation.evaluator",
        "Features": "features",
        "LOSSES": "losses.registry",
        "Student": "hub.student",
        "ViewDataset": "data.views",
        "add_neighbors": "neighbors.mining",
        "embed": "models.embedding",
        "load_backbone": "models.loading",
        "load_images": "data.loading",
    },
)
