"""The paper's tables (arXiv:2409.13939, supplementary): rows, pairs of networks, arguments and published figures.

Table 5 is none of the supplementary document: it holds SEED with and without space similarity, which the paper has for
ImageNet alone (57.60 and 58.30 %), here for the pairs of the other tables, with and without neighbours.
"""

import inspect

from coss_hf.losses.combination import parse_methods
from coss_hf.losses.registry import LOSSES
from coss_hf.study.baselines import untrained_trial
from coss_hf.study.trials import Trial

PAIRS = {
    "resnet20/resnet56": ("resnet20", "resnet56"),
    "vgg8/vgg13": ("vgg8", "vgg13"),
    "resnet8x4/resnet32x4": ("resnet8x4", "resnet32x4"),
    "wrn_16_2/wrn_40_2": ("wrn_16_2", "wrn_40_2"),
    "wrn_40_1/wrn_40_2": ("wrn_40_1", "wrn_40_2"),
}
CHOICE_SEED = 0
SCALES = (0.5, 1, 2, 4, 8, 16, 32)
EPOCHS = 240
MILESTONES = (150, 180, 210)  # epochs at which the learning rate falls tenfold
COSS = "coss(beta=50, lambda_ss=0.5)"
SEED_SS = "seed + coss(beta=1, lambda_co=0)"

OTHERS = ("at", "sp", "vid", "rkd", "pkt", "factor", "nst", "crd", "srrl", "dist")
ROWS = {
    1: {**{name: name for name in OTHERS}, "coss": COSS},
    2: {"L_co": "coss(beta=50, lambda_ss=0)", "L_ss": "coss(beta=50, lambda_co=0)", "coss": COSS},
    3: {f"lambda {value:g}": f"coss(beta=50, lambda_ss={value:g})" for value in (0, 0.25, 0.5, 1)},
    4: {"bn": "bn", "coss": COSS, "L_co": "coss(beta=50, lambda_ss=0)", "dist": "dist"},
    5: {"seed": "seed", "seed + SS": SEED_SS, "seed, neighbours": "seed", "seed + SS, neighbours": SEED_SS},
}
# Number of neighbours drawn for each anchor, of the rows that have any, and of those to draw from.
NEIGHBORS = {"seed, neighbours": 3, "seed + SS, neighbours": 3}
NEIGHBORS_POOL = 15
TRAINING = {
    "settings": "paper",
    "augmentation": "cifar",
    "learning_rate": 0.05,
    "weight_decay": 5e-4,
    "per_device_train_batch_size": 128,
    "save_strategy": "steps",
}
# Top-1 in %, CIFAR-100 (the lossless original), 240 epochs, the best of the scales on test images. Rows and pairs of
# table 4 without a figure are in other tables, or are compared here alone. That CoSS has lambda 0.5 in tables 1, 2 and
# 4 is inferred: its figures there are those of lambda 0.5 in table 3.
PUBLISHED = {
    1: {
        "resnet20/resnet56": (49.00, 63.14, 68.61, 56.28, 61.58, 46.63, 25.62, 65.03, 69.31, 67.13, 71.11),
        "vgg8/vgg13": (56.22, 71.62, 73.65, 44.50, 71.81, 39.71, 42.78, 69.73, 72.85, 73.40, 74.58),
        "resnet8x4/resnet32x4": (43.11, 62.51, 69.60, 32.33, 64.53, 36.64, 41.27, 65.78, 69.19, 67.67, 73.90),
    },
    2: {"resnet8x4/resnet32x4": (72.05, 73.53, 73.90), "resnet20/resnet56": (70.58, 70.42, 71.11)},
    3: {"resnet8x4/resnet32x4": (72.05, 73.44, 73.90, 73.91), "resnet20/resnet56": (70.58, 71.34, 71.11, 70.68)},
    4: {
        "vgg8/vgg13": (74.01, 74.58),
        "resnet8x4/resnet32x4": (72.22, 73.90),
        "wrn_16_2/wrn_40_2": (73.42, 74.65),
        "resnet20/resnet56": (),
    },
    5: {"resnet20/resnet56": ()},
}


def published(table: int, pair: str) -> dict[str, float]:
    """Return the paper's figures for a pair, by row; empty if it has none."""
    return dict(zip(ROWS[table], PUBLISHED[table].get(pair, ())))


def figure(table: int, pair: str, row: str) -> float | None:
    """Return the paper's figure of a cell; that of the same method and pair in another table where it has none here."""
    tables = [table, *PUBLISHED]
    found = [
        value
        for other in tables
        for name, value in published(other, pair).items()
        if ROWS[other][name] == ROWS[table][row] and NEIGHBORS.get(name, 0) == NEIGHBORS.get(row, 0)
    ]
    return found[0] if found else None


