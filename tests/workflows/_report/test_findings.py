"""What check finds, for every target: the rows of a report, for kinds that some runtimes have no place for."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratools.formats import save
from loratools.formats.reading import DEFAULTS
from loratools.ops._base import Base
from loratools.workflows import check
from loratools.workflows._report.findings import findings
from loratools.workflows.targets import names
from tests.workflows._adapters import MADE, Q, base, folder


@pytest.mark.parametrize("kind", ["dora", "loha", "bias", "saved", "rotated"])
def test_a_row_for_each_target_with_what_check_finds(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    save(MADE[kind](), path, format="loratools")
    rows = findings(path, None, dict(DEFAULTS))
    assert [row["target"] for row in rows] == list(names())
    for row in rows:
        found = check.check(path, row["target"])["findings"]
        assert [(one["kind"], one["tensor"], one["share"]) for one in row["findings"]] == [
            (one["kind"], one["tensor"], one["share"]) for one in found
        ]
        assert row["title"] and row["failed"] is None
        assert not {"target", "source"} & {word for one in row["findings"] for word in one}


def test_a_base_lets_shares_be_told(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    save(MADE["rotated"](), path, format="loratools")
    on = Base(base(tmp_path / "base"), dict(DEFAULTS))

    def share(of: Base | None) -> list[float | None]:
        return [one["share"] for row in findings(path, of, dict(DEFAULTS)) for one in row["findings"] if one["tensor"] == Q]

    assert set(share(None)) == {None} and all(value is not None and value > 0 for value in share(on))


def test_a_target_that_cannot_be_looked_at_says_why(tmp_path: Path) -> None:
    path = folder(tmp_path / "adapter")
    (path / "adapter_config.json").write_text("{")
    rows = findings(path, None, dict(DEFAULTS))
    assert all("adapter_config.json" in row["failed"] and row["findings"] == [] for row in rows)
