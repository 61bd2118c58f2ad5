"""Training of a student."""

from coss_hf.utils.lazy import lazy_names

__all__ = ["DistillationArguments", "DistillationTrainer"]
__getattr__ = lazy_names(__name__, {"DistillationArguments": "training_args", "DistillationTrainer": "trainer"})
