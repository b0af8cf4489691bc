"""Differences: exact up to one rounding, equal bytes told, digests those of the bytes, values that are no numbers refused."""

from __future__ import annotations

import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratools.differences import SMALL, compare, difference, digest, measurable
from loratools.errors import NonFiniteError
from loratools.refs import InMemory, Spec
from loratools.tensors import to_ref
from tests.files import raw

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_small_differences_are_those_of_float64(dtype: torch.dtype) -> None:
    base, tuned = random(37, 11, dtype=dtype), random(37, 11, seed=1, dtype=dtype)
    found = difference(to_ref(base), to_ref(tuned))
    exact = tuned.double() - base.double()
    assert found.D.dtype == torch.float64
    assert torch.equal(found.D.view(37, 11), exact)
    # sums of squares in float64 by blocks
    assert found.norm == pytest.approx(float(exact.norm()), rel=1e-13)
    assert found.base_norm == pytest.approx(float(base.double().norm()), rel=1e-13)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_large_differences_are_float32_and_within_their_stated_rounding(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    shape = (1025, SMALL // 1024)
    base, tuned = random(*shape, dtype=dtypes[0]), random(*shape, seed=1, dtype=dtypes[1])
    found = difference(to_ref(base), to_ref(tuned))
    assert found.D.dtype == torch.float32
    error = (found.D.double().view(shape) - (tuned.double() - base.double())).norm()
    assert float(error) <= found.rounding
    assert found.rounding < 1e-7 * found.norm


def test_asked_for_wide_or_given_float64_it_is_float64() -> None:
    large = random(1025, SMALL // 1024)
    assert difference(to_ref(large), to_ref(-large), wide=True).D.dtype == torch.float64
    assert difference(to_ref(large), to_ref(-large.double())).D.dtype == torch.float64


def test_share_of_elements_that_did_not_move() -> None:
    base = torch.arange(8.0)
    tuned = base.clone()
    tuned[:3] += 1
    assert difference(to_ref(base), to_ref(tuned)).unchanged == 5 / 8


def test_whole_numbers_are_subtracted_too() -> None:
    found = difference(to_ref(torch.tensor([1, 2])), to_ref(torch.tensor([4, 6])))
    assert found.norm == 5
    assert found.relative_norm == pytest.approx(5 / 5**0.5)


def test_no_relative_norm_of_a_zero_base() -> None:
    assert difference(to_ref(torch.zeros(2)), to_ref(torch.ones(2))).relative_norm is None


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_values_that_are_no_numbers_are_refused_and_the_side_is_told(bad: float) -> None:
    good, broken = torch.ones(3), torch.tensor([1.0, bad, 1.0])
    with pytest.raises(NonFiniteError, match="the base's tensor"):
        difference(to_ref(broken), to_ref(good))
    with pytest.raises(NonFiniteError, match="the tuned tensor"):
        difference(to_ref(good), to_ref(broken))


@given(st.binary(min_size=1, max_size=64), st.binary(min_size=1, max_size=64))
def test_compare_tells_equal_bytes_and_hashes_them(one: bytes, other: bytes) -> None:
    size = min(len(one), len(other))
    refs = [InMemory(Spec("U8", (size,)), data[:size]) for data in (one, other)]
    found = compare(*refs)
    assert found.same == (one[:size] == other[:size])
    assert (found.base, found.tuned) == tuple(blake3(data[:size]).hexdigest() for data in (one, other))


def test_a_difference_in_the_last_of_many_blocks_is_seen() -> None:
    base = random(3, 1 << 20)
    tuned = base.clone()
    tuned[-1, -1] += 1
    found = compare(to_ref(base), to_ref(tuned))
    assert not found.same
    assert found.tuned == blake3(raw(tuned)).hexdigest() == digest(to_ref(tuned))


def test_another_dtype_is_not_the_same_though_the_values_are() -> None:
    base = torch.ones(4)
    assert not compare(to_ref(base), to_ref(base.bfloat16())).same
    assert difference(to_ref(base), to_ref(base.bfloat16())).norm == 0


def test_what_torch_cannot_subtract() -> None:
    assert measurable(Spec("BF16", (1,)))
    assert not measurable(Spec("F4", (2,)))
    assert not measurable(Spec("C64", (1,)))
