"""Amounts in units that a person reads."""


def duration(seconds: float) -> str:
    """A time in its two largest units.

    Args:
        seconds: the time.

    Example:
        >>> duration(0.4), duration(95), duration(7_500), duration(23_510_610)
        ('less than a second', '1 min 35 s', '2 h 5 min', '272 days 2 h')
    """
    if seconds < 1:
        return "less than a second"
    parts = []
    rest = round(seconds)
    for unit, size in ((" days", 86_400), (" h", 3_600), (" min", 60), (" s", 1)):
        count, rest = divmod(rest, size)
        if count or parts:
            parts.append((count, unit if (count, unit) != (1, " days") else " day"))
        if len(parts) == 2:
            break
    return " ".join(f"{count:,}{unit}" for count, unit in parts if count)
