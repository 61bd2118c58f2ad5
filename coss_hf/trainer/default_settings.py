"""The table of starting values: what is trained by where the user says nothing. Data alone; `settings` applies it."""

from dataclasses import dataclass

from coss_hf.models.architecture import BATCH_NORM

SETTINGS = ("auto", "paper")

# Of ``--settings paper``: the published CIFAR recipe at the length and on the machine of a first try.
PAPER = {
    "optim": "sgd",
    "learning_rate": 0.05,
    "weight_decay": 5e-4,
    "weight_decay_on": "all",
    "warmup_steps": 0,
    "max_grad_norm": 0.0,
    "num_train_epochs": 3.0,
    "bf16": False,
    "dataloader_num_workers": 0,
    "dataloader_persistent_workers": False,
    "dataloader_prefetch_factor": None,
}
# Of these, what cannot change a student, but only how long it takes.
OPERATION = ("dataloader_num_workers", "dataloader_persistent_workers", "dataloader_prefetch_factor")


@dataclass(frozen=True)
class StartingValues:
    """Starting values of the optimizer.

    Attributes:
        optim: name of the optimizer.
        learning_rate: largest rate of the schedule, of a student with random weights, at ``at_views``.
        at_views: number of views per step at which ``learning_rate`` holds.
        weight_decay: its strength.
        weight_decay_on: ``all`` parameters, or ``matrices``.
        warmup: share of the run during which the rate rises.
        max_grad_norm: largest norm of the gradient.
    """

    optim: str
    learning_rate: float
    at_views: int
    weight_decay: float
    weight_decay_on: str
    warmup: float
    max_grad_norm: float


# One line each; which student takes which stands below.
SGD = StartingValues("sgd", 0.05, 64, 5e-4, "all", warmup=0.1, max_grad_norm=1.0)
ADAMW = StartingValues("adamw_torch", 5e-4, 64, 0.05, "matrices", warmup=0.1, max_grad_norm=1.0)

# Networks with batch norm learnt more by SGD where they have 0.3 or 1.5 million parameters, by AdamW with 3.4
# or 11 million (docs/benchmarks.md). The likely reason: a clipped step of SGD is as long in all networks, one of
# AdamW grows with the square root of the number of parameters.
SMALL = 2_000_000


def starting_values(family: str, parameters: int) -> StartingValues:
    """Return the starting values of a student.

    Args:
        family: kind of its network; see ``coss_hf.models.architecture``.
        parameters: number of its parameters.
    """
    return SGD if family == BATCH_NORM and parameters < SMALL else ADAMW


# A student that has learnt something already must not be thrown back: its rate is so much of the others'.
TRAINED_RATE = 0.2
# The rate grows with the square root of the views per step, within these factors.
RATE_FACTORS = (0.25, 4.0)
MAX_WARMUP_EPOCHS = 10

# Length of a run: so many images seen, neighbours included, within these numbers of epochs.
IMAGES_SEEN = 2_000_000
MIN_EPOCHS = 10
MAX_EPOCHS = 100

MAX_WORKERS = 8
PREFETCH = 4