def own_pairs(table: int) -> list[str]:
    """Return the pairs of which the paper's table has figures; all of a table that is not the paper's."""
    return [pair for pair in PUBLISHED[table] if published(table, pair)] or list(PUBLISHED[table])


def own_rows(table: int) -> list[str]:
    """Return the rows of which the paper's table has figures; all of a table that is not the paper's."""
    named = {name for pair in PUBLISHED[table] for name in published(table, pair)}
    return [name for name in ROWS[table] if name in named] or list(ROWS[table])


def expression(table: int, name: str) -> str:
    """Return the method expression of a row: one of the table's rows, or an expression itself.

    Args:
        table: number of the table.
        name: name of the row, or an expression as of ``--method``.

    Raises:
        ValueError: neither.
    """
    if name in ROWS[table]:
        return ROWS[table][name]
    if any(method.name not in LOSSES for method in parse_methods(name)):
        raise ValueError(
            f"--methods={name!r} is neither a row of table {table} ({', '.join(ROWS[table])}) nor made of methods "
            f"({', '.join(LOSSES)})."
        )
    return name


def scaled(expression: str, scale: float) -> str:
    """Return a method expression with every ``beta`` multiplied by ``scale``."""
    parts = []
    for method in parse_methods(expression):
        default = inspect.signature(LOSSES[method.name]).parameters["beta"].default
        beta = scale * method.options.get("beta", default)
        parts.append(str(method._replace(options=method.options | {"beta": beta})))
    return " + ".join(parts)


def lengths(budgets: list[tuple[str, float]], batch_size: int, train_images: int) -> list[int]:
    """Return the number of images of runs that are a share of the paper's 240 epochs.

    Args:
        budgets: the flag and the share of each.
        batch_size: number of images of a step.
        train_images: number of training images.

    Raises:
        ValueError: one that is less than a step.
    """
    paper_images = EPOCHS * train_images
    for flag, share in budgets:
        if round(share * paper_images) < batch_size:
            raise ValueError(
                f"--{flag}={share:g} of 240 epochs of {train_images:,} images is less than one step: give at least "
                f"{batch_size / paper_images:.2g}."
            )
    return [round(share * paper_images) for _, share in budgets]


def views(row: str, batch_size: int) -> dict:
    """Return the fields of a trial that say how many neighbours and anchors a step of ``batch_size`` images has."""
    k = NEIGHBORS.get(row, 0)
    return {"neighbors_k": k, "anchors": max(1, batch_size // (1 + k)) if k else None}


def choice_trials(
    table: int, pair: str, methods: list[str], scales: list[float], images: int, batch_size: int = 128
) -> list[Trial]:
    """Return the trials that choose the scale of each row, on held-out images, with the seed that no report uses.

    Args:
        table: number of the table.
        pair: name of student and teacher.
        methods: rows of the table, or expressions.
        scales: factors of each method's ``beta``.
        images: number of images that each trial sees.
        batch_size: number of images of a step, neighbours included.
    """
    return [
        Trial(
            pair=pair,
            method=name,
            expression=scaled(expression(table, name), scale),
            scale=scale,
            seed=CHOICE_SEED,
            num_images=images,
            split="validation",
            **views(name, batch_size),
        )
        for name in methods
        for scale in scales
    ]


def report_trials(
    pair: str, chosen: list[dict], finalists: int | None, seeds: int, images: int, seeds_of_others: int = 0
) -> list[Trial]:
    """Return trials of the chosen rows on test images with fresh seeds, of random weights, and of the teacher.

    Args:
        pair: name of student and teacher.
        chosen: one result per row, the best first.
        finalists: number of the best rows to report, apart from CoSS; None for all.
        seeds: number of runs of each row.
        images: number of images that each trial sees.
        seeds_of_others: number of runs of each row that is no finalist.
    """
    others = [row["method"] for row in chosen if row["method"] != "coss"]
    finals = {*others[:finalists], "coss"}
    trials = [
        Trial(
            pair=pair,
            method=row["method"],
            expression=row["expression"],
            scale=row["scale"],
            seed=seed,
            num_images=images,
            split="test",
            neighbors_k=row.get("neighbors_k", 0),
            anchors=row.get("anchors"),
        )
        for row in chosen
        for seed in range(1, 1 + (seeds if row["method"] in finals else seeds_of_others))
    ]
    trials += [untrained_trial(pair, "random", seed, "test") for seed in range(1, seeds + 1)]
    trials.append(untrained_trial(pair, "teacher", 1, "test"))
    return trials
