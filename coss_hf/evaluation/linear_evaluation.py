"""Linear evaluation with the paper's settings, on embeddings computed once."""

import torch
from torch import Tensor, nn

from coss_hf.evaluation.knn import check_labels, check_pair

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4
BATCH_SIZE, EPOCHS, DROPS = 128, 100, (50, 70, 90)


def linear_evaluation(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, epochs: int = EPOCHS, seed: int = 0
) -> float:
    """Accuracy in [0, 1] of a linear layer trained on frozen, un-augmented embeddings, as they are.

    SGD, rate 0.1, momentum 0.9, weight decay 5e-4, batches of 128, the rate divided by ten after 50, 70 and 90 % of the
    epochs. (The paper also crops its training images at random; ``linear_probe`` chooses a rate on held-out rows.)

    Args:
        train, test: ``(n, d)`` and ``(m, d)``.
        train_labels, test_labels: class numbers ``(n,)`` and ``(m,)``.
        epochs: 100 in the paper.
        seed: of the layer's weights and the order of the batches.

    Raises:
        ValueError: rows, dimensions or labels that do not match.

    References:
        Singh & Wang, ECCV 2024 (arXiv:2409.13939), supplementary document, settings of CIFAR-100.
    """
    check_pair(train, test, "train and test")
    check_labels(train_labels, train, "train_labels")
    check_labels(test_labels, test, "test_labels")
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(train.shape[1], int(train_labels.max()) + 1)
    for parameter in layer.parameters():
        bound = train.shape[1] ** -0.5
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    layer.to(train.device)
    train_labels = train_labels.to(train.device)
    options = {"lr": LEARNING_RATE, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
    optimizer = torch.optim.SGD(layer.parameters(), **options)
    drops = [epochs * drop // EPOCHS for drop in DROPS]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops)
    with torch.enable_grad():
        for _ in range(epochs):
            for rows in torch.randperm(len(train), generator=generator).to(train.device).split(BATCH_SIZE):
                loss = nn.functional.cross_entropy(layer(train[rows].float()), train_labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
    with torch.no_grad():
        return (layer(test.float()).argmax(1).cpu() == test_labels.cpu()).double().mean().item()
