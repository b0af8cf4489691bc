"""ExactProduct: the same bits for any blocking and thread count, and close to the float64 product."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratools.errors import NonFiniteError, OptionError
from loratools.linalg.exact import ExactProduct, ExactRight, _bits


def bits(X: Tensor) -> Tensor:
    return X.contiguous().view(torch.int64)


def factors(m: int, n: int, rank: int, seed: int, spread: int = 0) -> tuple[Tensor, Tensor]:
    """Gaussian factors; with spread, components and rows over 2**±spread."""
    generator = torch.Generator().manual_seed(seed)
    B, A = torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator)
    if spread:
        B = torch.ldexp(B, torch.randint(-spread, spread, (1, rank), generator=generator))
        A = torch.ldexp(A, torch.randint(-spread, spread, (rank, 1), generator=generator))
        B = torch.ldexp(B, torch.randint(-spread, spread, (m, 1), generator=generator))
    return B, A


@given(
    m=st.integers(1, 40), n=st.integers(1, 40), rank=st.integers(1, 70), step=st.integers(1, 40),
    slices=st.integers(1, 3), seed=st.integers(0, 99), spread=st.sampled_from([0, 10]),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_same_bits_in_any_blocking_and_order(m: int, n: int, rank: int, step: int, slices: int, seed: int, spread: int) -> None:
    B, A = factors(m, n, rank, seed, spread)
    product = ExactProduct(B, A, scale=1 / 3, slices=slices)
    whole = product.rows(0, m)
    blocks = torch.cat([product.rows(i, min(m, i + step)) for i in range(0, m, step)])
    assert torch.equal(bits(whole), bits(blocks))
    order = torch.randperm(rank, generator=torch.Generator().manual_seed(seed))
    permuted = ExactProduct(B[:, order], A[order], scale=1 / 3, slices=slices).rows(0, m)
    assert torch.equal(bits(whole), bits(permuted))


@pytest.mark.parametrize("rank", [1, 2, 15, 16, 17, 256, 4096])
@pytest.mark.parametrize("slices", [1, 2, 3])
def test_every_partial_sum_is_an_integer_below_2_to_the_53(rank: int, slices: int) -> None:
    # All entries of one sign, at the top of a grid or with remainders of half a unit: the longest sums there are.
    for entry in (2 - 2.0**-22, 1.0, 2.0**-26 + 1, 4 / 3, (1 + 2.0**-52) / max(1, rank) ** 0.5):
        B, A = torch.full((2, rank), entry, dtype=torch.float64), torch.full((rank, 3), entry, dtype=torch.float64)
        product = ExactProduct(B, A, slices=slices)
        for order in range(1, slices + 1):
            left, right = product._left[:, : order * rank], product._right[(slices - order) * rank :]
            grid = 2.0 ** float(product.units[0][0, 0] + product.units[1][0, 0] - (order - 1) * product.bits)
            assert (left.abs() @ right.abs()).max().item() / grid <= 2**53
            assert torch.equal(left @ right / grid, (left @ right / grid).round())
    assert [_bits(rank) for rank in (1, 2, 4, 16, 256, 4096)] == [26, 25, 25, 24, 22, 20]


def test_one_and_two_threads_agree() -> None:
    B, A = factors(700, 500, 48, 0)
    product, before = ExactProduct(B, A), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(product.rows(0, 700))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(bits(results[0]), bits(results[1]))


# One slice keeps a row to 2**-26 of its norm at least, here times √256 entries that may all be off. Two and three add the bits of
# theirs, down to the rounding of float64 itself.
@pytest.mark.parametrize(("slices", "tolerance"), [(1, 2e-6), (2, 1e-12), (3, 4e-16)])
@pytest.mark.parametrize("rank", [1, 16, 256])
@pytest.mark.parametrize("spread", [0, 10])
def test_error_against_exact_arithmetic(slices: int, tolerance: float, rank: int, spread: int) -> None:
    B, A = factors(3, 4, rank, 1, spread)
    got = ExactProduct(B, A, scale=0.1, slices=slices).rows(0, 3)
    size = (B.double().abs() @ A.double().abs()) * 0.1
    for i in range(3):
        for j in range(4):
            scaled = [Fraction(b * 0.1) for b in B[i].double().tolist()]  # scale · B is rounded to float64 once, as documented
            true = sum(b * Fraction(a) for b, a in zip(scaled, A[:, j].double().tolist(), strict=True))
            assert abs(Fraction(got[i, j].item()) - true) <= tolerance * size[i, j].item()


def test_out_and_scratch_are_used() -> None:
    B, A = factors(8, 5, 3, 0)
    product = ExactProduct(B, A)
    out, scratch = torch.empty(4, 5, dtype=torch.float64), torch.full((6, 5), 7.0, dtype=torch.float64)
    assert product.rows(2, 6, out=out, scratch=scratch) is out
    assert torch.equal(out, product.rows(2, 6))
    assert (scratch[4:] == 7.0).all()


def test_zeros_empty_factors_and_signs_of_zero() -> None:
    zero = ExactProduct(torch.zeros(3, 2), -torch.ones(2, 4)).rows(0, 3)
    assert torch.equal(bits(zero), torch.zeros(3, 4, dtype=torch.int64))  # +0, though every product is -0
    assert torch.equal(bits(ExactProduct(torch.zeros(1, 1), -torch.ones(1, 4)).rows(0, 1)), torch.zeros(1, 4, dtype=torch.int64))
    for m, rank, n in [(3, 0, 4), (0, 2, 4), (3, 2, 0)]:
        assert torch.equal(ExactProduct(torch.ones(m, rank), torch.ones(rank, n)).rows(0, m), torch.zeros(m, n, dtype=torch.float64))


def test_far_apart_magnitudes() -> None:
    # float32 subnormals, and components whose B and A are 2**200 apart: balancing makes both harmless
    tiny = torch.full((2, 1), 2.0**-149)
    assert ExactProduct(tiny, tiny.T).rows(0, 2).tolist() == [[2.0**-298] * 2] * 2
    B, A = torch.tensor([[2.0**-100, 3.0]]), torch.tensor([[2.0**100], [5.0]])
    assert ExactProduct(B, A).rows(0, 1).item() == 16.0
    lost = torch.full((1, 1), 2.0**-900, dtype=torch.float64)
    assert ExactProduct(lost, lost).rows(0, 1).item() == 0.0


def test_faults() -> None:
    with pytest.raises(NonFiniteError):
        ExactProduct(torch.tensor([[float("nan")]]), torch.ones(1, 1))
    with pytest.raises(NonFiniteError):
        ExactProduct(torch.ones(1, 1), torch.tensor([[float("inf")]]))
    with pytest.raises(NonFiniteError):
        ExactProduct(torch.full((1, 1), 1e300, dtype=torch.float64), torch.full((1, 1), 1e300, dtype=torch.float64))
    with pytest.raises(OptionError):
        ExactProduct(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(OptionError):
        ExactProduct(torch.ones(2, 3), torch.ones(3, 2), slices=4)


@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 30), st.sampled_from([1.0, 1e-30, 1e30]), st.integers(0, 2**16))
def test_a_right_hand_factor_gives_the_same_bits_in_any_blocks(rows: int, inner: int, columns: int, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(rows, inner, generator=generator, dtype=torch.float64) * size
    A = torch.randn(inner, columns, generator=generator, dtype=torch.float64)
    times = ExactRight(A)
    whole = times(X)
    assert torch.equal(whole, torch.cat([times(X[start : start + 3]) for start in range(0, rows, 3)]))
    bound = X.norm(dim=1, keepdim=True) * A.norm(dim=0)  # of the norms' product: √k·2⁻⁴⁵ for these inner sizes
    assert bool(((whole - X @ A).abs() <= bound * inner**0.5 * 2.0**-43).all())
    assert bool(((ExactRight(A, slices=3)(X) - X @ A).abs() <= bound * inner**0.5 * 2.0**-50).all())


def test_a_right_hand_factor_of_nan_and_a_weight_of_inf() -> None:
    with pytest.raises(NonFiniteError, match="factor"):
        ExactRight(torch.tensor([[float("nan")]]))
    with pytest.raises(NonFiniteError, match="weight"):
        ExactRight(torch.ones(1, 1))(torch.tensor([[float("inf")]]))
