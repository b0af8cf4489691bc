"""What a report measures of one adapter: norms and spectra of other kinds than LoRA against float64 algebra, or why there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loratools.adapter import Adapter
from loratools.deltas.full import Full
from loratools.deltas.sparse import Sparse
from loratools.formats import load, save
from loratools.formats.reading import DEFAULTS
from loratools.ops._base import Base
from loratools.tensors import read_tensor, to_ref
from loratools.workflows._report import measured as module
from loratools.workflows._report.measured import measured, touched
from tests.deltas.apply import applied
from tests.strategies import randn
from tests.workflows._adapters import MADE, Q, V, base, leading, loha, low, of

CLOSE = 1e-9  # float64 on both sides, of matrices with fewer than a hundred elements


def rows(adapter: Adapter, room: Path, on: Base | None = None) -> dict[str, dict]:
    save(adapter, room / "adapter.safetensors", format="loratools")
    known = load(room / "adapter.safetensors")
    known = known if on is None else on.resolve(known)
    bytes_done: list[int] = []
    found = measured(room / "adapter.safetensors", known, on, dict(DEFAULTS), bytes_done.append)
    assert sum(bytes_done) == touched(known, on) + (room / "adapter.safetensors").stat().st_size
    return {row["name"]: row for row in found["modules"]}


@pytest.mark.parametrize("kind", ["loha", "dora", "dora in", "rotated", "scaled", "full", "pissa"])
def test_norm_and_share_are_those_of_the_change(kind: str, tmp_path: Path) -> None:
    on = Base(base(tmp_path / "base"), dict(DEFAULTS))
    row = rows(MADE[kind](), tmp_path, on)[Q]
    W = read_tensor(on.weight(Q), torch.float64)
    change = applied(on.resolve(load(tmp_path / "adapter.safetensors"))[Q], W) - W
    assert row["norm"] == pytest.approx(float(change.norm()), rel=CLOSE)
    assert row["weight"] == pytest.approx(float(W.norm()), rel=CLOSE)
    assert row["share"] == pytest.approx(row["norm"] / row["weight"], rel=CLOSE)
    assert row["why"] is None


def test_a_loha_has_the_spectrum_of_its_product(tmp_path: Path) -> None:
    row = rows(of(q=loha()), tmp_path)[Q]
    sigma = torch.linalg.svdvals(applied(loha(), torch.zeros(8, 8, dtype=torch.float64)))
    assert row["sigma"][:4] == pytest.approx(sigma[:4].tolist(), rel=CLOSE)
    p = sigma.square() / sigma.square().sum()
    p = p[p > 1e-20]
    assert row["effective_rank"] == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-6)  # rounding's tail counts a little
    assert row["unseen"] is None


def test_a_dora_has_the_spectrum_of_its_direction(tmp_path: Path) -> None:
    row = rows(MADE["dora"](), tmp_path)[Q]
    sigma = torch.linalg.svdvals(applied(low(), torch.zeros(8, 8, dtype=torch.float64)))
    assert row["direction"] and row["sigma"] == pytest.approx(sigma[:2].tolist(), rel=CLOSE)


WHY = {
    "rotated": ("why", "what an OFT changes depends on the base, which --base gives"),
    "scaled": ("why", "what an (IA)³ changes depends on the base, which --base gives"),
    "saved": ("unseen", "a tensor that is stored whole is not decomposed"),
    "full": ("unseen", "a tensor that is stored whole is not decomposed"),
    "bias": ("unseen", "a vector has no singular values"),
}


@pytest.mark.parametrize("kind", WHY)
def test_what_has_no_measure_says_why(kind: str, tmp_path: Path) -> None:
    word, told = WHY[kind]
    found = rows(MADE[kind](), tmp_path)
    assert [row[word] for row in found.values() if row[word]] == [told]
    assert all(row["sigma"] for row in found.values() if row["unseen"] is None)


def test_a_large_change_without_factors_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = Sparse(values=to_ref(randn(6, seed=3)), places=to_ref(torch.arange(0, 60, 10)), size=(8, 8))
    whole = rows(of(q=sparse), tmp_path)[Q]
    assert whole["unseen"] is None and len(whole["sigma"]) == 8
    monkeypatch.setattr(module, "SMALL", 63)
    (tmp_path / "again").mkdir()
    row = rows(of(q=sparse), tmp_path / "again")[Q]
    assert row["sigma"] is None and row["norm"] == pytest.approx(whole["norm"], rel=CLOSE)
    assert row["unseen"] == "the change has no factors, and its 64 elements are more than the 63 that are decomposed whole"


def test_what_is_not_finite_has_no_measure_and_says_so(tmp_path: Path) -> None:
    broken = replace(low(), B=to_ref(torch.full((8, 2), torch.nan)))
    found = rows(of(q=broken), tmp_path)
    assert (found[Q]["norm"], found[Q]["sigma"], found[Q]["why"]) == (None, None, "its values are not all finite")
    assert found[V]["norm"] > 0


def test_touched_is_what_the_base_has_of_it(tmp_path: Path) -> None:
    on = Base(base(tmp_path / "base"), dict(DEFAULTS))
    assert touched(of(), on) == 4 * (8 * 8 + 4 * 8 + 12 * 8)
    assert touched(of(), None) == 0
    assert touched(Adapter({Q: leading(), "other.weight": Full(diff=to_ref(randn(2, 2, seed=1)))}), on) == 4 * 64
