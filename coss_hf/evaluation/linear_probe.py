"""Linear probe: multinomial logistic regression on frozen embeddings, all learning rates of its grid at once."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from coss_hf.evaluation.knn import check_labels, check_pair

LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
MOMENTUM = 0.9
BATCH_SIZE = 512


def numbered(labels: Tensor, classes: Tensor) -> Tensor:
    """Positions of ``labels`` among the sorted ``classes``; ``len(classes)`` for a label that is none of them."""
    labels = labels.to(classes.device)
    position = torch.searchsorted(classes, labels.to(classes.dtype)).clamp(max=len(classes) - 1)
    return torch.where(classes[position] == labels, position, len(classes))


def standardise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets of embeddings with mean 0 and deviation 1 in each dimension of ``train``, in float32 or wider.

    A dimension that is constant on ``train`` becomes 0.

    Args:
        train: ``(n, d)`` embeddings.
        test: ``(m, d)`` embeddings.
    """
    wide = torch.float64 if train.dtype == torch.float64 else torch.float32
    train = train.to(wide)
    test = test.to(wide)
    # By powers of two, which round nothing: squares of very large or small values leave the range of the data type.
    exponent = torch.frexp(train.abs().amax(0)).exponent
    train = torch.ldexp(train, -exponent)
    test = torch.ldexp(test, -exponent)
    mean = train.mean(0)
    scale = train.std(0, correction=0)
    # A column that is constant on train says nothing: dividing by its rounding noise would make it the loudest.
    scale = torch.where(scale > 1e-6 * train.abs().amax(0), scale, torch.inf)
    return (train - mean) / scale, (test - mean) / scale


def _train_grid(
    x: Tensor, labels: Tensor, rates: Tensor, num_classes: int, epochs: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One classifier per rate, all in the same pass: weight ``(d, G * C)`` and bias ``(G * C,)``."""
    weight = x.new_zeros(x.shape[1], len(rates) * num_classes)
    bias = weight.new_zeros(weight.shape[1])
    weight_step = torch.zeros_like(weight)
    bias_step = torch.zeros_like(bias)
    rates = rates.repeat_interleave(num_classes)
    steps = epochs * math.ceil(len(x) / BATCH_SIZE)
    step = 0
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).to(x.device).split(BATCH_SIZE):
            batch = x[rows]
            # Gradient of the mean cross-entropy in closed form: the grid shares two matrix products a step.
            error = torch.addmm(bias, batch, weight).view(len(rows), -1, num_classes).softmax(2)
            error = (error - F.one_hot(labels[rows], num_classes)[:, None]).flatten(1) / len(rows)
            weight_step.mul_(MOMENTUM).addmm_(batch.T, error)
            bias_step.mul_(MOMENTUM).add_(error.sum(0))
            rate = rates * (0.5 * (1 + math.cos(math.pi * step / steps)))
            weight.addcmul_(weight_step, rate, value=-1)
            bias.addcmul_(bias_step, rate, value=-1)
            step += 1
    return weight, bias


def _accuracies(x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, num_classes: int) -> Tensor:
    """Share of right answers of every classifier of the grid, ``(G,)``."""
    right = [
        (torch.addmm(bias, rows, weight).view(len(rows), -1, num_classes).argmax(2) == truth[:, None]).sum(0)
        for rows, truth in zip(x.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True)
    ]
    return torch.stack(right).sum(0).double() / len(x)


@torch.no_grad()
def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    learning_rates: tuple[float, ...] = LEARNING_RATES,
    epochs: int = 50,
    holdout: float = 0.1,
    seed: int = 0,
) -> dict[str, float]:
    """Accuracy of a linear classifier on frozen embeddings, standardised with the statistics of ``train_features``.

    SGD (momentum 0.9, batches of 512, cosine decay) trains one classifier per learning rate on the same batches. The
    rate with the best accuracy on a random part of the train features, never trained on, is kept (the lower of
    equals), and only that classifier reads the test features.

    Args:
        train_features: ``(n, d)`` embeddings of the train images.
        train_labels: ``(n,)`` class numbers of the train images.
        test_features: ``(m, d)`` embeddings of the test images.
        test_labels: ``(m,)`` class numbers of the test images.
        learning_rates: Learning rates to choose from.
        epochs: Passes over the part that is trained on.
        holdout: Share of the train features on which the rate is chosen.
        seed: Seed of the held-out part and of the order of the batches.

    Returns:
        ``{"accuracy": on test, "learning_rate": the chosen one, "holdout_accuracy": of the chosen one}``, accuracies
        in [0, 1].

    Raises:
        ValueError: shapes that do not match, an empty grid or test, a training or held-out part without rows.

    References:
        The grid in one pass: Oquab et al., DINOv2 (arXiv:2304.07193), eval/linear.py.
    """
    check_pair(train_features, test_features, "train_features and test_features")
    check_labels(train_labels, train_features, "train_labels")
    check_labels(test_labels, test_features, "test_labels")
    held_out = max(1, round(holdout * len(train_features)))
    if not 0 < holdout < 1 or held_out >= len(train_features):
        raise ValueError(
            f"holdout={holdout} must leave rows on both sides of the {len(train_features)} training embeddings."
        )
    if len(test_features) == 0 or len(learning_rates) == 0 or epochs < 1:
        raise ValueError(
            f"a probe needs test_features (got {len(test_features)}), learning_rates (got {learning_rates}) and "
            f"epochs >= 1 (got {epochs})."
        )
    x, x_test = standardise(train_features, test_features)
    # Classes that occur, so that classifiers are as wide as there are classes, however large their numbers.
    classes, train_labels = train_labels.unique(return_inverse=True)
    test_labels = numbered(test_labels, classes)
    num_classes = len(classes)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator).to(x.device)
    chosen_on = order[:held_out]
    fitted_on = order[held_out:]
    rates = torch.tensor(sorted(learning_rates), dtype=x.dtype, device=x.device)
    weight, bias = _train_grid(x[fitted_on], train_labels[fitted_on], rates, num_classes, epochs, generator)
    scores = _accuracies(x[chosen_on], train_labels[chosen_on], weight, bias, num_classes)
    best = int(scores.argmax())
    columns = slice(best * num_classes, (best + 1) * num_classes)
    accuracy = _accuracies(x_test, test_labels, weight[:, columns], bias[columns], num_classes)
    return {
        "accuracy": accuracy.item(),
        "learning_rate": sorted(learning_rates)[best],
        "holdout_accuracy": scores[best].item(),
    }
