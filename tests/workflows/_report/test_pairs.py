"""Every two adapters of a report: LoRA by its changes, DoRA by its directions or, with a base, by what it makes of the weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loratools.formats.reading import DEFAULTS
from loratools.ops._base import Base
from loratools.tensors import read_tensor, to_ref
from loratools.workflows._report.pairs import ANGLES, again, pairs
from tests.deltas.apply import applied
from tests.workflows._adapters import MADE, SHAPES, Q, V, base, dora, low, of


@pytest.fixture
def on(tmp_path: Path) -> Base:
    return Base(base(tmp_path / "base"), dict(DEFAULTS))


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one * other).sum() / one.norm() / other.norm())


def test_every_two_by_their_places() -> None:
    found = pairs([of(), MADE["patterns"](), MADE["loha"]()], None, 1, lambda more: None)
    assert [(row["a"], row["b"]) for row in found] == [(0, 1), (0, 2), (1, 2)]
    assert {row["name"] for row in found[0]["modules"]} == set(SHAPES)
    row = next(row for row in found[0]["modules"] if row["name"] == V)
    one, other = (applied(adapter[V], torch.zeros(4, 8, dtype=torch.float64)) for adapter in (of(), MADE["patterns"]()))
    assert row["cosine"] == pytest.approx(cosine(one, other), rel=1e-9)  # float64 on both sides, of 32 elements
    assert row["norm_a"] == pytest.approx(float(one.norm()), rel=1e-9)
    angle = float(torch.linalg.qr(one)[0][:, :2].T.matmul(other[:, 0] / other[:, 0].norm()).norm().clamp(max=1).arccos().rad2deg())
    assert row["column_angles"] == [pytest.approx(angle, abs=0.051)]  # told to a tenth of a degree; the other is of rank 1
    assert len(row["row_angles"]) <= ANGLES


def test_doras_without_a_base_are_compared_by_their_directions() -> None:
    one, other = of(q=dora()), of(q=replace(dora(), magnitude=to_ref(torch.ones(8, 1))))
    (pair,) = pairs([one, other], None, 1, lambda more: None)
    row = next(row for row in pair["modules"] if row["name"] == Q)
    assert row["cosine"] == pytest.approx(1) and row["magnitude_distance"] > 0
    assert any("the directions ΔV are compared" in note for note in pair["notes"])


def test_doras_with_a_base_are_compared_by_what_they_make_of_it(on: Base) -> None:
    one, other = (on.resolve(adapter) for adapter in (of(q=dora()), of(q=replace(dora(), magnitude=to_ref(torch.ones(8, 1))))))
    done: list[int] = []
    (pair,) = pairs([one, other], on, 1, done.append)
    W = read_tensor(on.weight(Q), torch.float64)
    row = next(row for row in pair["modules"] if row["name"] == Q)
    # float64 on both sides, of 64 elements
    assert row["cosine"] == pytest.approx(cosine(applied(one[Q], W) - W, applied(other[Q], W) - W), rel=1e-9)
    assert row["column_overlap"] is None and row["cosine"] < 0.999
    assert not any("ΔV" in note for note in pair["notes"])
    assert done == [4 * 64] and again([one, other], on) == 4 * 64
    assert again([one, other, of()], on) == 3 * 4 * 64 and again([of(), of()], on) == 0


def test_what_has_no_common_measure_is_told_with_its_reason(on: Base) -> None:
    (pair,) = pairs([of(), MADE["scaled"]()], None, 1, lambda more: None)
    assert pair["incomparable"] == [{"name": Q, "reason": "a LoRA beside an (IA)³"}]
    assert {row["name"] for row in pair["modules"]} == set(SHAPES) - {Q}
    (pair,) = pairs([on.resolve(of()), on.resolve(MADE["scaled"]())], on, 1, lambda more: None)
    assert pair["incomparable"] == [] and len(pair["modules"]) == 3


def test_what_is_not_finite_in_one_stops_no_other_module() -> None:
    broken = of(q=replace(low(), B=to_ref(torch.full((8, 2), torch.nan))))
    (pair,) = pairs([of(), broken], None, 1, lambda more: None)
    assert {row["name"] for row in pair["modules"]} == set(SHAPES) - {Q}
    assert pair["incomparable"] == [{"name": Q, "reason": "a factor holds inf or nan"}]
    assert any(note.startswith("1 tensor has no measure") for note in pair["notes"])


def test_what_one_alone_has_is_counted() -> None:
    (pair,) = pairs([MADE["bias"](), MADE["saved"]()], None, 1, lambda more: None)
    assert (pair["only_a"], pair["only_b"]) == (1, 1)
    (pair,) = pairs([MADE["saved"](), MADE["saved"]()], None, 1, lambda more: None)
    assert pair["others"] == [{"name": "score.weight", "equal": True, "relative_distance": 0.0}]
