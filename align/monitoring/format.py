"""Seconds and bytes in, what people say of them out."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """A time as people say it.

    >>> duration(4.25), duration(92), duration(7500)
    ('4.2 s', '1 min 32 s', '2 h 5 min')
    """
    if round(seconds) < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def size(num_bytes: float) -> str:
    """
    >>> size(3 * 2**30), size(5 * 2**20)
    ('3.00 GiB', '5.0 MiB')
    """
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def rate(per_s: float) -> str:
    """How fast something goes; how long one takes where that is longer than some seconds.

    >>> rate(12.34), rate(0.25), rate(0.02), rate(0)
    ('12.3/s', '4.0 s each', '50 s each', '')
    """
    if per_s <= 0:
        return ""
    return f"{per_s:.1f}/s" if per_s >= 0.5 else f"{duration(1 / per_s)} each"
