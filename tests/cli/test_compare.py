"""loratools compare: a table, and the same numbers as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli._adapters import llama_adapter, loratools


def test_the_table_and_the_document(tmp_path: Path) -> None:
    one, other = llama_adapter(tmp_path / "one", rank=2), llama_adapter(tmp_path / "other", rank=3, layers=1)
    found = loratools("compare", one, other)
    assert found.returncode == 0, found.stderr
    document = json.loads(loratools("compare", one, other, "--json").stdout)
    lines = [line.split(maxsplit=1) for line in found.stdout.splitlines() if line]
    assert ["cosine", f"{document['total']['cosine']:.6g}"] in lines
    assert "only in a  model.layers.1.self_attn.q_proj.weight, model.layers.1.self_attn.v_proj.weight" in found.stdout
    for row in document["modules"]:
        shown = next(line for line in lines if line[0] == row["name"].removesuffix(".weight"))
        assert shown[1].split()[:4] == ["2,", "3", f"{row['cosine']:.4g}", f"{row['relative_distance']:.4g}"]
