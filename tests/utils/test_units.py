import pytest

from coss_hf.utils.units import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.3, "less than a second"),
        (59.6, "1 min"),
        (95, "1 min 35 s"),
        (3600, "1 h"),
        (7_500, "2 h 5 min"),
        (3_605, "1 h"),
        (90_000, "1 day 1 h"),
        (391_843.5 * 60, "272 days 2 h"),  # was given in minutes
    ],
)
def test_durations_are_readable(seconds, text):
    assert duration(seconds) == text
