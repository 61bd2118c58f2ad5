import pytest

from coss_hf.trainer.schedule import RunLength


@pytest.mark.parametrize(("batches", "accumulation"), [(6, 1), (6, 4), (7, 3), (5, 8)])
def test_images_after_steps_against_counting(batches, accumulation):
    length = RunLength(batches, accumulation, images=10)
    seen, step = 0, 0
    assert length.images_after(0) == 0
    for _ in range(3):
        left = batches
        while left:
            taken = min(accumulation, left)
            left -= taken
            seen += 10 * taken
            step += 1
            assert length.images_after(step) == seen
            assert length.steps_for(seen) == step
            assert length.images_after(length.steps_for(seen + 9)) <= seen + 9
    assert step == 3 * length.steps_per_epoch


def test_steps_for_never_sees_more_than_asked():
    length = RunLength(batches=7, accumulation=3, images=10)
    for images in range(30, 300):
        steps = length.steps_for(images)
        assert length.images_after(steps) <= images < length.images_after(steps + 1)
