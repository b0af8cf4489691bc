"""Numbers as a person reads them: nothing rounds to a claim that is not so."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratools.cli._numbers import count, number, percent, size, span

SIZES = {
    0: "0 B", 999: "999 B", 1000: "1.00 kB", 9_994: "9.99 kB", 9_996: "10.0 kB", 99_960: "100 kB", 999_499: "999 kB",
    999_500: "1.00 MB", 2_200_119_688: "2.20 GB", 5_000_000_000_000_000: "5000 TB",
}  # fmt: skip


@pytest.mark.parametrize("value", SIZES)
def test_size(value: int) -> None:
    assert size(value) == SIZES[value]
    assert size(value, "") == SIZES[value].removesuffix("B").strip()


@given(st.floats(0, 1))
def test_percent_says_none_or_all_only_where_it_is_so(share: float) -> None:
    shown = percent(share)
    assert (shown == "0 %") == (share == 0)
    assert (shown == "100 %") == (share == 1)
    assert shown not in ("0.00 %", "100.00 %")


@given(st.integers(0, 10**15))
def test_count_only_adds_commas(value: int) -> None:
    assert int(count(value).replace(",", "")) == value


def test_number_and_span() -> None:
    assert number(0.1 + 0.2) == "0.3"
    assert span([2.0, 2.0]) == "2" and span([0.25, 16]) == "0.25–16"
    assert span([1.00001, 1.00002]) == "1"  # alike in the digits shown
