"""One weight through its deltas: right against dense algebra, and the same bytes however it is cut into blocks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratools.deltas.base import Delta
from loratools.deltas.compose import Chain
from loratools.deltas.full import Full, Replacement
from loratools.deltas.lowrank import LARGE, LowRank
from loratools.errors import NonFiniteError
from loratools.refs import Spec
from loratools.rounding import Rounding
from loratools.statistics import Statistics
from loratools.stream import Applied, apply_blocks, cast_blocks
from loratools.tensors import as_tensor, to_ref
from tests.files import raw
from tests.strategies import Drawn, additive, deltas, dora, floats, low_rank, of_dtype, part, randn, simple, stacked

# of a weight's largest value: the rounding to its dtype, half a unit in the last place, and for float64 a few roundings of sums
EPSILON = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-46}


def merged(
    W: Tensor | None, applications: Sequence[tuple[Delta, float]], block: int = 1 << 17, dtype: str | None = None, full: bool = False
) -> tuple[Tensor, Statistics, bytes]:
    """W′ as stored, what was measured, and the bytes of W that were reported as read."""
    source = None if W is None else to_ref(W)
    spec = applications[0][0].spec(source.spec if source else None) if applications else source.spec
    target = Spec(dtype, spec.shape) if dtype else spec
    statistics, seen = Statistics(kinds=(), full=full), bytearray()
    blocks = apply_blocks(Applied(source, target, tuple(applications), "cpu", block), statistics, seen.extend)
    return as_tensor(bytearray(b"".join(bytes(part) for part in blocks)), target), statistics, bytes(seen)


def once(wide: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(wide.shape, dtype=dtype)
    Rounding()(wide.contiguous(), out)
    return out


def close(found: Tensor, expected: Tensor) -> bool:
    size = float(expected.abs().max()) if expected.numel() else 0.0
    # 1e-6: float16 loses more where it is subnormal
    return float((found.double() - expected).abs().max()) <= 2 * EPSILON[found.dtype] * size + 1e-7 * (found.dtype == torch.float16)


@given(deltas(), floats, st.sampled_from([1, 7, 64, 1000, 1 << 17]))
@settings(max_examples=300)
def test_every_delta_is_its_algebra_in_any_blocking(drawn: Drawn, dtype: torch.dtype, block: int) -> None:
    drawn = of_dtype(drawn, dtype)
    found, statistics, seen = merged(drawn.W, [(drawn.delta, 1.0)], block)
    assert found.dtype == dtype and found.shape == drawn.W.shape
    assert close(found, drawn.dense(drawn.W.double()))
    assert raw(found) == raw(merged(drawn.W, [(drawn.delta, 1.0)])[0])
    assert seen == raw(drawn.W)
    assert statistics.applied == 1 and statistics.total == drawn.W.numel()


@given(deltas(), floats, st.floats(-2, 2), st.sampled_from([1, 13, 1 << 17]))
@settings(max_examples=100)
def test_a_strength_is_a_point_on_the_line_from_w(drawn: Drawn, dtype: torch.dtype, strength: float, block: int) -> None:
    drawn = of_dtype(drawn, dtype)
    found = merged(drawn.W, [(drawn.delta, strength)], block)[0]
    assert close(found, torch.lerp(drawn.W.double(), drawn.dense(drawn.W.double()), strength))
    assert raw(found) == raw(merged(drawn.W, [(drawn.delta, strength)])[0])


@given(st.data(), floats, st.sampled_from([1, 13, 1 << 17]))
@settings(max_examples=100)
def test_several_adapters_add_their_changes(data: st.DataObject, dtype: torch.dtype, block: int) -> None:
    first = of_dtype(data.draw(simple()), dtype)
    others = [data.draw(simple(tuple(first.W.shape))) for _ in range(data.draw(st.integers(1, 2)))]
    strengths = [data.draw(st.sampled_from([1.0, 0.5, -1.5])) for _ in range(1 + len(others))]
    W = first.W.double()
    expected = W + sum(s * (drawn.dense(W) - W) for s, drawn in zip(strengths, [first, *others], strict=True))
    applications = [(drawn.delta, s) for s, drawn in zip(strengths, [first, *others], strict=True)]
    found, statistics, _ = merged(first.W, applications, block)
    largest = max(float(drawn.dense(W).abs().max()) for drawn in [first, *others])  # terms may cancel
    assert float((found.double() - expected).abs().max()) <= EPSILON[dtype] * 8 * max(largest, float(expected.abs().max())) + 1e-7
    assert raw(found) == raw(merged(first.W, applications)[0]) and statistics.applied == len(applications)


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("kind", ["lora", "out", "in"])
def test_a_vocabulary_that_ends_in_one_row(dtype: torch.dtype, kind: str) -> None:
    """32001 rows: a block of one row is where a product usually takes another kernel."""
    drawn = low_rank((32001, 16), 8, 0)
    drawn = of_dtype(drawn if kind == "lora" else dora(drawn, kind, 5), dtype)
    whole = merged(drawn.W, [(drawn.delta, 1.0)], 1 << 30)[0]
    assert close(whole, drawn.dense(drawn.W.double()))
    for block in (16 * 320, 16 * 8000, 1 << 17):
        assert raw(merged(drawn.W, [(drawn.delta, 1.0)], block)[0]) == raw(whole)


@pytest.mark.parametrize("block", [1, 5, 33, 1 << 17])
def test_combinators_with_dora_inside_and_odd_boundaries(block: int) -> None:
    rows, columns = dora(low_rank((37, 11), 3, 0), "out", 1), dora(low_rank((37, 11), 3, 5), "in", 2)
    for inner in (rows, columns):
        for drawn in (part(inner, 5, 3, 9), part(inner, 0, 130, 9), stacked([inner, None, rows], (37, 11), 9)):
            assert close(merged(drawn.W, [(drawn.delta, 1.0)], block)[0], drawn.dense(drawn.W.double()))
    deep = part(part(columns, 2, 1, 3), 4, 4, 8)
    assert close(merged(deep.W, [(deep.delta, 1.0)], block)[0], deep.dense(deep.W.double()))


def test_untouched_rows_of_a_part_keep_their_bits() -> None:
    drawn = part(low_rank((4, 6), 2, 0), 3, 2, 1)
    W = drawn.W.bfloat16()
    W[0] = -0.0
    found = merged(W, [(drawn.delta, 1.0)])[0]
    assert raw(found[:3]) == raw(W[:3]) and raw(found[7:]) == raw(W[7:])


@given(floats, st.integers(1, 30), st.integers(1, 30), st.booleans())
@settings(max_examples=50)
def test_a_resized_embedding_then_lora(dtype: torch.dtype, old: int, new: int, by_columns: bool) -> None:
    value, then = randn(new, 6, seed=1), low_rank((new, 6), 2, 3)
    then = dora(then, "in", 7) if by_columns else then
    W = randn(old, 6, seed=2, dtype=dtype)
    delta = Chain(first=Replacement(value=to_ref(value)), then=then.delta)
    found, _, seen = merged(W, [(delta, 1.0)], block=7)
    assert found.shape == (new, 6) and found.dtype == dtype
    assert close(found, then.dense(value.double())) and seen == raw(W)


def test_a_tensor_the_base_lacks() -> None:
    value = randn(3, 4, seed=0)
    found, statistics, seen = merged(None, [(Replacement(value=to_ref(value)), 1.0)])
    assert torch.equal(found, value) and seen == b"" and statistics.row("x")["relative_norm"] is None


@pytest.mark.parametrize("values", [[2**62 + 1, -3], [0, 1]])
def test_whole_integer_tensors_pass_as_they_are(values: list[int]) -> None:
    """Batch norm's counter is saved with its module; float64 would lose a large one."""
    value = torch.tensor(values)
    assert torch.equal(merged(torch.zeros(2, dtype=torch.int64), [(Replacement(value=to_ref(value)), 1.0)])[0], value)
    counter = torch.tensor(values[0])
    assert torch.equal(merged(torch.tensor(7), [(Replacement(value=to_ref(counter)), 1.0)])[0], counter)


