"""The paper's tables: rows, pairs of networks, settings and published figures (arXiv:2409.13939, supplementary)."""

import inspect

from coss_hf.losses.combination import parse_methods
from coss_hf.losses.registry import LOSSES
from coss_hf.study.trials import Cell

PAIRS = {
    "resnet20/resnet56": ("resnet20", "resnet56"),
    "vgg8/vgg13": ("vgg8", "vgg13"),
    "resnet8x4/resnet32x4": ("resnet8x4", "resnet32x4"),
    "wrn_16_2/wrn_40_2": ("wrn_16_2", "wrn_40_2"),
    "wrn_40_1/wrn_40_2": ("wrn_40_1", "wrn_40_2"),
}
CHOICE_SEED = 0
SCALES = (0.5, 1, 2, 4, 8, 16, 32)
EPOCHS, MILESTONES = 240, (150, 180, 210)  # the rate falls tenfold at each
COSS = "coss(beta=50, lambda_ss=0.5)"

ROWS = {
    1: {name: name for name in ("at", "sp", "vid", "rkd", "pkt", "factor", "nst", "crd", "srrl", "dist")}
    | {"coss": COSS},
    2: {"L_co": "coss(beta=50, lambda_ss=0)", "L_ss": "coss(beta=50, lambda_co=0)", "coss": COSS},
    3: {f"lambda {value:g}": f"coss(beta=50, lambda_ss={value:g})" for value in (0, 0.25, 0.5, 1)},
    4: {"bn": "bn", "coss": COSS},
}
TRAINING = {
    "augmentation": "cifar",
    "learning_rate": 0.05,
    "weight_decay": 5e-4,
    "per_device_train_batch_size": 128,
    "save_strategy": "steps",
}
# Top-1 in %, CIFAR-100 (the lossless original), 240 epochs, the best of the scales on test images.
PUBLISHED = {
    1: {
        "resnet20/resnet56": (49.00, 63.14, 68.61, 56.28, 61.58, 46.63, 25.62, 65.03, 69.31, 67.13, 71.11),
        "vgg8/vgg13": (56.22, 71.62, 73.65, 44.50, 71.81, 39.71, 42.78, 69.73, 72.85, 73.40, 74.58),
        "resnet8x4/resnet32x4": (43.11, 62.51, 69.60, 32.33, 64.53, 36.64, 41.27, 65.78, 69.19, 67.67, 73.90),
    },
    2: {"resnet8x4/resnet32x4": (72.05, 73.53, 73.90), "resnet20/resnet56": (70.58, 70.42, 71.11)},
    3: {"resnet8x4/resnet32x4": (72.05, 73.44, 73.90, 73.91), "resnet20/resnet56": (70.58, 71.34, 71.11, 70.68)},
    4: {"vgg8/vgg13": (74.01, 74.58), "resnet8x4/resnet32x4": (72.22, 73.90), "wrn_16_2/wrn_40_2": (73.42, 74.65)},
}


def published(table: int, pair: str) -> dict[str, float]:
    """The paper's figures for a pair, by row; empty where it has none."""
    return dict(zip(ROWS[table], PUBLISHED[table].get(pair, ())))


def expression(table: int, name: str) -> str:
    """Of a row: one of the table's, or any other that ``name`` spells out.

    Raises:
        ValueError: neither.
    """
    if name not in ROWS[table] and any(method.name not in LOSSES for method in parse_methods(name)):
        rows, methods = ", ".join(ROWS[table]), ", ".join(LOSSES)
        raise ValueError(
            f"--methods={name!r} is neither a row of table {table} ({rows}) nor made of methods ({methods})."
        )
    return ROWS[table].get(name, name)


def scaled(expression: str, scale: float) -> str:
    """A method expression with every ``beta`` times ``scale``."""
    methods = []
    for method in parse_methods(expression):
        default = inspect.signature(LOSSES[method.name]).parameters["beta"].default
        beta = scale * method.options.get("beta", default)
        methods.append(str(method._replace(options=method.options | {"beta": beta})))
    return " + ".join(methods)


def lengths(budgets: list[tuple[str, float]], batch_size: int, train_images: int) -> list[int]:
    """Images of runs that are a share of the paper's 240 epochs.

    Args:
        budgets: the flag and the share of each.

    Raises:
        ValueError: one that is less than a step.
    """
    whole = EPOCHS * train_images
    for flag, share in budgets:
        if round(share * whole) < batch_size:
            raise ValueError(
                f"--{flag}={share:g} of 240 epochs of {train_images:,} images is less than one step: give at least "
                f"{batch_size / whole:.2g}."
            )
    return [round(share * whole) for _, share in budgets]


def choice_cells(table: int, pair: str, methods: list[str], scales: list[float], images: int) -> list[Cell]:
    """What chooses the scale of each row, on held-out images, with the seed that no report uses."""
    rows = [(name, scale) for name in methods for scale in scales]
    seen = {"seed": CHOICE_SEED, "num_images": images, "split": "validation"}
    return [Cell(pair, name, scaled(expression(table, name), scale), scale, **seen) for name, scale in rows]


def report_cells(pair: str, chosen: list[dict], finalists: int | None, seeds: int, images: int) -> list[Cell]:
    """The chosen rows on test images with fresh seeds, random weights, and the teacher.

    Args:
        chosen: a result a row, the best first.
        finalists: only so many of the best, and CoSS; None for all.
    """
    others = [row["method"] for row in chosen if row["method"] != "coss"][:finalists]
    rows = [row for row in chosen if row["method"] in [*others, "coss"]]
    cells = [
        Cell(pair, row["method"], row["expression"], row["scale"], seed, images, "test")
        for row in rows
        for seed in range(1, seeds + 1)
    ]
    cells += [Cell(pair, "random", "", 0, seed, 0, "test") for seed in range(1, seeds + 1)]
    return [*cells, Cell(pair, "teacher", "", 0, 1, 0, "test")]
