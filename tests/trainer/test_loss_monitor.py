"""The loss monitor by itself."""

import pytest
import torch

from coss_hf.trainer.loss_monitor import LossMonitor
from coss_hf.utils.errors import NonFiniteLoss


@pytest.fixture
def monitor():
    return LossMonitor(lambda rows: [f"image {row}" for row in rows])


def record(monitor, step: int, loss: float, finite=(True, True), **parts: float) -> None:
    values = {name: torch.tensor(value) for name, value in parts.items()}
    monitor.record(step, torch.tensor(loss), values, torch.tensor([4, 7]), torch.tensor(finite))


def test_means_are_over_the_steps_since_the_last_call(monitor):
    record(monitor, 1, 1.0, part=1.0)
    record(monitor, 2, 1.0, part=3.0)
    assert monitor.has_means() and monitor.means(lambda means: means) == {"part": 2.0}
    assert not monitor.has_means() and monitor.means(lambda means: means) == {}
    record(monitor, 3, 1.0, part=5.0)
    assert monitor.means(lambda means: means) == {"part": 5.0}


def test_the_image_whose_features_are_not_finite_is_named(monitor):
    with pytest.raises(NonFiniteLoss, match="loss is nan at step 2.*whose features are not finite: image 7") as caught:
        record(monitor, 2, float("nan"), finite=(True, False))
    assert caught.value.found


def test_all_images_of_the_step_are_named_where_none_is_to_blame(monitor):
    with pytest.raises(NonFiniteLoss, match="features of all of them are finite.*image 4, image 7") as caught:
        record(monitor, 2, float("inf"))
    assert not caught.value.found


def test_a_clock_that_was_stopped_gives_no_rate(monitor):
    monitor.start_clock(0)
    assert monitor.images_per_second(100) > 0
    monitor.stop_clock()
    assert monitor.images_per_second(200) is None
    monitor.start_clock(200)
    assert monitor.images_per_second(300) > 0
