"""Linear evaluation with the paper's settings, on embeddings computed once."""

import torch
from torch import Tensor, nn

from coss_hf.evaluation.knn import check_labels, check_pair
from coss_hf.evaluation.linear_probe import numbered, standardise

LEARNING_RATE = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
BATCH_SIZE = 128
EPOCHS = 100
DROPS = (50, 70, 90)  # epochs of 100 after which the learning rate is divided by ten


def linear_evaluation(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    epochs: int = EPOCHS,
    seed: int = 0,
) -> float:
    """Accuracy in [0, 1] of a linear layer trained on frozen, un-augmented embeddings.

    SGD, rate 0.1, momentum 0.9, weight decay 5e-4, batches of 128, the rate divided by ten after 50, 70 and 90 % of the
    epochs. (The paper also crops its training images at random; ``linear_probe`` chooses a rate on held-out rows.)

    The embeddings are standardised with the statistics of ``train_features``: at a fixed rate the result would
    otherwise depend on their scale, which losses of angles leave open.

    Args:
        train_features: ``(n, d)`` embeddings of the train images.
        train_labels: ``(n,)`` class numbers of the train images.
        test_features: ``(m, d)`` embeddings of the test images.
        test_labels: ``(m,)`` class numbers of the test images.
        epochs: Passes over the train features, at least 1; 100 in the paper.
        seed: Seed of the layer's weights and of the order of the batches.

    Raises:
        ValueError: rows, dimensions or labels that do not match; less than one epoch.

    References:
        Singh & Wang, ECCV 2024 (arXiv:2409.13939), supplementary document, settings of CIFAR-100.
    """
    check_pair(train_features, test_features, "train_features and test_features")
    check_labels(train_labels, train_features, "train_labels")
    check_labels(test_labels, test_features, "test_labels")
    if epochs < 1:
        raise ValueError(f"epochs={epochs} must be 1 or more: the layer learns from passes over the train features.")
    classes, train_labels = train_labels.unique(return_inverse=True)
    test_labels = numbered(test_labels, classes)
    x, x_test = standardise(train_features, test_features)
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(train_features.shape[1], len(classes))
    for parameter in layer.parameters():
        bound = train_features.shape[1] ** -0.5
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    layer.to(x.device, x.dtype)
    train_labels = train_labels.to(x.device).long()
    optimizer = torch.optim.SGD(layer.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    # Not at the start, where a thousandth of the rate would be left for all of a few epochs.
    drops = [max(1, epochs * drop // EPOCHS) for drop in DROPS]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops)
    with torch.enable_grad():
        for _ in range(epochs):
            order = torch.randperm(len(x), generator=generator).to(x.device)
            for rows in order.split(BATCH_SIZE):
                loss = nn.functional.cross_entropy(layer(x[rows]), train_labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
    with torch.no_grad():
        return (layer(x_test).argmax(1).cpu() == test_labels.cpu()).double().mean().item()