def test_a_replacement_of_the_same_dtype_keeps_every_bit() -> None:
    value = torch.tensor([[-0.0, 1e-45, 3.0]])
    assert raw(merged(torch.zeros(1, 3), [(Replacement(value=to_ref(value)), 1.0)])[0]) == raw(value)


@given(additive(), st.sampled_from(["F32", "BF16", "F16", "F64"]), floats)
@settings(max_examples=50)
def test_another_dtype_is_rounded_to_once(drawn: Drawn, code: str, dtype: torch.dtype) -> None:
    drawn = of_dtype(drawn, dtype)
    found = merged(drawn.W, [(drawn.delta, 1.0)], dtype=code)[0]
    assert close(found, drawn.dense(drawn.W.double()))


def test_casting_alone_rounds_once() -> None:
    W = torch.tensor([1 + 2.0**-8 + 2.0**-40, 3.0], dtype=torch.float64)
    data = b"".join(bytes(block) for block in cast_blocks(to_ref(W), Spec("BF16", (2,)), 1, lambda _: None))
    assert as_tensor(bytearray(data), Spec("BF16", (2,))).tolist() == [1.0078125, 3.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_overflow_is_an_error(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    W = torch.full((3, 4), 1.0, dtype=dtype)
    near = torch.full((3, 4), largest / 2, dtype=dtype)
    assert torch.isfinite(merged(W, [(Full(diff=to_ref(near)), 1.0)])[0]).all()
    for strength in (4.0, -4.0):
        with pytest.raises(NonFiniteError, match="would not be finite"):
            merged(W, [(Full(diff=to_ref(near)), strength)])


def test_one_overflow_among_many_is_seen() -> None:
    W = torch.zeros(400, 400, dtype=torch.float16)
    diff = torch.zeros(400, 400)
    diff[399, 399] = 65520.0  # rounds up to infinity; 65519 does not
    with pytest.raises(NonFiniteError):
        merged(W, [(Full(diff=to_ref(diff)), 1.0)])
    diff[399, 399] = 65519.0
    assert merged(W, [(Full(diff=to_ref(diff)), 1.0)])[0][399, 399] == 65504


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_base_or_saved_tensor_that_is_not_finite(bad: float) -> None:
    drawn = low_rank((3, 4), 1, 0)
    W = drawn.W.clone()
    W[2, 1] = bad
    for applications in ([(drawn.delta, 1.0)], [(dora(drawn, "in", 1).delta, 1.0)]):
        with pytest.raises(NonFiniteError):
            merged(W, applications)
    with pytest.raises(NonFiniteError):
        merged(drawn.W, [(Replacement(value=to_ref(W)), 1.0)])


@given(deltas(), floats)
@settings(max_examples=60)
def test_what_is_measured(drawn: Drawn, dtype: torch.dtype) -> None:
    drawn = of_dtype(drawn, dtype)
    found, statistics, _ = merged(drawn.W, [(drawn.delta, 1.0)], block=50, full=True)
    W, after = drawn.W.double(), drawn.dense(drawn.W.double())
    row, change = statistics.row("x"), float((after - W).norm())
    if found.dtype != torch.float64:  # where they are one sum of squares
        assert row["relative_norm"] == pytest.approx(change / float(W.norm()), rel=1e-6, abs=1e-9)
    assert row["sampled"] == 1.0
    if change > 1e-3:
        lost = float((found.double() - after).norm()) / change
        assert row["survived"] == pytest.approx(1 - lost, abs=1e-5)
        assert row["unchanged"] == pytest.approx(float((found == drawn.W).double().mean()))


@pytest.mark.parametrize("ratio", [1e-3, 1e-2, 1.0])
def test_large_bfloat16_weights_are_fast_and_right(ratio: float) -> None:
    """From LARGE elements on: sums in float32, one slice; the same bytes in any blocks, ≥ 99.99 % within half a unit."""
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(1100, 1024, generator=generator).bfloat16()
    A, B = torch.randn(16, 1024, generator=generator), torch.randn(1100, 16, generator=generator) * ratio / 4
    low = LowRank(A=to_ref(A), B=to_ref(B), alpha=16, layer="linear")
    assert W.numel() >= LARGE
    written = []
    for block in (1 << 18, 40_000, 1024):
        applied = Applied(to_ref(W), to_ref(W).spec, ((low, 1.0),), block=block)
        written.append(b"".join(bytes(data) for data in apply_blocks(applied, Statistics(kinds=()), lambda _: None)))
    assert written[0] == written[1] == written[2]
    found = as_tensor(bytearray(written[0]), to_ref(W).spec).double()
    exact = W.double() + B.double() @ A.double()
    half = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 9)  # half of 2**(e - 8), the unit of 8 bits
    beyond = ((found - exact).abs() > half).double().mean().item()
    assert beyond <= 1e-4
