"""Rows of a change, and changes of rows as one: the same numbers as the whole's, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loratools.deltas.base import Additive, Delta
from loratools.deltas.compose import Part
from loratools.deltas.cut import alpha_for, cut, restacked, stack, unstacked
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.loha import LoHa
from loratools.deltas.lokr import LoKr
from loratools.deltas.lowrank import LowRank
from loratools.deltas.parts import Joined, joined
from loratools.deltas.scaled import Scaled
from loratools.errors import LoratoolsError, ShapeError, UnsupportedError
from loratools.refs import Spec
from loratools.tensors import read_tensor, to_ref
from tests.strategies import randn

W = randn(6, 4, seed=9).double()


def low(rows: int = 6, seed: int = 0, alpha: float = 3.0, rank: int = 2) -> LowRank:
    return LowRank(A=to_ref(randn(rank, 4, seed=seed)), B=to_ref(randn(rows, rank, seed=seed + 1)), alpha=alpha, layer="linear")


def changed(delta: Delta, W: Tensor) -> Tensor:
    spec = Spec("F64", tuple(W.shape))
    return delta.bind(delta.spec(spec), lambda rows: iter([(slice(0, len(W)), W.clone())]))(slice(0, len(W)), W.clone())


KINDS: dict[str, Delta] = {
    "lora": low(),
    "loha": LoHa(
        w1_a=to_ref(randn(6, 2, seed=1)), w1_b=to_ref(randn(2, 4, seed=2)), w2_a=to_ref(randn(6, 2, seed=3)),
        w2_b=to_ref(randn(2, 4, seed=4)), scale=0.5,
    ),
    "lokr": LoKr(w1=to_ref(randn(3, 2, seed=1)), w2=to_ref(randn(2, 2, seed=2)), scale=0.5),
    "full": Full(diff=to_ref(randn(6, 4, seed=3)), scale=0.5),
    "replacement": Replacement(value=to_ref(randn(6, 4, seed=4))),
    "dora": DoRA(direction=low(), magnitude=to_ref(randn(6, 1, seed=5))),
    "rows scaled": Scaled(l=to_ref(randn(6, seed=6)), axis=0),
    "columns scaled": Scaled(l=to_ref(randn(4, seed=7)), axis=1),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [(0, 2), (1, 6), (5, 6)])
def test_the_rows_are_the_wholes(kind: str, part: tuple[int, int]) -> None:
    found = changed(cut(KINDS[kind], *part), W[slice(*part)])
    torch.testing.assert_close(found, changed(KINDS[kind], W)[slice(*part)], rtol=1e-14, atol=1e-14)  # float64


def test_a_cut_difference_says_what_it_is() -> None:
    found = cut(KINDS["lokr"], 1, 4)
    assert isinstance(found, Additive) and found.kind == "lokr" and found.shape() == (3, 4) and found.reproducible
    assert found.facts() == KINDS["lokr"].facts() and set(found.refs()) == {"w1", "w2"}
    assert found.map(lambda ref: ref).shape() == (3, 4)


def test_norms_of_columns_are_of_all_rows() -> None:
    with pytest.raises(UnsupportedError, match="DoRA delta along the inputs is one of all rows"):
        cut(DoRA(direction=low(), magnitude=to_ref(torch.ones(1, 4))), 0, 2)


def test_a_shared_a_is_kept() -> None:
    whole = low()
    found = stack([cut(whole, 0, 2), cut(whole, 2, 4), cut(whole, 4, 6)], (2, 2, 2))
    assert isinstance(found, LowRank) and found.A is whole.A and found.alpha == 3.0
    assert torch.equal(read_tensor(found.B), read_tensor(whole.B))


@pytest.mark.parametrize("lacking", [None, 0, 1, 2])
def test_other_as_lie_one_above_the_other(lacking: int | None) -> None:
    parts: list[Delta | None] = [None if index == lacking else low(2, seed=10 * index) for index in range(3)]
    found = stack(parts, (2, 2, 2))
    assert isinstance(found, LowRank) and found.scaling == 1.5
    assert found.rank == (6 if lacking is None else 4)
    rows = [W[2 * i : 2 * i + 2] if part is None else changed(part, W[2 * i : 2 * i + 2]) for i, part in enumerate(parts)]
    torch.testing.assert_close(changed(found, W), torch.cat(rows), rtol=1e-14, atol=1e-14)
    again = unstacked(found, (0, 2, 4, 6))  # and back: B's blocks, each with its own A
    for part, whole in zip(again, parts, strict=True):
        assert part.rank == 2
        if whole is None:
            assert not read_tensor(part.B).any()
        else:
            assert isinstance(whole, LowRank) and part.scaling == 1.5
            assert torch.equal(read_tensor(part.A), read_tensor(whole.A)) and torch.equal(read_tensor(part.B), read_tensor(whole.B))


def test_a_full_b_goes_apart_with_all_of_a() -> None:
    whole = low(rank=3)
    found = unstacked(whole, (0, 2, 4, 6))
    assert all(part.A is whole.A and part.scaling == whole.scaling for part in found)


@pytest.mark.parametrize("kind", ["full", "replacement", "dora"])
def test_other_kinds_one_above_the_other(kind: str) -> None:
    found = stack([cut(KINDS[kind], 0, 2), cut(KINDS[kind], 2, 6)], (2, 4))
    torch.testing.assert_close(changed(found, W), changed(KINDS[kind], W), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("parts", "error", "words"),
    [
        ([low(2), low(4, alpha=5.0)], UnsupportedError, "its parts have different scalings"),
        ([cut(KINDS["dora"], 0, 2), None], UnsupportedError, "and none of the others"),
        ([low(2), Full(diff=to_ref(torch.ones(4, 4)))], UnsupportedError, "no one change of a fused weight is these"),
        ([Full(diff=to_ref(torch.ones(3, 4))), Full(diff=to_ref(torch.ones(4, 4)))], ShapeError, "not as many rows"),
        ([Full(diff=to_ref(torch.ones(2, 4))), Full(diff=to_ref(torch.ones(4, 4).half()))], UnsupportedError, "different dtypes"),
    ],
)
def test_what_is_no_one_change(parts: list[Delta | None], error: type[LoratoolsError], words: str) -> None:
    with pytest.raises(error, match=words):
        stack(parts, (2, 4))


def test_changes_of_stretches_are_one_where_there_is_one() -> None:
    q, v = low(2, seed=1), low(1, seed=5)
    found = restacked(joined([Part(delta=q, start=1, stop=3), Part(delta=v, start=4, stop=5)]), 6)
    assert isinstance(found, LowRank) and found.rank == 4
    zero = torch.zeros(1, 4).double()
    rows = [zero, changed(q, 0 * W[:2]), zero, changed(v, 0 * W[:1]), zero]
    torch.testing.assert_close(changed(found, 0 * W), torch.cat(rows), rtol=1e-14, atol=1e-14)
    kept = joined([Part(delta=q, start=0, stop=2), Part(delta=Full(diff=to_ref(torch.ones(4, 4))), start=2, stop=6)])
    assert isinstance(kept, Joined) and restacked(kept, 6) is kept and restacked(q, 2) is q
    lone = restacked(Part(delta=q, start=1, stop=3), 6)
    assert isinstance(lone, LowRank) and lone.shape()[0] == 6
    assert not read_tensor(lone.B)[[0, 3, 4, 5]].any() and torch.equal(read_tensor(lone.B)[1:3], read_tensor(q.B))


def test_the_alpha_of_a_scaling() -> None:
    assert all(alpha_for(16 / rank, rank) / rank == 16 / rank for rank in range(1, 200))
