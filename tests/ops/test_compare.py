"""compare: against dense float64 algebra, an adapter and itself, what only one has, and what has no measure."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import OptionError
from loratools.ops.compare import compare
from loratools.ops.resize import resize
from loratools.tensors import read_tensor, to_ref
from tests.ops._lora import SPECTRA, adapters, dense, low, size

NAME = "h.0.up.weight"
FLOAT64 = 1e-13  # of Σ‖bₖ‖‖aₖ‖: a few hundred units of float64


@settings(max_examples=40)
@given(adapters(dtypes=(torch.float32, torch.bfloat16)), adapters())
def test_norms_cosines_and_distances_are_those_of_the_dense_changes(a: Adapter, b: Adapter) -> None:
    found = compare(a, b)
    assert found["only_a"] == [name for name in a if name not in b] and found["only_b"] == [name for name in b if name not in a]
    assert [row["name"] for row in found["modules"]] == [name for name in a if name in b] and not found["incomparable"]
    for row in found["modules"]:
        X, Y = dense(a[row["name"]]), dense(b[row["name"]])
        noise = FLOAT64 * (size(a[row["name"]]) + size(b[row["name"]]))  # type: ignore[arg-type]
        assert row["norm_a"] == pytest.approx(float(X.norm()), abs=noise) and row["norm_b"] == pytest.approx(float(Y.norm()), abs=noise)
        assert row["distance"] == pytest.approx(float((X - Y).norm()), abs=noise)
        assert row["inner"] == pytest.approx(float((X * Y).sum()), abs=noise * (row["norm_a"] + row["norm_b"]))
    names = {*a, *b}
    one, other = (
        torch.cat([dense(x[name]).flatten() if name in x else 0 * dense(y[name]).flatten() for name in sorted(names)])
        for x, y in ((a, b), (b, a))
    )
    total = found["total"]
    scale = sum(size(delta) for x in (a, b) for delta in x.values())  # type: ignore[arg-type]
    assert total["distance"] == pytest.approx(float((one - other).norm()), abs=FLOAT64 * scale)
    if total["cosine"] is not None:
        assert total["cosine"] == pytest.approx(float(one @ other / one.norm() / other.norm()), abs=1e-9)


def whole(one: Adapter, other: Adapter) -> Tensor:
    """All changes of one as a vector, with zeros for what only the other has."""
    names = sorted({*one, *other})
    return torch.cat([dense(one[name]).flatten() if name in one else torch.zeros(dense(other[name]).numel()).double() for name in names])


@settings(max_examples=20)
@given(adapters(), st.sampled_from([2.0, -1.0]))
def test_an_adapter_and_itself(given: Adapter, factor: float) -> None:
    """Identical, and again with the same change by other factors: twice B, half A; or of opposite sign."""
    moved: dict[str, Delta] = {}
    for name, delta in given.items():
        assert isinstance(delta, LowRank)
        B, A = read_tensor(delta.B), read_tensor(delta.A)
        moved[name] = LowRank(B=to_ref(abs(factor) * B), A=to_ref(A / factor), alpha=delta.alpha, rslora=delta.rslora, layer=delta.layer)
    sign = math.copysign(1.0, factor)
    for other, sign_ in ((given, 1.0), (Adapter(deltas=moved), sign)):
        for row in compare(given, other)["modules"]:
            bound = FLOAT64 * size(given[row["name"]])  # type: ignore[arg-type]
            if row["norm_a"] == 0:
                assert (row["cosine"], row["relative_distance"], row["column_overlap"]) == (None, None, None)
                continue
            assert row["cosine"] == pytest.approx(sign_, abs=1e-12)
            assert row["distance"] <= bound if sign_ > 0 else row["distance"] == pytest.approx(2 * row["norm_a"], abs=bound)
            # directions of a σ that is 1e-6 of the largest are known to 1e-16 / 1e-6, those near the noise less
            assert max(row["column_angles"] + row["row_angles"]) < 1e-3
            assert row["column_overlap"] == pytest.approx(1, abs=1e-6) and row["row_overlap"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("spectrum", [kind for kind in SPECTRA if kind != "zero"])
def test_angles_are_those_between_the_dense_spaces(spectrum: str) -> None:
    a, b = low((20, 17), 4, 0, spectrum=spectrum), low((20, 17), 6, 1, spectrum=spectrum)
    (row,) = compare(Adapter(deltas={NAME: a}), Adapter(deltas={NAME: b}))["modules"]
    spaces = []
    for delta in (a, b):
        U, S, Vh = torch.linalg.svd(dense(delta))
        rank = int((1e-10 * S[0] < S).sum())
        spaces.append((U[:, :rank], Vh[:rank].T))
    for key, one, other in zip(("column", "row"), *spaces, strict=True):
        cosines = torch.linalg.svdvals(one.T @ other).clamp_max(1)
        # float32 factors of condition 1e6 leave the last directions to 1e-16 · 1e6; cosines are good to that
        assert torch.allclose(torch.tensor(row[f"{key}_angles"], dtype=torch.float64).cos(), cosines, atol=1e-8)
        assert row[f"{key}_overlap"] == pytest.approx(float(cosines.square().mean()), abs=1e-8)


def test_a_truncation_lies_within_what_it_was_made_of(tmp_path: Path) -> None:
    given = Adapter(deltas={NAME: low((20, 17), 8, 0, spectrum="steep")})
    (told,) = resize(given, tmp_path / "out", rank=3)["tensors"]
    (row,) = compare(given, tmp_path / "out")["modules"]
    assert row["relative_distance"] == pytest.approx(told["error"], rel=1e-9)
    assert max(row["column_angles"]) < 1e-5 and len(row["column_angles"]) == 3  # float32's rounding over σ₃'s share, 9 %


def test_orthogonal_changes(tmp_path: Path) -> None:
    eye = torch.eye(8)
    a = LowRank(B=to_ref(eye[:, :2]), A=to_ref(eye[:2]), alpha=2.0)
    b = LowRank(B=to_ref(eye[:, 2:5]), A=to_ref(eye[:3]), alpha=3.0)
    (row,) = compare(Adapter(deltas={NAME: a}), Adapter(deltas={NAME: b}))["modules"]
    assert row["cosine"] == 0 and row["distance"] == pytest.approx(math.sqrt(5))
    assert row["column_angles"] == pytest.approx([math.pi / 2] * 2) and row["row_angles"] == pytest.approx([0, 0])
    assert (row["column_overlap"], row["row_overlap"]) == (pytest.approx(0, abs=1e-15), pytest.approx(1))


def test_all_kinds_are_told() -> None:
    weight = low((20, 7), 3, 0)
    dora = DoRA(direction=weight, magnitude=to_ref(torch.ones(20, 1)))
    grown = DoRA(direction=weight, magnitude=to_ref(torch.full((20, 1), 1.5)))
    saved = Replacement(value=to_ref(torch.ones(4)))
    bias = Full(diff=to_ref(torch.ones(20)), scale=2.0)
    a = Adapter(
        deltas={
            "d.weight": dora,
            "s.weight": saved,
            "c.weight": saved,
            "u.bias": bias,
            "x.weight": weight,
            "y.weight": weight,
            "only": weight,
        }
    )
    b = Adapter(
        deltas={
            "d.weight": grown, "s.weight": saved, "c.weight": Replacement(value=to_ref(torch.full((4,), 2.0))),
            "u.bias": Full(diff=to_ref(torch.ones(20)), scale=1.0), "x.weight": saved, "y.weight": low((20, 8), 3, 0),
        }
    )  # fmt: skip
    found = compare(a, b)
    assert [row["name"] for row in found["modules"]] == ["d.weight"] and found["modules"][0]["magnitude_distance"] == 0.5
    assert {row["name"]: (row["equal"], row["relative_distance"]) for row in found["others"]} == {
        "s.weight": (True, 0.0), "c.weight": (False, 1.0), "u.bias": (False, 0.5),
    }  # fmt: skip
    assert {row["name"]: row["reason"] for row in found["incomparable"]} == {
        "x.weight": "a LoRA beside a replacement", "y.weight": "shapes differ: [20, 7] and [20, 8]",
    }  # fmt: skip
    assert found["only_a"] == ["only"] and any("DoRA" in note for note in found["notes"])


def test_two_that_have_nothing_in_common() -> None:
    found = compare(Adapter(deltas={"a.weight": low((8, 8), 2, 0)}), Adapter(deltas={"b.weight": low((8, 8), 2, 0)}))
    total = found["total"]
    assert total["cosine"] == 0 and total["distance"] == pytest.approx(math.hypot(total["norm_a"], total["norm_b"]))
    assert (total["column_overlap"], total["modules"]) == (None, 0) and any("no tensor is in both" in note for note in found["notes"])
    with pytest.raises(OptionError):
        compare(Adapter(deltas={}), Adapter(deltas={}), threads=0)
