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


def size_in_bytes(count: int) -> str:
    """An amount of bytes in its largest unit.

    Args:
        count: the number of bytes.

    Example:
        >>> size_in_bytes(900), size_in_bytes(12_800_000), size_in_bytes(3_100_000_000)
        ('900 B', '12.8 MB', '3.1 GB')
    """
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.1f} {unit}" if unit != "B" else f"{count} B"
        value /= 1000
    return f"{value:,.1f} TB"
