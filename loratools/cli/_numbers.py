"""Numbers as a person reads them."""

from __future__ import annotations

from collections.abc import Iterable


def count(value: int) -> str:
    """A whole number with its thousands apart.

    >>> count(1234567)
    '1,234,567'
    """
    return f"{value:,}"


def many(value: int, one: str, several: str | None = None) -> str:
    """A count with its noun.

    >>> many(1, "tensor"), many(1200, "tensor")
    ('1 tensor', '1,200 tensors')
    """
    return f"{count(value)} {one if value == 1 else several or one + 's'}"


def size(value: float, unit: str = "B") -> str:
    """Three digits and a decimal prefix; small whole numbers as they are.

    >>> size(2_128_544), size(812), size(1_100_048_384, "")
    ('2.13 MB', '812 B', '1.10 G')
    """
    for power, prefix in enumerate(("", "k", "M", "G", "T")):
        scaled = value / 1000**power
        if scaled < 999.5 or prefix == "T":
            digits = f"{scaled:.0f}" if not power or scaled >= 99.95 else f"{scaled:.1f}" if scaled >= 9.995 else f"{scaled:.2f}"
            return f"{digits} {prefix}{unit}".rstrip()
    raise AssertionError


def number(value: float, digits: int = 4) -> str:
    """The digits that matter.

    >>> number(2.0), number(16 / 8**0.5), number(1.234e-7, 2)
    ('2', '5.657', '1.2e-07')
    """
    return f"{value:.{digits}g}"


def percent(share: float) -> str:
    """A share of 1 in per cent; neither 0 % nor 100 % unless it is exactly that.

    >>> percent(0.123456), percent(1.0), percent(0.999999), percent(0.000001)
    ('12.35 %', '100 %', '>99.99 %', '<0.01 %')
    """
    if share in (0, 1):
        return f"{share:.0%}".replace("%", " %")
    if share > 0.9999:
        return ">99.99 %" if share < 1 else f"{100 * share:.2f} %"
    return "<0.01 %" if 0 < share < 0.0001 else f"{100 * share:.2f} %"


def span(values: Iterable[float], digits: int = 4) -> str:
    """One number, or the least and the greatest.

    >>> span([3, 3]), span([1, 3, 2])
    ('3', '1–3')
    """
    shown = sorted(values)
    low, high = number(shown[0], digits), number(shown[-1], digits)
    return low if low == high else f"{low}–{high}"
