"""Linear evaluation: what it finds, and that neither scale nor offset of the embeddings decides it."""

import pytest
import torch

from coss_hf.evaluation import evaluate_embeddings, linear_evaluation


def clusters(rows: int, seed: int = 0, noise: float = 1.0, dim: int = 8, classes: int = 5):
    """Embeddings around one centre a class, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    centres = 0.8 * torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, classes, (rows,), generator=generator)
    return centres[labels] + noise * torch.randn(rows, dim, generator=generator), labels


def accuracy(train, test, **options):
    return linear_evaluation(*train, *test, epochs=10, **options)


# A page ranked by a measure that gave 10 % (chance) where the same embeddings times 10,000 gave 65 %.
@pytest.mark.parametrize("power", range(-5, 6))
def test_the_scale_of_the_embeddings_does_not_matter(power):
    x, labels = clusters(400)
    x_test, test_labels = clusters(200, seed=1)
    expected = accuracy((x, labels), (x_test, test_labels))
    assert 0.6 < expected < 0.95
    scale = 10.0**power
    assert accuracy((scale * x, labels), (scale * x_test, test_labels)) == expected


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_embeddings_whose_squares_overflow_float32(scale):
    train, test = clusters(400), clusters(200, seed=1)
    assert accuracy((scale * train[0], train[1]), (scale * test[0], test[1])) == accuracy(train, test)


def test_scale_and_offset_of_single_dimensions_do_not_matter():
    """Random weights embed all images near one point: a constant class to a rate that suits another scale."""
    x, labels = clusters(400)
    x_test, test_labels = clusters(200, seed=1)
    expected = accuracy((x, labels), (x_test, test_labels))
    scales = 10.0 ** torch.arange(-4, 4)
    moved = accuracy((x * scales + 100 * scales, labels), (x_test * scales + 100 * scales, test_labels))
    assert moved == pytest.approx(expected, abs=0.011)


def test_constant_dimensions_do_not_change_the_result():
    """Rounding noise around a constant must not become the loudest dimension."""
    x, labels = clusters(400)
    x_test, test_labels = clusters(200, seed=1)
    noise = 1 + 1e-7 * torch.randn(400, 2, generator=torch.Generator().manual_seed(5))
    dead = torch.cat([torch.zeros(400, 1), noise], 1)
    far = 1e3 * torch.ones(200, 3)  # a constant of train may be another value on test
    found = accuracy((torch.cat([x, dead], 1), labels), (torch.cat([x_test, far], 1), test_labels))
    assert found == pytest.approx(accuracy((x, labels), (x_test, test_labels)), abs=0.02)
    assert accuracy((torch.ones(400, 3), labels), (torch.ones(200, 3), test_labels)) <= 0.4


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_few_epochs_are_trained_too(epochs):
    """All drops of the rate were before the first of them."""
    train, test = clusters(4000), clusters(200, seed=1)
    assert linear_evaluation(*train, *test, epochs=epochs) == pytest.approx(accuracy(train, test), abs=0.05)


@pytest.mark.parametrize("epochs", [0, -3])
def test_no_epochs_are_refused(epochs):
    train, test = clusters(40), clusters(20, seed=1)
    with pytest.raises(ValueError, match=f"epochs={epochs} must be 1 or more"):
        linear_evaluation(*train, *test, epochs=epochs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_linear_evaluation_accepts_half_and_double_precision(dtype):
    train, test = clusters(400), clusters(200, seed=1)
    found = accuracy((train[0].to(dtype), train[1].to(torch.uint8)), (test[0].to(dtype), test[1]))
    assert found == pytest.approx(accuracy(train, test), abs=0.03)


@pytest.mark.parametrize("power", [-5, -2, 3, 5])
def test_no_measure_depends_on_the_scale(power):
    train, labels = clusters(150)
    test, test_labels = clusters(60, seed=1)
    teacher = test @ torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
    gallery = train @ torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
    scale = 10.0**power

    def measured(factor: float) -> dict:
        return evaluate_embeddings(
            factor * test,
            teacher,
            train_features=factor * train,
            train_labels=labels,
            test_labels=test_labels,
            teacher_gallery=gallery,
            linear=True,
            diagnostics=True,
        )

    assert measured(scale) == pytest.approx(measured(1.0), abs=1e-5)
