import pytest
import torch
import torch.nn.functional as F

from coss_hf.evaluation.linear_probe import LEARNING_RATES, _train_grid, linear_probe


def separable(n: int, seed: int = 0, d: int = 12, classes: int = 5):
    """Labels are the arg max of a fixed linear map, of features far from standardised."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    labels = (x @ torch.randn(d, classes, generator=torch.Generator().manual_seed(7))).argmax(1)
    return x * torch.logspace(-3, 3, d) + 10 * torch.logspace(-3, 3, d), labels


def test_learns_a_linear_task_of_badly_scaled_features():
    result = linear_probe(*separable(1500), *separable(500, seed=1))
    assert result["accuracy"] > 0.95
    assert result["holdout_accuracy"] > 0.93
    assert result["learning_rate"] in LEARNING_RATES


def test_reaches_the_optimum_of_logistic_regression():
    (x, labels), (x_test, test_labels) = separable(4000), separable(2000, seed=1)
    labels = torch.where(torch.rand(4000, generator=torch.Generator().manual_seed(3)) < 0.3, 0, labels)
    z, z_test = (x - x.mean(0)) / x.std(0), (x_test - x.mean(0)) / x.std(0)
    weight, bias = torch.zeros(12, 5, requires_grad=True), torch.zeros(5, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        loss = F.cross_entropy(z @ weight + bias, labels)
        loss.backward()
        return loss

    solver.step(closure)
    expected = ((z_test @ weight + bias).argmax(1) == test_labels).double().mean().item()
    assert linear_probe(x, labels, x_test, test_labels)["accuracy"] == pytest.approx(expected, abs=0.01)


def test_grid_equals_each_rate_trained_by_autograd():
    x, labels = separable(100)
    x, rates = F.layer_norm(x.double(), (12,)), torch.tensor([0.02, 0.5], dtype=torch.float64)
    weight, bias = _train_grid(x, labels, rates, 5, epochs=7, generator=torch.Generator().manual_seed(1))
    for g, rate in enumerate(rates.tolist()):
        layer = torch.nn.Linear(12, 5, dtype=torch.float64)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7)
        for _ in range(7):  # one batch an epoch: order does not matter
            optimizer.zero_grad()
            F.cross_entropy(layer(x), labels).backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(weight[:, 5 * g : 5 * g + 5], layer.weight.detach().T)
        torch.testing.assert_close(bias[5 * g : 5 * g + 5], layer.bias.detach())


def test_rate_is_chosen_without_the_test_set():
    train, (test, test_labels) = separable(300), separable(200, seed=1)
    result = linear_probe(*train, test, test_labels)
    permuted = linear_probe(*train, test, test_labels.flip(0))
    assert permuted["accuracy"] < 0.5 < result["accuracy"]
    assert permuted["learning_rate"] == result["learning_rate"]
    assert permuted["holdout_accuracy"] == result["holdout_accuracy"]


def test_the_best_rate_of_the_grid_on_held_out_rows_is_kept():
    train, test = separable(400), separable(200, seed=1)
    rates = (1e-9, 0.1)  # the first never leaves the direction of its first gradients
    alone = {rate: linear_probe(*train, *test, learning_rates=(rate,), epochs=30) for rate in rates}
    assert alone[0.1]["holdout_accuracy"] > alone[1e-9]["holdout_accuracy"]
    assert linear_probe(*train, *test, learning_rates=rates, epochs=30) == alone[0.1]
    assert linear_probe(*train, *test, learning_rates=rates[::-1], epochs=30) == alone[0.1]


def test_deterministic_by_seed():
    x, labels = separable(300)
    labels = torch.where(torch.rand(300, generator=torch.Generator().manual_seed(3)) < 0.5, 0, labels)
    data = (x, labels, *separable(500, seed=1))
    torch.manual_seed(1)
    first = linear_probe(*data, seed=3)
    torch.manual_seed(2)
    assert linear_probe(*data, seed=3) == first
    assert any(linear_probe(*data, seed=seed) != first for seed in (4, 5))


def test_constant_columns_do_not_change_the_result():
    (x, labels), (x_test, test_labels) = separable(300), separable(200, seed=1)
    expected = linear_probe(x, labels, x_test, test_labels)
    # Constant up to rounding on train, different on test.
    dead = 3 + 1e-7 * torch.randn(300, 2)
    padded = linear_probe(torch.cat([x, dead], 1), labels, torch.cat([x_test, torch.zeros(200, 2)], 1), test_labels)
    assert padded == expected


def test_double_and_half_precision_and_small_labels():
    (x, labels), (x_test, test_labels) = separable(300), separable(200, seed=1)
    x, x_test = x / x.abs().amax(0), x_test / x.abs().amax(0)
    single = linear_probe(x, labels, x_test, test_labels)["accuracy"]
    assert linear_probe(x.double(), labels, x_test.double(), test_labels)["accuracy"] == pytest.approx(single, abs=0.01)
    assert linear_probe(x, labels.to(torch.uint8), x_test, test_labels)["accuracy"] == single
    assert linear_probe(x.half(), labels, x_test.half(), test_labels)["accuracy"] == pytest.approx(single, abs=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"holdout": 0.0}, r"holdout=0\.0"),
        ({"holdout": 0.99}, r"holdout=0\.99"),
        ({"learning_rates": ()}, "learning_rates"),
        ({"epochs": 0}, "epochs"),
        ({"test_features": torch.zeros(5, 3)}, r"\(20, 12\) and \(5, 3\)"),
        ({"test_labels": torch.zeros(4, dtype=torch.long)}, "test_labels"),
        ({"train_labels": torch.full((20,), -1)}, "train_labels"),
    ],
)
def test_invalid_probe_input_is_rejected(change, message):
    (x, labels), (x_test, test_labels) = separable(20), separable(5, seed=1)
    arguments = {"train_features": x, "train_labels": labels, "test_features": x_test, "test_labels": test_labels}
    with pytest.raises(ValueError, match=message):
        linear_probe(**arguments | change)
