"""Teachers and students: any vision network, and the networks of the paper's CIFAR tables."""

from coss_hf.models.cifar import *  # noqa: F403 (registers these networks with AutoModel)
from coss_hf.models.cifar import __all__  # noqa: F401
