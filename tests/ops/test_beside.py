"""Changes beside the weights they change: norms of every kind against float64 algebra, and null where there is none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loratools.adapter import Adapter
from loratools.cli._inspected import shown
from loratools.deltas.full import Replacement
from loratools.formats import load, save
from loratools.formats.reading import DEFAULTS
from loratools.ops._base import Base
from loratools.ops.inspect import inspect
from loratools.tensors import read_tensor, to_ref
from tests.deltas.apply import applied
from tests.strategies import randn
from tests.workflows._adapters import MADE, Q, V, base, dora, low, of

CLOSE = 1e-9  # float64 on both sides, of matrices with fewer than a hundred elements
FIELDS = ("weight_norm", "change_norm", "relative_norm")


def saved(adapter: Adapter, room: Path) -> Path:
    save(adapter, room / "adapter.safetensors", format="loratools")
    return room / "adapter.safetensors"


@pytest.mark.parametrize("kind", sorted(MADE))
def test_every_kind_is_measured_on_the_weights(kind: str, tmp_path: Path) -> None:
    on = Base(base(tmp_path / "base"), dict(DEFAULTS))
    path = saved(MADE[kind](), tmp_path)
    deltas = on.resolve(load(path))
    for row in inspect(path, base=tmp_path / "base", spectra=True)["modules"]:
        W = read_tensor(on.weight(row["name"]), torch.float64)
        change = (applied(deltas[row["name"]], W) - W).norm()
        assert row["weight_norm"] == pytest.approx(float(W.norm()), rel=CLOSE)
        assert row["change_norm"] == pytest.approx(float(change), rel=CLOSE)
        assert row["relative_norm"] == pytest.approx(float(change / W.norm()), rel=CLOSE)


def test_progress_tells_the_weights_that_are_read(tmp_path: Path) -> None:
    path, told = saved(of(), tmp_path), list[tuple[int, int]]()
    inspect(path, base=base(tmp_path / "base"), spectra=True, progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 4 * (64 + 32 + 96)) for done in (256, 384, 768)]


def test_without_the_data_or_without_a_base_there_are_no_such_fields(tmp_path: Path) -> None:
    path = saved(of(), tmp_path)
    for report in (inspect(path, spectra=True), inspect(path, base=base(tmp_path / "base"), values=True)):
        assert not any(field in row for row in report["modules"] for field in FIELDS)


def test_what_has_no_norm_is_null(tmp_path: Path) -> None:
    broken = replace(dora(), direction=replace(low(), B=to_ref(torch.full((8, 2), torch.nan))))
    wider, new = Replacement(value=to_ref(randn(5, 8, seed=1))), Replacement(value=to_ref(randn(2, 2, seed=2)))
    adapter = of(q=broken, score=wider)
    path = saved(replace(adapter, deltas={**adapter, "extra.weight": new}), tmp_path)
    report = inspect(path, base=base(tmp_path / "base"), spectra=True)
    rows = {row["name"]: row for row in report["modules"]}
    for name, weight in ((Q, False), ("score.weight", False), ("extra.weight", True)):
        assert [rows[name][field] is None for field in FIELDS] == [weight, True, True]
    assert rows[V]["relative_norm"] > 0 and rows["score.weight"]["weight_norm"] > 0
    assert any(text.startswith(f"{Q}: ") and "non-finite" in text for text in report["warnings"])


def test_of_a_quantised_base_no_weights_are_read(tmp_path: Path) -> None:
    path, folder = saved(of(), tmp_path), base(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "x"}}))
    rows = inspect(path, base=folder, spectra=True)["modules"]
    assert {row[field] for row in rows for field in FIELDS} == {None} and all(row["norm"] > 0 for row in rows)


def test_the_table_has_a_column_of_shares(tmp_path: Path) -> None:
    path, folder = saved(of(q=dora()), tmp_path), base(tmp_path / "base")
    report = inspect(path, base=folder, spectra=True)
    row = next(row for row in report["modules"] if row["name"] == Q)
    lines = shown(report, None)
    head, line = (next(line for line in lines if word in line) for word in ("‖ΔW‖/‖W‖", "q_proj"))
    assert "‖ΔW‖  ‖ΔW‖/‖W‖  σ max" in head
    assert f"{row['change_norm']:.3g}" in line and f"{row['relative_norm']:.3g}" in line
    narrow = shown(report, 80)
    assert all(len(line) <= 80 for line in narrow) and any("‖ΔW‖/‖W‖" in line for line in narrow)
    assert any(line.startswith("no room  magnitude min, magnitude max, σ min, parameters: ") for line in narrow)
    assert not any("‖ΔW‖/‖W‖" in line for line in shown(inspect(path, spectra=True), None))
